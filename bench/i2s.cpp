// bitnet.cpp's I2_S products behind two C functions. Its file is included from a checkout (bench/i2s.py); of ggml it
// needs only what is declared here.
#include <stdint.h>
#include <stdlib.h>

#if !defined(__AVX2__) && !defined(__ARM_NEON)
#error "I2_S has no code for this processor: its functions would do nothing"
#endif

#define GGML_API
enum ggml_type { GGML_TYPE_I2_S };
static size_t ggml_row_size(ggml_type, int64_t n) { return n; }  // only for quantize_i2_s's result, unused here

#include "src/ggml-bitnet-mad.cpp"

// Outputs [n0, n1) of every row. PARALLEL_SIZE activations share a row of weights (ACT_PARALLEL, the default); for the
// rows left over as many rows of weights share an activation: faster for one row, 0.058 against 0.076 ms in its README.
static void product(const int8_t* x, const uint8_t* w, const int32_t* sums, float* y, int M, int N, int K, int n0,
                    int n1) {
    const int together = M - M % PARALLEL_SIZE, full = n0 + (n1 - n0) / PARALLEL_SIZE * PARALLEL_SIZE;
    for (int c = n0; c < n1; c += COL_BLOCK_SIZE)
        for (int m = 0; m < together; m += ROW_BLOCK_SIZE)
            for (int n = c; n < n1 && n < c + COL_BLOCK_SIZE; ++n)
                ggml_vec_dot_i2_i8_s_Nx1(K, y + (int64_t)m * N + n, N, w + (int64_t)n * K / 4, K, x + (int64_t)m * K, K,
                                         together - m < ROW_BLOCK_SIZE ? together - m : ROW_BLOCK_SIZE);
    for (int m = together; m < M; ++m) {
        float* row = y + (int64_t)m * N;
        const int8_t* activation = x + (int64_t)m * K;
        ggml_vec_dot_i2_i8_s_1xN(K, row + n0, N, w + (int64_t)n0 * K / 4, K, activation, K, full - n0);
        ggml_vec_dot_i2_i8_s_1x1(K, row + full, N, w + (int64_t)full * K / 4, K, activation, K, n1 - full);
    }
    // The codes are weights plus one.
    for (int m = 0; m < M; ++m)
        for (int n = n0; n < n1; ++n) y[(int64_t)m * N + n] -= sums[m];
}

extern "C" {

// codes: N K / 4 + 32 bytes.
void i2s_pack(const float* weights, uint8_t* codes, int N, int K) { quantize_i2_s(weights, codes, N, K, nullptr); }

// y [M,N] = x [M,K] · weightsᵀ; sums: M numbers to work in. The outputs are split over threads, as llama.cpp does it.
void i2s_matmul(const int8_t* x, const uint8_t* codes, int32_t* sums, float* y, int M, int N, int K, int threads) {
    for (int m = 0; m < M; ++m) {
        int32_t sum = 0;
        for (int k = 0; k < K; ++k) sum += x[(int64_t)m * K + k];
        sums[m] = sum;
    }
    const int share = ((N + threads - 1) / threads + PARALLEL_SIZE - 1) / PARALLEL_SIZE * PARALLEL_SIZE;
#pragma omp parallel for schedule(static, 1) num_threads(threads) if (threads > 1)
    for (int t = 0; t < threads; ++t) {
        const int n0 = t * share < N ? t * share : N, n1 = n0 + share < N ? n0 + share : N;
        product(x, codes, sums, y, M, N, K, n0, n1);
    }
}

// What llama.cpp does before: codes = round(x · 127 / absmax) per row, and the step that undoes it.
void i2s_quantize(const float* x, int8_t* codes, float* steps, int M, int K) {
    for (int m = 0; m < M; ++m) {
        const float* row = x + (int64_t)m * K;
        float largest = 1e-5f;
#pragma omp simd reduction(max : largest)
        for (int k = 0; k < K; ++k) largest = fabsf(row[k]) > largest ? fabsf(row[k]) : largest;
        steps[m] = largest / 127;
        const float inverse = 127 / largest, magic = 12582912;  // adding 1.5 · 2^23 rounds to an integer, ties to even
        for (int k = 0; k < K; ++k) codes[(int64_t)m * K + k] = (int8_t)(int)((row[k] * inverse + magic) - magic);
    }
}

// What it does after: y *= step of the row · scale.
void i2s_scale(float* y, const float* steps, float scale, int M, int N) {
    for (int m = 0; m < M; ++m)
        for (int n = 0; n < N; ++n) y[(int64_t)m * N + n] *= steps[m] * scale;
}
}

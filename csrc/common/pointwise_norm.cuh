// y = weight * f(alpha * x + shift) + bias over rows of D elements, forward and backward, for any f given as
//   struct F { static constexpr bool kShift;  static float value(float u);  static float slope(float u, float value); };
// with slope = f'(u), given f(u); without kShift, shift is a null pointer and taken as 0. DyT (f = tanh) and Derf
// (f = erf) are this. Rows are contiguous; weight and bias are float32 [D], alpha and shift one float32 each, all on
// the device: reading them on the host would wait for the GPU. With a residual (else null, as s is) s = x + residual,
// rounded to T, is normalised and written; ds, its gradient beside that through y (null where there is none), is added
// to dx.
//
// Bound by memory: 2 elements cross it per result forward, 3 backward, and the sums add 16 * D * row_blocks bytes. So a
// warp owns columns, one vector of 16 bytes per lane, keeps their parameters (and partial sums) in registers, and walks
// down the rows with several loads in flight.
#pragma once

#include "common/cuda.cuh"

namespace ultra {

constexpr int kNormWarps = 8;
constexpr int kNormThreads = kNormWarps * kWarp;
// Rows in flight per warp, forward: 64 bytes per thread, 64 KiB per multiprocessor at 4 blocks. With a residual, of x and
// of it each: with more, bfloat16 spills.
template <bool kResidual> constexpr int kForwardRows = kResidual ? 2 : 4;
constexpr int kBackwardRows = 2;  // the same, of x and of dy each
constexpr int kRowsPerBlock = kNormWarps * 4;  // the least; fewer would make the partial sums a burden on memory
constexpr int64_t kMaxRowBlocks = 256;         // about two a multiprocessor for each tile of columns

// Row blocks of the backward sums: a function of the shape alone.
inline int64_t norm_row_blocks(int64_t rows) {
    int64_t blocks = ceil_div<int64_t>(rows, kRowsPerBlock);
    return blocks < kMaxRowBlocks ? blocks : kMaxRowBlocks;
}
// Floats of scratch memory that the backward pass needs: per row block [2, D] column sums and two numbers per tile.
inline int64_t norm_scratch(int64_t rows, int64_t D) {
    return norm_row_blocks(rows) * 2 * (D + ceil_div<int64_t>(D, kWarp));
}

template <typename F> __device__ inline float shift_of(const float* shift) {
    if constexpr (F::kShift) return *shift;
    else return 0.0f;
}

template <int N> __device__ inline Vector<float, N> sum_of(Vector<float, N> a, const Vector<float, N>& b) {
#pragma unroll
    for (int i = 0; i < N; ++i) a.v[i] += b.v[i];
    return a;
}

// Grid: row tiles × column tiles.
template <typename F, typename T, int N, bool kResidual>
__global__ void __launch_bounds__(kNormThreads, 3)
    pointwise_norm_rows(const T* x, const T* residual, const float* alpha, const float* shift, const float* weight,
                        const float* bias, T* y, T* sum, int64_t rows, int64_t D) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const float a = *alpha, s = shift_of<F>(shift);
    constexpr int kRows = kForwardRows<kResidual>;
    const int64_t first = (int64_t)blockIdx.x * (kNormWarps * kRows) + warp;
    for (int64_t d = ((int64_t)blockIdx.y * kWarp + lane) * N; d < D; d += (int64_t)gridDim.y * kWarp * N) {
        const auto w = load<N>(weight + d), b = load<N>(bias + d);
        Vector<T, N> v[kRows], more[kResidual ? kRows : 1];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            const int64_t row = first + r * kNormWarps;
            if (row < rows) v[r] = load<N>(x + row * D + d);
            if (kResidual && row < rows) more[r] = load<N>(residual + row * D + d);
        }
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            const int64_t row = first + r * kNormWarps;
            if constexpr (kResidual) {
                v[r] = narrow<T>(sum_of(widen(v[r]), widen(more[r])));
                if (row < rows) store(sum + row * D + d, v[r]);
            }
            Vector<float, N> t = widen(v[r]);
#pragma unroll
            for (int i = 0; i < N; ++i) t.v[i] = w.v[i] * F::value(a * t.v[i] + s) + b.v[i];
            if (row < rows) store(y + row * D + d, narrow<T>(t));
        }
    }
}

// part_columns [row blocks, 2, D]: dweight, dbias; part_scalars [row blocks, tiles, 2]: dalpha, dshift.
// Grid: row blocks × column tiles; a block may do several tiles.
template <typename F, typename T, int N, bool kResidual>
__global__ void __launch_bounds__(kNormThreads)
    pointwise_norm_rows_backward(const T* dy, const T* dsum, const T* x, const float* alpha, const float* shift,
                                 const float* weight, T* dx, float* part_columns, float* part_scalars, int64_t rows,
                                 int64_t rows_per_block, int64_t D, int64_t tiles) {
    __shared__ Vector<float, N> columns[2][kNormWarps][kWarp];
    __shared__ float scalars[2][kNormWarps];
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const float a = *alpha, s = shift_of<F>(shift);
    const int64_t begin = blockIdx.x * rows_per_block;
    const int64_t end = begin + rows_per_block < rows ? begin + rows_per_block : rows;  // the last block may be empty
    float* out_columns = part_columns + (int64_t)blockIdx.x * 2 * D;
    for (int64_t tile = blockIdx.y; tile < tiles; tile += gridDim.y) {
        const int64_t d = (tile * kWarp + lane) * N;
        Vector<float, N> dw = {}, db = {}, w = {};
        float da = 0.0f, ds = 0.0f;
        if (d < D) {
            w = load<N>(weight + d);
            for (int64_t first = begin + warp; first < end; first += kNormWarps * kBackwardRows) {
                Vector<T, N> v[kBackwardRows], g[kBackwardRows], more[kResidual ? kBackwardRows : 1];
#pragma unroll
                for (int r = 0; r < kBackwardRows; ++r) {
                    const int64_t row = first + r * kNormWarps;
                    if (row < end) v[r] = load<N>(x + row * D + d), g[r] = load<N>(dy + row * D + d);
                    if (kResidual && row < end) more[r] = load<N>(dsum + row * D + d);
                }
#pragma unroll
                for (int r = 0; r < kBackwardRows; ++r) {
                    const int64_t row = first + r * kNormWarps;
                    if (row >= end) break;
                    Vector<float, N> in = widen(v[r]), grad = widen(g[r]);
#pragma unroll
                    for (int i = 0; i < N; ++i) {
                        const float u = a * in.v[i] + s, t = F::value(u);
                        const float slope = grad.v[i] * w.v[i] * F::slope(u, t);
                        dw.v[i] += grad.v[i] * t;
                        db.v[i] += grad.v[i];
                        da += slope * in.v[i];
                        if constexpr (F::kShift) ds += slope;
                        in.v[i] = a * slope;
                    }
                    if constexpr (kResidual) in = sum_of(in, widen(more[r]));
                    store(dx + row * D + d, narrow<T>(in));
                }
            }
        }
        columns[0][warp][lane] = dw;
        columns[1][warp][lane] = db;
        const float alpha_sum = block_sum<kNormWarps>(da, scalars[0]);
        const float shift_sum = block_sum<kNormWarps>(ds, scalars[1]);  // its barrier is also that of `columns`
        if (threadIdx.x == 0) {
            float* out = part_scalars + (blockIdx.x * tiles + tile) * 2;
            out[0] = alpha_sum;
            out[1] = shift_sum;
        }
        for (int at = threadIdx.x; at < 2 * kWarp * N; at += kNormThreads) {
            const int which = at / (kWarp * N), column = at % (kWarp * N);
            float total = 0.0f;
#pragma unroll
            for (int i = 0; i < kNormWarps; ++i) total += columns[which][i][column / N].v[column % N];
            if (tile * kWarp * N + column < D) out_columns[which * D + tile * kWarp * N + column] = total;
        }
        __syncthreads();  // before the next tile writes into shared memory
    }
}

// Adds up what the blocks left, in order. Grid: tiles of kWarp columns × (dweight, dbias); block (0, 0) also does the
// `scalars` pairs of numbers.
template <typename F>
__global__ void __launch_bounds__(kNormThreads)
    pointwise_norm_sums(const float* part_columns, const float* part_scalars, float* dweight, float* dbias, float* dalpha,
                        float* dshift, int64_t blocks, int64_t scalars, int64_t D) {
    __shared__ float columns[kNormWarps][kWarp];
    __shared__ float shared[2][kNormWarps];
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int64_t d = (int64_t)blockIdx.x * kWarp + lane;
    float total = 0.0f;
    if (d < D) {
#pragma unroll 4
        for (int64_t block = warp; block < blocks; block += kNormWarps)
            total += part_columns[(block * 2 + blockIdx.y) * D + d];
    }
    columns[warp][lane] = total;
    __syncthreads();
    if (warp == 0 && d < D) {
        total = 0.0f;
#pragma unroll
        for (int i = 0; i < kNormWarps; ++i) total += columns[i][lane];
        (blockIdx.y == 0 ? dweight : dbias)[d] = total;
    }
    if (blockIdx.x + blockIdx.y > 0) return;
    float da = 0.0f, ds = 0.0f;
    for (int64_t i = threadIdx.x; i < scalars; i += kNormThreads) {
        da += part_scalars[i * 2];
        ds += part_scalars[i * 2 + 1];
    }
    da = block_sum<kNormWarps>(da, shared[0]);
    ds = block_sum<kNormWarps>(ds, shared[1]);
    if (threadIdx.x == 0) {
        *dalpha = da;
        if constexpr (F::kShift) *dshift = ds;
    }
}

inline unsigned grid_y(int64_t n) { return (unsigned)(n < kMaxGridY ? n : kMaxGridY); }

template <typename F, typename T, int N>
int launch_pointwise_norm(const void* x, const void* residual, const float* alpha, const float* shift,
                          const float* weight, const float* bias, void* y, void* s, int64_t rows, int64_t D,
                          void* stream) {
    const int rows_per_warp = residual ? kForwardRows<true> : kForwardRows<false>;
    const dim3 grid((unsigned)ceil_div<int64_t>(rows, kNormWarps * rows_per_warp),
                    grid_y(ceil_div<int64_t>(D, kWarp * N)));
    return launch(residual ? pointwise_norm_rows<F, T, N, true> : pointwise_norm_rows<F, T, N, false>, grid,
                  kNormThreads, stream, (const T*)x, (const T*)residual, alpha, shift, weight, bias, (T*)y, (T*)s, rows,
                  D);
}

template <typename F, typename T, int N>
int launch_pointwise_norm_backward(const void* dy, const void* ds, const void* x, const float* alpha,
                                   const float* shift, const float* weight, void* dx, float* dalpha, float* dshift,
                                   float* dweight, float* dbias, float* scratch, int64_t rows, int64_t D,
                                   void* stream) {
    const int64_t blocks = norm_row_blocks(rows), tiles = ceil_div<int64_t>(D, kWarp * N);
    float* part_scalars = scratch + blocks * 2 * D;
    int code = launch(ds ? pointwise_norm_rows_backward<F, T, N, true> : pointwise_norm_rows_backward<F, T, N, false>,
                      dim3((unsigned)blocks, grid_y(tiles)), kNormThreads, stream, (const T*)dy, (const T*)ds,
                      (const T*)x, alpha, shift, weight, (T*)dx, scratch, part_scalars, rows, ceil_div(rows, blocks), D,
                      tiles);
    if (code != kSuccess) return code;
    return launch(pointwise_norm_sums<F>, dim3((unsigned)ceil_div<int64_t>(D, kWarp), 2), kNormThreads, stream, scratch,
                  part_scalars, dweight, dbias, dalpha, dshift, blocks, blocks * tiles, D);
}

// rows and D are at least 1. Whole vectors where every row starts on a vector's border, else one element at a time.
template <typename F, typename T>
int pointwise_norm_forward_as(const void* x, const void* residual, const float* alpha, const float* shift,
                              const float* weight, const float* bias, void* y, void* s, int64_t rows, int64_t D,
                              void* stream) {
    auto run = vectors_fit<T>(D, x, residual, y, s, weight, bias)
                   ? launch_pointwise_norm<F, T, kVectorBytes / sizeof(T)>
                   : launch_pointwise_norm<F, T, 1>;
    return run(x, residual, alpha, shift, weight, bias, y, s, rows, D, stream);
}

template <typename F, typename T>
int pointwise_norm_backward_as(const void* dy, const void* ds, const void* x, const float* alpha, const float* shift,
                               const float* weight, void* dx, float* dalpha, float* dshift, float* dweight,
                               float* dbias, float* scratch, int64_t rows, int64_t D, void* stream) {
    auto run = vectors_fit<T>(D, dy, ds, x, dx, weight)
                   ? launch_pointwise_norm_backward<F, T, kVectorBytes / sizeof(T)>
                   : launch_pointwise_norm_backward<F, T, 1>;
    return run(dy, ds, x, alpha, shift, weight, dx, dalpha, dshift, dweight, dbias, scratch, rows, D, stream);
}

template <typename F>
int pointwise_norm_forward(const void* x, const void* residual, const float* alpha, const float* shift,
                           const float* weight, const float* bias, void* y, void* s, int64_t rows, int64_t D,
                           int64_t dtype, void* stream) {
    auto run = dtype == kBFloat16  ? pointwise_norm_forward_as<F, __nv_bfloat16>
               : dtype == kFloat16 ? pointwise_norm_forward_as<F, __half>
                                   : pointwise_norm_forward_as<F, float>;
    return run(x, residual, alpha, shift, weight, bias, y, s, rows, D, stream);
}

template <typename F>
int pointwise_norm_backward(const void* dy, const void* ds, const void* x, const float* alpha, const float* shift,
                            const float* weight, void* dx, float* dalpha, float* dshift, float* dweight, float* dbias,
                            float* scratch, int64_t rows, int64_t D, int64_t dtype, void* stream) {
    auto run = dtype == kBFloat16  ? pointwise_norm_backward_as<F, __nv_bfloat16>
               : dtype == kFloat16 ? pointwise_norm_backward_as<F, __half>
                                   : pointwise_norm_backward_as<F, float>;
    return run(dy, ds, x, alpha, shift, weight, dx, dalpha, dshift, dweight, dbias, scratch, rows, D, stream);
}

}  // namespace ultra

// Contract: ultra_kernels/ternary/op.py. Rows of int8, up to 8 of them, times 2-bit weights; the quantiser of such rows.
//
// Bound by the way of the weights from memory. A block of threads has a panel of 16 rows, or a part of its columns, and a
// warp takes 512 bytes of it at a time: lane l has 16 columns of the rows 4 (l % 4) .. + 3, as operands of dp4a once
// they are shifted and masked. Sums are of integers: exact in any order, also where 2^32 is passed on the way, since a
// code is its weight plus one and what is too much, the sum of x, goes at the end.
#include "common/cuda.cuh"

namespace {

using namespace ultra;

constexpr int kMaxM = 8;
constexpr int kRows = 16, kColumns = 16;                   // of 64 bytes of weights
constexpr int kQuads = kRows / 4, kBlocks = kWarp / kQuads;  // that a warp reads at a time: 4 rows a lane, 8 blocks
constexpr int kWarps = 4, kMostWarps = 16;                 // with many panels, with few
constexpr int64_t kManyPanels = 256;                       // two blocks of threads a multiprocessor
// Blocks of columns below which a panel is not cut: 16 loads a warp. The second kernel costs more than that saves.
constexpr int64_t kLeastSplit = 16 * kMostWarps * kBlocks;
constexpr int kQuantizerThreads = 256;

// Fields of 8 bytes: ultra_kernels/ternary/cuda.py fills it in this order.
struct Product {
    const int8_t* x;            // [M, 16 * blocks], 0 past K, M up to kMaxM; aligned to kVectorBytes, as the panels are
    const uint32_t* panels;     // [panels, blocks, 16]
    const float *step, *scale;  // [M] and [], or null: y is the int32 product
    const void* bias;           // [N] or null
    int64_t bias_dtype;
    void* y;                    // [M, N]
    int64_t y_dtype;
    int32_t* parts;             // [splits, M, N], null where splits is 1
    int64_t splits, M, N, blocks;
};

__device__ inline float read(const void* p, int64_t dtype, int64_t at) {
    if (dtype == kBFloat16) return to_float(static_cast<const __nv_bfloat16*>(p)[at]);
    if (dtype == kFloat16) return to_float(static_cast<const __half*>(p)[at]);
    return static_cast<const float*>(p)[at];
}
__device__ inline void write(void* p, int64_t dtype, int64_t at, float x) {
    if (dtype == kBFloat16) narrow(x, static_cast<__nv_bfloat16*>(p) + at);
    else if (dtype == kFloat16) narrow(x, static_cast<__half*>(p) + at);
    else static_cast<float*>(p)[at] = x;
}

__device__ inline void finish(const Product& p, int64_t m, int64_t n, int sum) {
    const int64_t at = m * p.N + n;
    if (!p.step) static_cast<int32_t*>(p.y)[at] = sum;
    else write(p.y, p.y_dtype, at, (float)sum * (p.step[m] * *p.scale) + (p.bias ? read(p.bias, p.bias_dtype, n) : 0.0f));
}

// Grid: panels × splits.
template <int M>
__global__ void __launch_bounds__(kMostWarps * kWarp) ternary_panel(Product p, int64_t per_split) {
    constexpr int kAhead = M <= 2 ? 4 : kMaxM / M;  // loads of weights in flight per lane
    __shared__ int sums[kMostWarps][M][kRows];
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp, quad = lane % kQuads;
    const int64_t begin = blockIdx.y * per_split, end = begin + per_split < p.blocks ? begin + per_split : p.blocks;
    const uint32_t* panel = p.panels + blockIdx.x * p.blocks * kRows + quad * 4;
    int product[M][4] = {}, total[M] = {};
    for (int64_t first = begin + warp * kBlocks + lane / kQuads; first < end; first += warps * kBlocks * kAhead) {
        Vector<uint32_t, 4> codes[kAhead];
        Vector<int, 4> x[kAhead][M];
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            const int64_t block = first + i * warps * kBlocks;
            if (block >= end) break;
            codes[i] = load<4>(panel + block * kRows);
#pragma unroll
            for (int m = 0; m < M; ++m) {
                const int64_t row = m < p.M ? m : 0;  // whose sums are not written a second time
                x[i][m] = load<4>(reinterpret_cast<const int*>(p.x + (row * p.blocks + block) * kColumns));
            }
        }
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            if (first + i * warps * kBlocks >= end) break;
#pragma unroll
            for (int s = 0; s < 4; ++s) {
#pragma unroll
                for (int m = 0; m < M; ++m) total[m] = __dp4a(x[i][m].v[s], 0x01010101, total[m]);
#pragma unroll
                for (int r = 0; r < 4; ++r) {
                    const int four = (int)(codes[i].v[r] >> 2 * s & 0x03030303u);
#pragma unroll
                    for (int m = 0; m < M; ++m) product[m][r] = __dp4a(x[i][m].v[s], four, product[m][r]);
                }
            }
        }
    }
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            int sum = product[m][r] - total[m];
#pragma unroll
            for (int lanes = kQuads; lanes < kWarp; lanes *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
            if (lane < kQuads) sums[warp][m][quad * 4 + r] = sum;
        }
    }
    __syncthreads();
    const int m = threadIdx.x / kRows, r = threadIdx.x % kRows;
    const int64_t n = (int64_t)blockIdx.x * kRows + r;
    if (m >= M || m >= p.M || n >= p.N) return;
    int sum = 0;
    for (int w = 0; w < warps; ++w) sum += sums[w][m][r];
    if (p.parts) p.parts[(blockIdx.y * p.M + m) * p.N + n] = sum;
    else finish(p, m, n, sum);
}
static_assert(kMaxM * kRows <= kWarps * kWarp, "a thread for each sum");

__global__ void __launch_bounds__(kQuantizerThreads) ternary_parts(Product p) {
    const int64_t at = (int64_t)blockIdx.x * kQuantizerThreads + threadIdx.x, count = p.M * p.N;
    if (at >= count) return;
    int sum = 0;
    for (int64_t split = 0; split < p.splits; ++split) sum += p.parts[split * count + at];
    finish(p, at / p.N, at % p.N, sum);
}

// codes [M, width] and step [M] of rows of K elements: bitlinear/reference.py, quantize_tokens. Grid: rows.
template <typename T, int V>
__global__ void __launch_bounds__(kQuantizerThreads)
    ternary_quantizer(const T* x, int8_t* codes, float* step, int64_t K, int64_t width) {
    struct alignas(V) Bytes { int8_t v[V]; };
    __shared__ unsigned shared[kQuantizerThreads / kWarp];
    x += blockIdx.x * K, codes += blockIdx.x * width;
    unsigned most = 0;  // bits of absolute values are in their order, and those of NaN above all
    for (int64_t k = threadIdx.x * V; k < K; k += kQuantizerThreads * V) {
        const auto v = widen(load<V>(x + k));
#pragma unroll
        for (int i = 0; i < V; ++i) {
            const float size = fabsf(v.v[i]);
            unsigned bits;
            memcpy(&bits, &size, sizeof bits);
            if (bits > most) most = bits;
        }
    }
#pragma unroll
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
        const unsigned other = __shfl_xor_sync(0xffffffffu, most, lanes);
        if (other > most) most = other;
    }
    if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = most;
    __syncthreads();
    for (unsigned other : shared)
        if (other > most) most = other;
    float absmax;
    memcpy(&absmax, &most, sizeof absmax);
    if (absmax < 1e-5f) absmax = 1e-5f;  // NaN stays
    const float factor = 1.0f / absmax * 127.0f;  // as torch has 127 / absmax
    if (threadIdx.x == 0) step[blockIdx.x] = absmax / 127.0f;
    for (int64_t k = threadIdx.x * V; k < width; k += kQuantizerThreads * V) {
        Bytes out = {};
        if (k < K) {
            const auto v = widen(load<V>(x + k));
#pragma unroll
            for (int i = 0; i < V; ++i) out.v[i] = (int8_t)__float2int_rn(v.v[i] * factor);  // half to even
        }
        *reinterpret_cast<Bytes*>(codes + k) = out;
    }
}

template <typename T>
int quantize_as(const void* x, int8_t* codes, float* step, int64_t M, int64_t K, int64_t width, void* stream) {
    constexpr int V = kVectorBytes / sizeof(T);
    auto kernel = vectors_fit<T>(K, x) ? ternary_quantizer<T, V> : ternary_quantizer<T, 1>;
    return launch(kernel, dim3((unsigned)M), kQuantizerThreads, stream, (const T*)x, codes, step, K, width);
}

}  // namespace

// Parts that the columns of a panel are cut into.
ULTRA_EXPORT int64_t ternary_splits(int64_t panels, int64_t blocks) {
    const int64_t wanted = ceil_div(kManyPanels, panels), most = blocks / kLeastSplit;
    const int64_t splits = wanted < most ? wanted : most;
    return splits > 1 ? splits : 1;
}

ULTRA_EXPORT int ternary_product(const Product* p, void* stream) {
    const int64_t panels = ceil_div<int64_t>(p->N, kRows);
    auto kernel = p->M == 1 ? ternary_panel<1> : p->M == 2 ? ternary_panel<2> : p->M <= 4 ? ternary_panel<4>
                                                                                       : ternary_panel<kMaxM>;
    const int threads = (panels < kManyPanels ? kMostWarps : kWarps) * kWarp;
    const int code = launch(kernel, dim3((unsigned)panels, (unsigned)p->splits), threads, stream, *p,
                            ceil_div(p->blocks, p->splits));
    if (code != kSuccess || !p->parts) return code;
    return launch(ternary_parts, dim3((unsigned)ceil_div<int64_t>(p->M * p->N, kQuantizerThreads)), kQuantizerThreads,
                  stream, *p);
}

// x [M, K] of `dtype`; codes int8 [M, width] with 0 past K, width a multiple of 16 from K on; step [M].
ULTRA_EXPORT int ternary_quantize(const void* x, int8_t* codes, float* step, int64_t M, int64_t K, int64_t width,
                                  int64_t dtype, void* stream) {
    auto run = dtype == kBFloat16 ? quantize_as<__nv_bfloat16> : dtype == kFloat16 ? quantize_as<__half>
                                                                                  : quantize_as<float>;
    return run(x, codes, step, M, K, width, stream);
}

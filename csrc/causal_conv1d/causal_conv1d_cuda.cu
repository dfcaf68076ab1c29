// Contract: ultra_kernels/causal_conv1d/op.py. y_t = act(bias + sum_j w_j x_{t+first+j}): the taps in the order of the
// positions that they read.
//
// Bound by memory: a block holds a tile of kRows steps × kChannels channels with the steps beside it that the taps reach
// in shared memory, so that x crosses memory once in either order of its axes. The backward pass leaves the sums of
// dweight and dbias per tile, a small multiple of 1/kRows of x, for a sum in fixed order.
#include "common/tile.cuh"

namespace {

using namespace ultra;

constexpr int kMaxWidth = 8, kHalo = kMaxWidth - 1;
constexpr int kRows = 64, kChannels = 64, kStride = kChannels + 1;
constexpr int kThreads = 256, kLanesOfTime = kThreads / kChannels;

// Fields of 8 bytes: ultra_kernels/causal_conv1d/cuda.py fills it in this order.
struct Convolution {
    int64_t batch, channels, length, width, first;
    View x, y;                   // y: the output, or its gradient
    View dx;
    const float *weight, *bias;  // [width, D], [D] or null
    const int32_t* borders;      // [sequences + 1], or null
    int64_t sequences, silu;
    float* sums;                 // [tiles of time, B, width + 1, D]: dweight, then dbias
};

struct Place {
    int64_t b, d, t, tile;
    int channels, rows;

    __device__ explicit Place(const Convolution& p) {
        const int64_t across = ceil_div<int64_t>(p.channels, kChannels), tiles = ceil_div<int64_t>(p.length, kRows);
        int64_t rest = blockIdx.x;
        d = rest % across * kChannels, rest /= across;
        tile = rest % tiles, b = rest / tiles;
        t = tile * kRows;
        channels = (int)(p.channels - d < kChannels ? p.channels - d : kChannels);
        rows = (int)(p.length - t < kRows ? p.length - t : kRows);
    }
};

// Rows [t - before, t + rows + after) of v into a tile whose row 0 is t - reach; those outside the tensor stay as they are.
__device__ inline void load_rows(float* tile, const View& v, const Place& at, int64_t length, int before, int after,
                                 int reach) {
    const int64_t low = at.t - before, high = at.t + at.rows + after;
    const int64_t begin = low < 0 ? 0 : low, end = high < length ? high : length;
    read<As::kValue, 4>(tile + (begin - (at.t - reach)) * kStride, kStride,
         Window(v, at.b, at.d, begin, (int)(end - begin), at.channels), Team{(int)threadIdx.x, kThreads});
}

struct Taps {
    float weight[kMaxWidth], bias;

    __device__ Taps(const Convolution& p, int64_t d, bool live) {
#pragma unroll
        for (int j = 0; j < kMaxWidth; ++j) weight[j] = live && j < p.width ? p.weight[j * p.channels + d] : 0.0f;
        bias = live && p.bias ? p.bias[d] : 0.0f;
    }
};

// The sequence of a row, in rows counted from t - reach; empty for a row outside the tensor.
struct Borders { int begin, end; };

__device__ inline void find_borders(Borders* borders, const Convolution& p, const Place& at, int reach, int rows) {
    for (int r = threadIdx.x; r < rows; r += kThreads) {
        const int64_t low = at.t - reach, t = low + r;
        borders[r] = {0, 0};
        if (t < 0 || t >= p.length) continue;
        const Span s = sequence_at(p.borders, p.sequences, p.length, at.b, t);
        const int64_t begin = s.begin - low, end = s.end - low, most = rows + kHalo;
        borders[r] = {(int)(begin < 0 ? 0 : begin), (int)(end < most ? end : most)};
    }
}

// bias + sum over the taps of row r of a tile of x, rows counted as `borders` counts them.
__device__ inline float convolve(const float* x, const Taps& taps, const Convolution& p, const Borders& s, int r) {
    float sum = taps.bias;
#pragma unroll
    for (int j = 0; j < kMaxWidth; ++j) {
        const int from = r + (int)p.first + j;
        if (j < p.width && from >= s.begin && from < s.end) sum += taps.weight[j] * x[from * kStride];
    }
    return sum;
}

__global__ void __launch_bounds__(kThreads, 2) convolve_tile(const Convolution p) {
    __shared__ float xs[(kRows + kHalo) * kStride], ys[kRows * kStride];
    __shared__ Borders borders[kRows + kHalo];
    const Place at(p);
    const int before = (int)-p.first, after = (int)(p.width - 1 + p.first), c = threadIdx.x % kChannels;
    load_rows(xs, p.x, at, p.length, before, after, before);
    find_borders(borders, p, at, before, before + at.rows);
    const Taps taps(p, at.d + c, c < at.channels);
    __syncthreads();
    for (int r = threadIdx.x / kChannels; r < at.rows; r += kLanesOfTime) {
        const float y = convolve(xs + c, taps, p, borders[before + r], before + r);
        ys[r * kStride + c] = p.silu ? silu(y) : y;
    }
    __syncthreads();
    write(ys, kStride, Window(p.y, at.b, at.d, at.t, at.rows, at.channels), Team{(int)threadIdx.x, kThreads});
}

constexpr int kReachedRows = kRows + 2 * kHalo;
constexpr int64_t kBackwardShared = (2 * kReachedRows + kRows) * kStride * sizeof(float);

// Tap j of the output at t reads t + first + j, so x at t shows in the outputs at t - first - j: dx takes the gradients
// before the activation of `after` rows behind the tile and `before` rows ahead, which take x as far again.
__global__ void __launch_bounds__(kThreads, 2) convolve_tile_backward(const Convolution p) {
    float* const xs = dynamic_shared();              // row 0 is t - reach
    float* const gs = xs + kReachedRows * kStride;   // the same
    float* const dxs = gs + kReachedRows * kStride;  // row 0 is t
    __shared__ Borders borders[kReachedRows];
    const Place at(p);
    const int reach = (int)p.width - 1, before = (int)-p.first, c = threadIdx.x % kChannels;
    const int lane = threadIdx.x / kChannels;
    load_rows(xs, p.x, at, p.length, reach, reach, reach);
    load_rows(gs, p.y, at, p.length, reach - before, before, reach);
    find_borders(borders, p, at, reach, at.rows + 2 * reach);
    const Taps taps(p, at.d + c, c < at.channels);
    __syncthreads();
    if (p.silu) {  // each element of gs by one thread
        for (int r = before + lane; r < reach + at.rows + before; r += kLanesOfTime)
            if (borders[r].begin < borders[r].end)
                gs[r * kStride + c] *= silu_slope(convolve(xs + c, taps, p, borders[r], r));
        __syncthreads();
    }
    float dweight[kMaxWidth] = {}, dbias = 0.0f;
    for (int r = reach + lane; r < reach + at.rows; r += kLanesOfTime) {
        const Borders s = borders[r];
        const float g = gs[r * kStride + c];
        float dx = 0.0f;
#pragma unroll
        for (int j = 0; j < kMaxWidth; ++j) {
            const int from = r + (int)p.first + j, to = r - (int)p.first - j;
            if (j < p.width && from >= s.begin && from < s.end) dweight[j] += g * xs[from * kStride + c];
            if (j < p.width && to >= s.begin && to < s.end) dx += taps.weight[j] * gs[to * kStride + c];
        }
        dbias += g;
        dxs[(r - reach) * kStride + c] = dx;
    }
    __syncthreads();  // dxs is whole, xs is free for the sums
    write(dxs, kStride, Window(p.dx, at.b, at.d, at.t, at.rows, at.channels), Team{(int)threadIdx.x, kThreads});
    float* const sums = xs;  // [lane][tap, then bias][channel]
    constexpr int kSums = (kMaxWidth + 1) * kChannels;
#pragma unroll
    for (int j = 0; j < kMaxWidth; ++j)
        if (j < p.width) sums[lane * kSums + j * kChannels + c] = dweight[j];
    sums[lane * kSums + (int)p.width * kChannels + c] = dbias;
    __syncthreads();
    float* const out = p.sums + (at.tile * p.batch + at.b) * (p.width + 1) * p.channels + at.d;
    for (int k = threadIdx.x; k < (p.width + 1) * kChannels; k += kThreads) {
        float total = 0.0f;
#pragma unroll
        for (int i = 0; i < kLanesOfTime; ++i) total += sums[i * kSums + k];
        if (k % kChannels < at.channels) out[k / kChannels * p.channels + k % kChannels] = total;
    }
}

dim3 tiles(const Convolution& p) {
    return dim3((unsigned)(p.batch * ceil_div<int64_t>(p.length, kRows) * ceil_div<int64_t>(p.channels, kChannels)));
}

}  // namespace

// Tiles of time, for the size of `sums`.
ULTRA_EXPORT int64_t causal_conv1d_tiles(int64_t length) { return ceil_div<int64_t>(length, kRows); }

ULTRA_EXPORT int causal_conv1d_forward(const Convolution* p, void* stream) {
    return launch(convolve_tile, tiles(*p), kThreads, stream, *p);
}

ULTRA_EXPORT int causal_conv1d_backward(const Convolution* p, void* stream) {
    return launch_shared(convolve_tile_backward, tiles(*p), kThreads, kBackwardShared, stream, *p);
}

// Parts of tensors [B,D,L] of any strides, walked by a block; gates; which sequence a step belongs to.
//
// The kernels work on tiles in shared memory: float32, a row of channels per time step. Rows are an odd number of floats
// apart, so that the lanes of a warp meet no bank twice, whether they follow the channels or time.
#pragma once

#include "common/cuda.cuh"
#include "common/view.h"

namespace ultra {

// rows × channels of a view from [b, d, t].
struct Window {
    char* data;
    int64_t channel, time;
    int dtype, rows, channels;

    __device__ Window(const View& v, int64_t b, int64_t d, int64_t t, int rows, int channels)
        : data(v.data), channel(v.channel), time(v.time), dtype(v.dtype), rows(rows), channels(channels) {
        data += (b * v.batch + d * v.channel + t * v.time) * (dtype == kFloat32 ? 4 : 2);
    }
};

// Threads first, first + count, ... of a block.
struct Team { int first, count; };

// ---- gates ----------------------------------------------------------------------------------------------------------
constexpr float kLog2E = 1.44269504088896f, kLn2 = 0.693147180559945f;

__device__ inline float sigmoid(float x) { return __fdividef(1.0f, 1.0f + fast_exp2(-kLog2E * x)); }
__device__ inline float silu(float x) { return x * sigmoid(x); }
__device__ inline float silu_slope(float x) {
    const float s = sigmoid(x);
    return s + s * (x - x * s);
}

// ln(1 + e^x) = max(x, 0) + ln(1 + q), q = e^-|x|, and ln(1 + q) = 2 artanh(s), s = q / (2 + q) <= 1/3: every term
// keeps its relative precision where e^x is tiny (common/gates.h).
__device__ inline float softplus(float x) {
    const float q = fast_exp2(-kLog2E * fabsf(x)), s = __fdividef(q, 2.0f + q), s2 = s * s;
    float p = 1.4005994257e-1f;
    p = p * s2 + 1.4000902483e-1f;
    p = p * s2 + 2.0010763628e-1f;
    p = p * s2 + 3.3333208143e-1f;
    return select_less(x, 0.0f, 0.0f, x) + 2.0f * (s + s * s2 * p);  // NaN stays NaN
}

// ---- between memory and tiles ---------------------------------------------------------------------------------------
// What `read` makes of an element x and of what the tile holds.
enum class As { kValue, kFactor, kSiluFactor, kSiluSlopeFactor };

// The axis whose neighbours lie side by side in memory, if one does, is walked in vectors of V elements.
struct Walk {
    int fast, slow, tile_fast, tile_slow;
    int64_t fast_stride, slow_stride;

    __device__ Walk(const Window& w, int stride) {
        const bool along_time = w.time == 1 && w.channel != 1;
        fast = along_time ? w.rows : w.channels, slow = along_time ? w.channels : w.rows;
        tile_fast = along_time ? stride : 1, tile_slow = along_time ? 1 : stride;
        fast_stride = along_time ? w.time : w.channel, slow_stride = along_time ? w.channel : w.time;
    }
    template <typename T> __device__ bool whole_vectors(const Window& w) const {
        return fast_stride == 1 &&
               (reinterpret_cast<uintptr_t>(w.data) | slow_stride * (int64_t)sizeof(T)) % kVectorBytes == 0;
    }
};

template <As kAs> __device__ inline void put(float* to, float x) {
    if constexpr (kAs == As::kValue) *to = x;
    if constexpr (kAs == As::kFactor) *to *= x;
    if constexpr (kAs == As::kSiluFactor) *to *= silu(x);
    if constexpr (kAs == As::kSiluSlopeFactor) *to *= silu_slope(x);
}

// Places begin, begin + 1, ..., end - 1 of the fast axis, V at a time; K vectors are asked for before the first is used.
template <As kAs, int K, typename T, int V>
__device__ inline void read_vectors(float* tile, const T* data, const Walk& walk, Team team, int begin, int end) {
    const int vectors = (end - begin) / V, total = vectors * walk.slow;
    const int64_t stride = V > 1 ? 1 : walk.fast_stride;
#pragma unroll 1
    for (int from = team.first; from < total; from += K * team.count) {
        Vector<T, V> got[K];
#pragma unroll
        for (int k = 0; k < K; ++k) {
            const int at = from + k * team.count, f = begin + at % vectors * V, s = at / vectors;
            if (at < total) got[k] = load<V>(data + f * stride + s * walk.slow_stride);
        }
#pragma unroll
        for (int k = 0; k < K; ++k) {
            const int at = from + k * team.count, f = begin + at % vectors * V, s = at / vectors;
            float* to = tile + f * walk.tile_fast + s * walk.tile_slow;
            if (at >= total) break;
#pragma unroll
            for (int i = 0; i < V; ++i, to += walk.tile_fast) put<kAs>(to, to_float(got[k].v[i]));
        }
    }
}

template <As kAs, int K, typename T> __device__ inline void read_as(float* tile, int stride, const Window& w, Team team) {
    constexpr int V = kVectorBytes / sizeof(T);
    const Walk walk(w, stride);
    const T* data = reinterpret_cast<const T*>(w.data);
    team.first = opaque(team.first);
    const int whole = walk.whole_vectors<T>(w) ? walk.fast / V * V : 0;
    if (whole) read_vectors<kAs, K, T, V>(tile, data, walk, team, 0, whole);
    if (whole < walk.fast) read_vectors<kAs, K, T, 1>(tile, data, walk, team, whole, walk.fast);
}

template <typename T, int V>
__device__ inline void write_vectors(const float* tile, T* data, const Walk& walk, Team team, int begin, int end) {
    const int vectors = (end - begin) / V, total = vectors * walk.slow;
    const int64_t stride = V > 1 ? 1 : walk.fast_stride;
#pragma unroll 1
    for (int at = team.first; at < total; at += team.count) {
        const int f = begin + at % vectors * V, s = at / vectors;
        const float* from = tile + f * walk.tile_fast + s * walk.tile_slow;
        Vector<float, V> x;
#pragma unroll
        for (int i = 0; i < V; ++i, from += walk.tile_fast) x.v[i] = *from;
        store(data + f * stride + s * walk.slow_stride, narrow<T>(x));
    }
}

template <typename T> __device__ inline void write_as(const float* tile, int stride, const Window& w, Team team) {
    constexpr int V = kVectorBytes / sizeof(T);
    const Walk walk(w, stride);
    T* data = reinterpret_cast<T*>(w.data);
    team.first = opaque(team.first);
    const int whole = walk.whole_vectors<T>(w) ? walk.fast / V * V : 0;
    if (whole) write_vectors<T, V>(tile, data, walk, team, 0, whole);
    if (whole < walk.fast) write_vectors<T, 1>(tile, data, walk, team, whole, walk.fast);
}

// The window into a tile of rows `stride` floats apart, every element by one thread of the team: its value, or what the
// tile holds times the value, its silu, or the slope of its silu. K vectors are in flight per thread; more than 1 spill
// where much else is kept.
template <As kAs = As::kValue, int K = 1>
__device__ inline void read(float* tile, int stride, const Window& w, Team team) {
    if (w.dtype == kBFloat16) read_as<kAs, K, __nv_bfloat16>(tile, stride, w, team);
    else if (w.dtype == kFloat16) read_as<kAs, K, __half>(tile, stride, w, team);
    else read_as<kAs, K, float>(tile, stride, w, team);
}
// The reverse, of values.
__device__ inline void write(const float* tile, int stride, const Window& w, Team team) {
    if (w.dtype == kBFloat16) write_as<__nv_bfloat16>(tile, stride, w, team);
    else if (w.dtype == kFloat16) write_as<__half>(tile, stride, w, team);
    else write_as<float>(tile, stride, w, team);
}

// ---- packed sequences -----------------------------------------------------------------------------------------------
struct Span { int64_t begin, end, index; };

// The sequence of batch row b that position t is in. borders: cu_seqlens [sequences + 1], or null. Borders are not
// checked, as that would wait for the GPU: wrong ones give wrong numbers, but no access outside the arrays.
__device__ inline Span sequence_at(const int32_t* borders, int64_t sequences, int64_t length, int64_t b, int64_t t) {
    if (!borders) return {0, length, b};
    int64_t first = 0, last = sequences - 1;  // the last sequence that begins at or before t
    while (first < last) {
        const int64_t middle = (first + last + 1) / 2;
        if (borders[middle] <= t) first = middle;
        else last = middle - 1;
    }
    return {borders[first], borders[first + 1], first};
}

}  // namespace ultra

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

constexpr int kInFlight = 4;  // vectors that a thread asks for before it uses the first: 64 bytes

// V elements at a time along `fast`, the axis whose neighbours lie side by side in memory if V > 1.
template <typename T, int V, typename Use>
__device__ inline void read_vectors(const Window& w, bool along_time, Team team, const Use& use) {
    const int fast = along_time ? w.rows : w.channels, slow = along_time ? w.channels : w.rows;
    const int64_t fast_stride = along_time ? w.time : w.channel, slow_stride = along_time ? w.channel : w.time;
    const int vectors = ceil_div(fast, V), total = vectors * slow;
    const T* data = reinterpret_cast<const T*>(w.data);
    for (int begin = team.first; begin < total; begin += kInFlight * team.count) {
        Vector<T, V> got[kInFlight];
#pragma unroll
        for (int k = 0; k < kInFlight; ++k) {
            const int at = begin + k * team.count, f = at % vectors * V, s = at / vectors;
            if (at >= total) break;
            const T* p = data + f * fast_stride + s * slow_stride;
            if (f + V <= fast) got[k] = load<V>(p);
            else
#pragma unroll
                for (int i = 0; i < V; ++i)
                    if (f + i < fast) got[k].v[i] = p[i * fast_stride];
        }
#pragma unroll
        for (int k = 0; k < kInFlight; ++k) {
            const int at = begin + k * team.count, f = at % vectors * V, s = at / vectors;
            if (at >= total) break;
#pragma unroll
            for (int i = 0; i < V; ++i)
                if (f + i < fast) use(along_time ? f + i : s, along_time ? s : f + i, to_float(got[k].v[i]));
        }
    }
}

template <typename T, int V, typename Make>
__device__ inline void write_vectors(const Window& w, bool along_time, Team team, const Make& make) {
    const int fast = along_time ? w.rows : w.channels, slow = along_time ? w.channels : w.rows;
    const int64_t fast_stride = along_time ? w.time : w.channel, slow_stride = along_time ? w.channel : w.time;
    const int vectors = ceil_div(fast, V), total = vectors * slow;
    T* data = reinterpret_cast<T*>(w.data);
    for (int at = team.first; at < total; at += team.count) {
        const int f = at % vectors * V, s = at / vectors;
        Vector<float, V> x;
#pragma unroll
        for (int i = 0; i < V; ++i)
            x.v[i] = f + i < fast ? make(along_time ? f + i : s, along_time ? s : f + i) : 0.0f;
        T* p = data + f * fast_stride + s * slow_stride;
        if (f + V <= fast) store(p, narrow<T>(x));
        else
#pragma unroll
            for (int i = 0; i < V; ++i)
                if (f + i < fast) narrow(x.v[i], p + i * fast_stride);
    }
}

template <typename T> __device__ inline bool whole_vectors(const Window& w, bool along_time) {
    const int64_t fast = along_time ? w.time : w.channel, slow = along_time ? w.channel : w.time;
    return fast == 1 && (reinterpret_cast<uintptr_t>(w.data) | slow * (int64_t)sizeof(T)) % kVectorBytes == 0;
}

template <typename T, typename Use> __device__ inline void read_as(const Window& w, Team team, const Use& use) {
    const bool along_time = w.time == 1 && w.channel != 1;
    if (whole_vectors<T>(w, along_time)) read_vectors<T, kVectorBytes / sizeof(T)>(w, along_time, team, use);
    else read_vectors<T, 1>(w, along_time, team, use);
}
template <typename T, typename Make> __device__ inline void write_as(const Window& w, Team team, const Make& make) {
    const bool along_time = w.time == 1 && w.channel != 1;
    if (whole_vectors<T>(w, along_time)) write_vectors<T, kVectorBytes / sizeof(T)>(w, along_time, team, make);
    else write_vectors<T, 1>(w, along_time, team, make);
}

// use(row, channel, value) once for every element of the window, by one thread of the team.
template <typename Use> __device__ inline void read(const Window& w, Team team, const Use& use) {
    if (w.dtype == kBFloat16) read_as<__nv_bfloat16>(w, team, use);
    else if (w.dtype == kFloat16) read_as<__half>(w, team, use);
    else read_as<float>(w, team, use);
}
// Element (row, channel) = make(row, channel).
template <typename Make> __device__ inline void write(const Window& w, Team team, const Make& make) {
    if (w.dtype == kBFloat16) write_as<__nv_bfloat16>(w, team, make);
    else if (w.dtype == kFloat16) write_as<__half>(w, team, make);
    else write_as<float>(w, team, make);
}

// ---- gates ----------------------------------------------------------------------------------------------------------
constexpr float kLog2E = 1.44269504088896f;

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

// Tensors [B,D,L] of any strides, moved to and from tiles: float32 rows of neighbouring channels, one row per time step.
#pragma once

#include <stdint.h>

namespace ultra {

// Strides count elements. data is null for an absent tensor.
struct View {
    char* data;
    int64_t batch, channel, time;
    int dtype;
};

}  // namespace ultra

#ifdef ULTRA_ISA

#include "common/simd.h"

namespace ultra {
namespace ULTRA_ISA {

template <typename T>
static inline void load_tile(float* tile, int64_t width, const T* p, int64_t channel, int64_t time, int64_t channels,
                             int64_t rows) {
    if (channel == 1) {
        for (int64_t i = 0; i < rows; ++i) {
            int64_t c = 0;
            for (; c + kLanes <= channels; c += kLanes) store(tile + i * width + c, load(p + i * time + c));
            for (; c < channels; ++c) tile[i * width + c] = to_float(p[i * time + c]);
        }
    } else {
        for (int64_t c = 0; c < channels; ++c)
            for (int64_t i = 0; i < rows; ++i) tile[i * width + c] = to_float(p[c * channel + i * time]);
    }
    for (int64_t c = channels; c < width; ++c)
        for (int64_t i = 0; i < rows; ++i) tile[i * width + c] = 0.0f;
}

template <typename T>
static inline void store_tile(const float* tile, int64_t width, T* p, int64_t channel, int64_t time, int64_t channels,
                              int64_t rows) {
    if (channel == 1) {
        for (int64_t i = 0; i < rows; ++i) {
            int64_t c = 0;
            for (; c + kLanes <= channels; c += kLanes) store(p + i * time + c, load(tile + i * width + c));
            for (; c < channels; ++c) store_scalar(p + i * time + c, tile[i * width + c]);
        }
    } else {
        for (int64_t c = 0; c < channels; ++c)
            for (int64_t i = 0; i < rows; ++i) store_scalar(p + c * channel + i * time, tile[i * width + c]);
    }
}

// tile[i * width + c] = v[b, d + c, t + i * step] for i < rows, c < channels; 0 for channels <= c < width.
static inline void load_tile(float* tile, int64_t width, const View& v, int64_t b, int64_t d, int64_t t, int step,
                             int64_t channels, int64_t rows) {
    int64_t at = b * v.batch + d * v.channel + t * v.time;
    if (v.dtype == kBFloat16)
        load_tile(tile, width, (const BF16*)v.data + at, v.channel, step * v.time, channels, rows);
    else if (v.dtype == kFloat16)
        load_tile(tile, width, (const FP16*)v.data + at, v.channel, step * v.time, channels, rows);
    else
        load_tile(tile, width, (const float*)v.data + at, v.channel, step * v.time, channels, rows);
}

// The reverse: v[b, d + c, t + i * step] = tile[i * width + c].
static inline void store_tile(const float* tile, int64_t width, const View& v, int64_t b, int64_t d, int64_t t, int step,
                              int64_t channels, int64_t rows) {
    int64_t at = b * v.batch + d * v.channel + t * v.time;
    if (v.dtype == kBFloat16)
        store_tile(tile, width, (BF16*)v.data + at, v.channel, step * v.time, channels, rows);
    else if (v.dtype == kFloat16)
        store_tile(tile, width, (FP16*)v.data + at, v.channel, step * v.time, channels, rows);
    else
        store_tile(tile, width, (float*)v.data + at, v.channel, step * v.time, channels, rows);
}

}  // namespace ULTRA_ISA
}  // namespace ultra

#endif

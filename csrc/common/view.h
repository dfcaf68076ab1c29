// Tensors [B,D,L] of any strides, moved to and from tiles: float32 rows of neighbouring channels, a row per time step.
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

// Where a tile holds channel c of row i: at i * row + c / kLanes * vector + c % kLanes.
struct Tile {
    float* data;
    int64_t row, vector;
};

template <typename T>
static inline void load_tile(const Tile& to, const T* p, int64_t channel, int64_t time, int64_t channels, int64_t width,
                             int64_t rows) {
    if (channel == 1) {
        for (int64_t i = 0; i < rows; ++i) {
            const T* from = p + i * time;
            float* at = to.data + i * to.row;
            int64_t c = 0;
            for (; c + kLanes <= channels; c += kLanes, at += to.vector) store(at, load(from + c));
            if (c < channels) store(at, load_part(from + c, (int)(channels - c)));
        }
    } else {
        for (int64_t c = 0; c < channels; ++c) {
            const T* from = p + c * channel;
            float* at = to.data + c / kLanes * to.vector + c % kLanes;
            for (int64_t i = 0; i < rows; ++i) at[i * to.row] = to_float(from[i * time]);
        }
    }
    for (int64_t c = channels; c < width; ++c)
        for (int64_t i = 0; i < rows; ++i) to.data[i * to.row + c / kLanes * to.vector + c % kLanes] = 0.0f;
}

template <typename T>
static inline void store_tile(const Tile& from, T* p, int64_t channel, int64_t time, int64_t channels, int64_t rows) {
    if (channel == 1) {
        for (int64_t i = 0; i < rows; ++i) {
            T* to = p + i * time;
            const float* at = from.data + i * from.row;
            int64_t c = 0;
            for (; c + kLanes <= channels; c += kLanes, at += from.vector) store(to + c, load(at));
            if (c < channels) store_part(to + c, load(at), (int)(channels - c));
        }
    } else {
        for (int64_t c = 0; c < channels; ++c) {
            T* to = p + c * channel;
            const float* at = from.data + c / kLanes * from.vector + c % kLanes;
            for (int64_t i = 0; i < rows; ++i) store_scalar(to + i * time, at[i * from.row]);
        }
    }
}

// Row i, channel c of the tile = v[b, d + c, t + i * step] for i < rows, c < channels; 0 for channels <= c < width.
// width is a multiple of kLanes.
static inline void load_tile(const Tile& to, const View& v, int64_t b, int64_t d, int64_t t, int step, int64_t channels,
                             int64_t width, int64_t rows) {
    int64_t at = b * v.batch + d * v.channel + t * v.time;
    if (v.dtype == kBFloat16)
        load_tile(to, (const BF16*)v.data + at, v.channel, step * v.time, channels, width, rows);
    else if (v.dtype == kFloat16)
        load_tile(to, (const FP16*)v.data + at, v.channel, step * v.time, channels, width, rows);
    else
        load_tile(to, (const float*)v.data + at, v.channel, step * v.time, channels, width, rows);
}

// The reverse: v[b, d + c, t + i * step] = row i, channel c of the tile.
static inline void store_tile(const Tile& from, const View& v, int64_t b, int64_t d, int64_t t, int step,
                              int64_t channels, int64_t rows) {
    int64_t at = b * v.batch + d * v.channel + t * v.time;
    if (v.dtype == kBFloat16)
        store_tile(from, (BF16*)v.data + at, v.channel, step * v.time, channels, rows);
    else if (v.dtype == kFloat16)
        store_tile(from, (FP16*)v.data + at, v.channel, step * v.time, channels, rows);
    else
        store_tile(from, (float*)v.data + at, v.channel, step * v.time, channels, rows);
}

// Asks for `rows` rows of one vector of channels, which a later load_tile reads. Past the end of v it does nothing.
static inline void prefetch(const View& v, int64_t b, int64_t d, int64_t t, int step, int64_t rows) {
    if (!v.data || v.channel != 1) return;
    int64_t size = v.dtype == kFloat32 ? 4 : 2;
    const char* p = v.data + (b * v.batch + d + t * v.time) * size;
    for (int64_t i = 0; i < rows; ++i) __builtin_prefetch(p + i * step * v.time * size, 0, 2);
}

}  // namespace ULTRA_ISA
}  // namespace ultra

#endif

// Products of small float32 matrices that lie in cache: tiles whose rows are padded with zeros to whole vectors.
#pragma once

#include "common/simd.h"

namespace ultra {
namespace ULTRA_ISA {

// Sums held in registers: 12 of AVX2's 16, 24 of AVX-512's 32.
constexpr int kProductRows = 6;
constexpr int kProductVectors = kLanes == 16 ? 4 : 2;

static inline int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// The left factor: element (i, k) is data[i * row + k * inner]. A transposed tile has row = 1.
struct Factor {
    const float* data;
    int64_t row, inner;
};

// Where the product goes: element (i, j) is multiplied by by_row[i] and by_distance[j - i] where there are such, then
// added to data[i * row + j] or stored there.
struct Product {
    float* data;
    int64_t row;
    bool add = false;
    const float* by_row = nullptr;
    const float* by_distance = nullptr;
};

template <int rows, int vectors>
static inline void multiply_tile(int64_t inner, const Factor& a, const float* b, int64_t b_row, const Product& to,
                                 int64_t i, int64_t j) {
    vf sum[rows][vectors];
    for (int r = 0; r < rows; ++r)
        for (int v = 0; v < vectors; ++v) sum[r][v] = splat(0.0f);
    const float* left = a.data + i * a.row;
    const float* right = b + j;
    for (int64_t k = 0; k < inner; ++k, left += a.inner, right += b_row) {
        vf x[vectors];
        for (int v = 0; v < vectors; ++v) x[v] = load(right + v * kLanes);
        for (int r = 0; r < rows; ++r) {
            const vf factor = splat(left[r * a.row]);
            for (int v = 0; v < vectors; ++v) sum[r][v] += factor * x[v];
        }
    }
    for (int r = 0; r < rows; ++r) {
        for (int v = 0; v < vectors; ++v) {
            vf x = sum[r][v];
            if (to.by_distance) x *= load(to.by_distance + j + v * kLanes - (i + r));
            if (to.by_row) x *= to.by_row[i + r];
            float* at = to.data + (i + r) * to.row + j + v * kLanes;
            store(at, to.add ? load(at) + x : x);
        }
    }
}

template <int vectors>
static inline void multiply_columns(int64_t rows, int64_t inner, const Factor& a, const float* b, int64_t b_row,
                                    const Product& to, int64_t j) {
    int64_t i = 0;
    for (; i + kProductRows <= rows; i += kProductRows)
        multiply_tile<kProductRows, vectors>(inner, a, b, b_row, to, i, j);
    switch (rows - i) {
        case 5: return multiply_tile<5, vectors>(inner, a, b, b_row, to, i, j);
        case 4: return multiply_tile<4, vectors>(inner, a, b, b_row, to, i, j);
        case 3: return multiply_tile<3, vectors>(inner, a, b, b_row, to, i, j);
        case 2: return multiply_tile<2, vectors>(inner, a, b, b_row, to, i, j);
        case 1: return multiply_tile<1, vectors>(inner, a, b, b_row, to, i, j);
    }
}

// to [rows, columns] = a [rows, inner] b [inner, columns]; b's rows are b_row floats apart.
static inline void multiply(int64_t rows, int64_t columns, int64_t inner, const Factor& a, const float* b,
                            int64_t b_row, const Product& to) {
    int64_t j = 0;
    for (; j + kProductVectors * kLanes <= padded(columns); j += kProductVectors * kLanes)
        multiply_columns<kProductVectors>(rows, inner, a, b, b_row, to, j);
    for (; j < padded(columns); j += kLanes) multiply_columns<1>(rows, inner, a, b, b_row, to, j);
}

// to [columns, padded(rows)] = the transpose of from [rows, columns]; the padding becomes 0.
static inline void transpose(int64_t rows, int64_t columns, const float* from, int64_t from_row, float* to) {
    const int64_t to_row = padded(rows);
    for (int64_t i = 0; i < rows; i += kLanes) {
        const int lanes = rows - i < kLanes ? (int)(rows - i) : kLanes;
        for (int64_t c = 0; c < columns; ++c) {
            vf x = splat(0.0f);
            if (lanes == kLanes)
                for (int r = 0; r < kLanes; ++r) x[r] = from[(i + r) * from_row + c];
            else
                for (int r = 0; r < lanes; ++r) x[r] = from[(i + r) * from_row + c];
            store(to + c * to_row + i, x);
        }
    }
}

// to [rows, width] = by_row[i] * from, both with rows of `width` floats, a multiple of kLanes.
static inline void scale_rows(int64_t rows, int64_t width, const float* from, const float* by_row, float* to) {
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < width; j += kLanes) store(to + i * width + j, load(from + i * width + j) * by_row[i]);
}

}  // namespace ULTRA_ISA
}  // namespace ultra

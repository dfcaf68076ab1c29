// Contract: ultra_kernels/layer_norm/op.py
//
// Bound by memory, so a row is read from there once, and from a cache in the passes after. Row by row: several side by
// side would share what is loaded of the parameters, but in float32 took up to 1.7 times as long at D = 768, where
// their streams miss the first cache.
#include "layer_norm/layer_norm.h"

#include "common/norm_rows.h"

namespace ultra {
namespace ULTRA_ISA {

// The normalised row is (x - mean) * rstd + shift. A float32 mean of 1e4 is off by up to 5e-4: shift is what it lacks.
struct Numbers { float mean, rstd, shift; };
static_assert(sizeof(Numbers) == 3 * sizeof(float), "a row of stats");

static inline vf normalised(vf x, const Numbers& row) { return (x - row.mean) * row.rstd + row.shift; }

// body(d, n, chain) for every vector of a row: n is kLanes, and less for what is left at the end; `chain` is one of
// kChains sums in turn, since additions to one sum wait for each other.
constexpr int kChains = 4;
template <typename Body> static inline void for_vectors(int64_t D, const Body& body) {
    int64_t d = 0;
    for (; d + kChains * kLanes <= D; d += kChains * kLanes)
        for (int chain = 0; chain < kChains; ++chain) body(d + chain * kLanes, (int64_t)kLanes, chain);
    for (; d + kLanes <= D; d += kLanes) body(d, (int64_t)kLanes, 0);
    if (d < D) body(d, D - d, 0);
}
#define ULTRA_VECTOR [&](int64_t d, int64_t n, int chain) __attribute__((always_inline))
#define ULTRA_VECTOR_ALONE [&](int64_t d, int64_t n, int) __attribute__((always_inline))

static inline float mean(const vf chains[kChains], int64_t D) {
    return sum((chains[0] + chains[1]) + (chains[2] + chains[3])) / (float)D;
}

template <typename T>
static inline void forward_row(const T* x, const float* weight, const float* bias, T* y, float* stats, int64_t D,
                               float eps) {
    vf total[kChains] = {}, first[kChains] = {}, second[kChains] = {};
    Numbers row;  // not yet in memory, where y might lie over them
    for_vectors(D, ULTRA_VECTOR { total[chain] += load_upto(x + d, n); });
    row.mean = mean(total, D);
    for_vectors(D, ULTRA_VECTOR {
        const vf v = load_upto(x + d, n, row.mean) - row.mean;
        __builtin_prefetch(x + D + d);  // of the next row; a sixth of the time at D = 768
        first[chain] += v;
        second[chain] += v * v;
    });
    const float rest = mean(first, D), square = mean(second, D) - rest * rest;
    row.rstd = 1.0f / __builtin_sqrtf((square < 0.0f ? 0.0f : square) + eps);  // below 0: constant rows, by rounding
    row.shift = -rest * row.rstd;
    for_vectors(D, ULTRA_VECTOR_ALONE {
        const vf v = normalised(load_upto(x + d, n), row);
        store_upto(y + d, load_upto(weight + d, n) * v + load_upto(bias + d, n), n);
    });
    memcpy(stats, &row, sizeof row);
}

template <typename T>
static void forward(const T* x, const T* residual, const float* weight, const float* bias, T* y, T* s, float* stats,
                    int64_t rows, int64_t D, float eps, int threads) {
    for_rows(rows, threads, [&](int64_t row) {
        const int64_t at = row * D;
        if (residual) add_row(x + at, residual + at, s + at, D);
        forward_row((residual ? s : x) + at, weight, bias, y + at, stats + 3 * row, D, eps);
    });
}

// With g = dy * weight: dx = rstd * (g - mean(g) - normalised * mean(g * normalised)) + ds.
template <typename T>
static inline void backward_row(const T* dy, const T* ds, const T* x, const float* stats, const float* weight, T* dx,
                                float* dweight, float* dbias, int64_t D) {
    vf first[kChains] = {}, second[kChains] = {};
    Numbers row;
    memcpy(&row, stats, sizeof row);
    for_vectors(D, ULTRA_VECTOR {
        const vf g = load_upto(dy + d, n), v = normalised(load_upto(x + d, n), row), gw = g * load_upto(weight + d, n);
        store_upto(dweight + d, load_upto(dweight + d, n) + g * v, n);
        store_upto(dbias + d, load_upto(dbias + d, n) + g, n);
        first[chain] += gw;
        second[chain] += gw * v;
    });
    const float level = mean(first, D), slope = mean(second, D);
    for_vectors(D, ULTRA_VECTOR_ALONE {
        const vf g = load_upto(dy + d, n) * load_upto(weight + d, n), v = normalised(load_upto(x + d, n), row);
        store_upto(dx + d, row.rstd * (g - level - slope * v) + load_direct(ds, d, n), n);
    });
}

template <typename T>
static void backward(const T* dy, const T* ds, const T* x, const float* stats, const float* weight, T* dx,
                     float* dweight, float* dbias, float* scratch, int64_t rows, int64_t D, int threads) {
    for_row_blocks(rows, threads, [&](int64_t begin, int64_t end, int64_t block) {
        float* dw = scratch + block * 2 * D;
        for (int64_t i = 0; i < 2 * D; ++i) dw[i] = 0.0f;
        for (int64_t row = begin; row < end; ++row) {
            const int64_t at = row * D;
            backward_row(dy + at, ds ? ds + at : nullptr, x + at, stats + 3 * row, weight, dx + at, dw, dw + D, D);
        }
    });
    sum_blocks(scratch, row_blocks(rows), 2 * D, dweight, dbias, D);
}

void layer_norm_forward(const void* x, const void* residual, const float* weight, const float* bias, void* y, void* s,
                        float* stats, int64_t rows, int64_t D, float eps, int dtype, int threads) {
    for_dtype(dtype, [&](auto* t) {
        forward(as(t, x), as(t, residual), weight, bias, as(t, y), as(t, s), stats, rows, D, eps, threads);
    });
}

void layer_norm_backward(const void* dy, const void* ds, const void* x, const float* stats, const float* weight,
                         void* dx, float* dweight, float* dbias, float* scratch, int64_t rows, int64_t D, int dtype,
                         int threads) {
    for_dtype(dtype, [&](auto* t) {
        backward(as(t, dy), as(t, ds), as(t, x), stats, weight, as(t, dx), dweight, dbias, scratch, rows,
                 D, threads);
    });
}

}  // namespace ULTRA_ISA
}  // namespace ultra

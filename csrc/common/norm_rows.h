// What norms over contiguous rows of D elements share: ends of rows, the residual, sums over rows.
#pragma once

#include "common/parallel.h"
#include "common/simd.h"

namespace ultra {
namespace ULTRA_ISA {

// The vector at p, of which only `n` elements exist when n < kLanes; the others read as `fill` and are not written.
template <typename T> static inline vf load_upto(const T* p, int64_t n, float fill = 0.0f) {
    return n >= kLanes ? load(p) : load_part(p, (int)n, fill);
}
template <typename T> static inline void store_upto(T* p, vf v, int64_t n) {
    if (n >= kLanes) store(p, v);
    else store_part(p, v, (int)n);
}

// body(pointer to T) for the T that dtype names; as() gives an address that type.
template <typename Body> static inline void for_dtype(int dtype, const Body& body) {
    if (dtype == kBFloat16) body((BF16*)nullptr);
    else if (dtype == kFloat16) body((FP16*)nullptr);
    else body((float*)nullptr);
}
template <typename T> static inline T* as(T*, void* p) { return (T*)p; }
template <typename T> static inline const T* as(T*, const void* p) { return (const T*)p; }

// body(row) for rows that do not depend on each other. Tasks of 16 rows or more, which at 768 floats are 48 KiB: long
// against their start-up. Longer ones where each thread has eight left: neighbours in memory are read 1.2 times as
// fast.
template <typename Body> static inline void for_rows(int64_t rows, int threads, const Body& body) {
    const int64_t share = rows / (8 * threads), each = share < 16 ? 16 : share;
    parallel_for((rows + each - 1) / each, threads, [&](int64_t task) {
        const int64_t end = (task + 1) * each < rows ? (task + 1) * each : rows;
        for (int64_t row = task * each; row < end; ++row) body(row);
    });
}

// s = x + residual, rounded to T: the norm then reads s, from a cache.
template <typename T> static inline void add_row(const T* x, const T* residual, T* s, int64_t D) {
    for (int64_t d = 0; d < D; d += kLanes)
        store_upto(s + d, load_upto(x + d, D - d) + load_upto(residual + d, D - d), D - d);
}

// The gradient that reached the sum directly, beside that through the norm; null where there is none.
template <typename T> static inline vf load_direct(const T* ds, int64_t at, int64_t n) {
    return ds ? load_upto(ds + at, n) : splat(0.0f);
}

// parts: `blocks` times `stride` floats, which start with dweight [D] and dbias [D] of a row block. Adds them in order.
static inline void sum_blocks(const float* parts, int64_t blocks, int64_t stride, float* dweight, float* dbias,
                              int64_t D) {
    for (int64_t d = 0; d < D; ++d) dweight[d] = dbias[d] = 0.0f;
    for (int64_t block = 0; block < blocks; ++block) {
        const float* part = parts + block * stride;
        for (int64_t d = 0; d < D; ++d) dweight[d] += part[d];
        for (int64_t d = 0; d < D; ++d) dbias[d] += part[D + d];
    }
}

}  // namespace ULTRA_ISA
}  // namespace ultra

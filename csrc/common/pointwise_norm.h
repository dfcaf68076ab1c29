// y = weight * f(alpha * x + shift) + bias over rows of D elements, forward and backward, for any f given as
//   struct F { static vf value(vf u);  static vf slope(vf u, vf value); };      slope = f'(u), given f(u)
// DyT (f = tanh, shift = 0) and Derf (f = erf) are this. Rows are contiguous; weight and bias are float32 [D].
#pragma once

#include "common/parallel.h"
#include "common/row_blocks.h"
#include "common/simd.h"

namespace ultra {
namespace ULTRA_ISA {

// The vector at p, of which only `n` elements exist when n < kLanes; the others read as zero and are not written.
template <typename T> static inline vf load_upto(const T* p, int64_t n) {
    return n >= kLanes ? load(p) : load_part(p, (int)n);
}
template <typename T> static inline void store_upto(T* p, vf v, int64_t n) {
    if (n >= kLanes) store(p, v);
    else store_part(p, v, (int)n);
}

constexpr int64_t kRowsPerTask = 16;  // 16 rows of 768 floats are 48 KiB: a task is long against its start-up

template <typename F, typename T>
static void pointwise_norm_rows(const T* x, float alpha, float shift, const float* weight, const float* bias, T* y,
                                int64_t rows, int64_t D, int threads) {
    parallel_for((rows + kRowsPerTask - 1) / kRowsPerTask, threads, [&](int64_t task) {
        int64_t end = (task + 1) * kRowsPerTask < rows ? (task + 1) * kRowsPerTask : rows;
        for (int64_t row = task * kRowsPerTask; row < end; ++row) {
            const T* in = x + row * D;
            T* out = y + row * D;
            for (int64_t d = 0; d < D; d += kLanes) {
                vf t = F::value(alpha * load_upto(in + d, D - d) + shift);
                store_upto(out + d, load_upto(weight + d, D - d) * t + load_upto(bias + d, D - d), D - d);
            }
        }
    });
}

// sums: [alpha, shift]. scratch: row_blocks(rows) * (2 * D + 2) floats.
template <typename F, typename T>
static void pointwise_norm_rows_backward(const T* dy, const T* x, float alpha, float shift, const float* weight, T* dx,
                                         float* dweight, float* dbias, float* sums, float* scratch, int64_t rows,
                                         int64_t D, int threads) {
    int64_t blocks = row_blocks(rows);
    int64_t stride = 2 * D + 2;
    parallel_for(blocks, threads, [&](int64_t block) {
        float* dw = scratch + block * stride;
        float* db = dw + D;
        for (int64_t i = 0; i < stride; ++i) dw[i] = 0.0f;
        int64_t begin = rows * block / blocks, end = rows * (block + 1) / blocks;
        double alpha_sum = 0.0, shift_sum = 0.0;  // one number over rows * D terms: float32 would lose digits
        for (int64_t row = begin; row < end; ++row) {
            const T* g_row = dy + row * D;
            const T* x_row = x + row * D;
            T* dx_row = dx + row * D;
            vf alpha_row = splat(0.0f), shift_row = splat(0.0f);
            for (int64_t d = 0; d < D; d += kLanes) {
                int64_t n = D - d;
                vf g = load_upto(g_row + d, n), v = load_upto(x_row + d, n), w = load_upto(weight + d, n);
                vf u = alpha * v + shift;
                vf t = F::value(u);
                vf slope = g * w * F::slope(u, t);  // zero in the lanes past n: g is
                store_upto(dx_row + d, alpha * slope, n);
                store_upto(dw + d, load_upto(dw + d, n) + g * t, n);
                store_upto(db + d, load_upto(db + d, n) + g, n);
                alpha_row += slope * v;
                shift_row += slope;
            }
            alpha_sum += sum(alpha_row);
            shift_sum += sum(shift_row);
        }
        dw[2 * D] = (float)alpha_sum;
        dw[2 * D + 1] = (float)shift_sum;
    });
    for (int64_t d = 0; d < D; ++d) dweight[d] = dbias[d] = 0.0f;
    double alpha_sum = 0.0, shift_sum = 0.0;
    for (int64_t block = 0; block < blocks; ++block) {
        const float* part = scratch + block * stride;
        for (int64_t d = 0; d < D; ++d) dweight[d] += part[d];
        for (int64_t d = 0; d < D; ++d) dbias[d] += part[D + d];
        alpha_sum += part[2 * D];
        shift_sum += part[2 * D + 1];
    }
    sums[0] = (float)alpha_sum;
    sums[1] = (float)shift_sum;
}

template <typename F>
static void pointwise_norm_forward(const void* x, float alpha, float shift, const float* weight, const float* bias,
                                   void* y, int64_t rows, int64_t D, int dtype, int threads) {
    auto run = [&](auto* in, auto* out) {
        pointwise_norm_rows<F>(in, alpha, shift, weight, bias, out, rows, D, threads);
    };
    if (dtype == kBFloat16) run((const BF16*)x, (BF16*)y);
    else if (dtype == kFloat16) run((const FP16*)x, (FP16*)y);
    else run((const float*)x, (float*)y);
}

template <typename F>
static void pointwise_norm_backward(const void* dy, const void* x, float alpha, float shift, const float* weight,
                                    void* dx, float* dweight, float* dbias, float* sums, float* scratch, int64_t rows,
                                    int64_t D, int dtype, int threads) {
    auto run = [&](auto* g, auto* in, auto* out) {
        pointwise_norm_rows_backward<F>(g, in, alpha, shift, weight, out, dweight, dbias, sums, scratch, rows, D,
                                        threads);
    };
    if (dtype == kBFloat16) run((const BF16*)dy, (const BF16*)x, (BF16*)dx);
    else if (dtype == kFloat16) run((const FP16*)dy, (const FP16*)x, (FP16*)dx);
    else run((const float*)dy, (const float*)x, (float*)dx);
}

}  // namespace ULTRA_ISA
}  // namespace ultra

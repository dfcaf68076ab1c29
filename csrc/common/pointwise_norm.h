// y = weight * f(alpha * x + shift) + bias over rows of D elements, forward and backward, for any f given as
//   struct F { static vf value(vf u);  static vf slope(vf u, vf value); };      slope = f'(u), given f(u)
// DyT (f = tanh, shift = 0) and Derf (f = erf) are this. Rows are contiguous; weight and bias are float32 [D].
#pragma once

#include "common/norm_rows.h"

namespace ultra {
namespace ULTRA_ISA {

template <typename F, typename T>
static void pointwise_norm_rows(const T* x, const T* residual, float alpha, float shift, const float* weight,
                                const float* bias, T* y, T* s, int64_t rows, int64_t D, int threads) {
    for_rows(rows, threads, [&](int64_t row) {
        const T* in = x + row * D;
        T* out = y + row * D;
        if (residual) {
            add_row(in, residual + row * D, s + row * D, D);
            in = s + row * D;
        }
        for (int64_t d = 0; d < D; d += kLanes) {
            vf t = F::value(alpha * load_upto(in + d, D - d) + shift);
            store_upto(out + d, load_upto(weight + d, D - d) * t + load_upto(bias + d, D - d), D - d);
        }
    });
}

// sums: [alpha, shift]. scratch: row_blocks(rows) * (2 * D + 2) floats.
template <typename F, typename T>
static void pointwise_norm_rows_backward(const T* dy, const T* ds, const T* x, float alpha, float shift,
                                         const float* weight, T* dx, float* dweight, float* dbias, float* sums,
                                         float* scratch, int64_t rows, int64_t D, int threads) {
    int64_t blocks = row_blocks(rows);
    int64_t stride = 2 * D + 2;
    for_row_blocks(rows, threads, [&](int64_t begin, int64_t end, int64_t block) {
        float* dw = scratch + block * stride;
        float* db = dw + D;
        for (int64_t i = 0; i < stride; ++i) dw[i] = 0.0f;
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
                store_upto(dx_row + d, alpha * slope + load_direct(ds, row * D + d, n), n);
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
    sum_blocks(scratch, blocks, stride, dweight, dbias, D);
    double alpha_sum = 0.0, shift_sum = 0.0;
    for (int64_t block = 0; block < blocks; ++block) {
        alpha_sum += scratch[block * stride + 2 * D];
        shift_sum += scratch[block * stride + 2 * D + 1];
    }
    sums[0] = (float)alpha_sum;
    sums[1] = (float)shift_sum;
}

template <typename F>
static void pointwise_norm_forward(const void* x, const void* residual, float alpha, float shift, const float* weight,
                                   const float* bias, void* y, void* s, int64_t rows, int64_t D, int dtype,
                                   int threads) {
    for_dtype(dtype, [&](auto* t) {
        pointwise_norm_rows<F>(as(t, x), as(t, residual), alpha, shift, weight, bias, as(t, y), as(t, s), rows, D,
                               threads);
    });
}

template <typename F>
static void pointwise_norm_backward(const void* dy, const void* ds, const void* x, float alpha, float shift,
                                    const float* weight, void* dx, float* dweight, float* dbias, float* sums,
                                    float* scratch, int64_t rows, int64_t D, int dtype, int threads) {
    for_dtype(dtype, [&](auto* t) {
        pointwise_norm_rows_backward<F>(as(t, dy), as(t, ds), as(t, x), alpha, shift, weight, as(t, dx), dweight,
                                        dbias, sums, scratch, rows, D, threads);
    });
}

}  // namespace ULTRA_ISA
}  // namespace ultra

// Contract: ultra_kernels/dyt/op.py
#include "dyt/dyt.h"

#include "common/parallel.h"
#include "common/simd.h"

namespace ultra {
namespace ULTRA_ISA {

constexpr int64_t kRowsPerTask = 16;  // 16 rows of 768 floats are 48 KiB: a task is long against its start-up

template <typename T>
static void forward(const T* x, float alpha, const float* weight, const float* bias, T* y, int64_t rows, int64_t D,
                    int threads) {
    parallel_for((rows + kRowsPerTask - 1) / kRowsPerTask, threads, [&](int64_t task) {
        int64_t end = (task + 1) * kRowsPerTask < rows ? (task + 1) * kRowsPerTask : rows;
        for (int64_t row = task * kRowsPerTask; row < end; ++row) {
            const T* in = x + row * D;
            T* out = y + row * D;
            int64_t d = 0;
            for (; d + kLanes <= D; d += kLanes)
                store(out + d, load(weight + d) * tanh(alpha * load(in + d)) + load(bias + d));
            if (int rest = (int)(D - d)) {
                vf t = tanh(alpha * load_part(in + d, rest));
                store_part(out + d, load_part(weight + d, rest) * t + load_part(bias + d, rest), rest);
            }
        }
    });
}

template <typename T>
static void backward(const T* dy, const T* x, float alpha, const float* weight, T* dx, float* dalpha, float* dweight,
                     float* dbias, float* scratch, int64_t rows, int64_t D, int threads) {
    int64_t blocks = dyt_blocks(rows);
    int64_t stride = 2 * D + 1;
    parallel_for(blocks, threads, [&](int64_t block) {
        float* dw = scratch + block * stride;
        float* db = dw + D;
        for (int64_t i = 0; i < stride; ++i) dw[i] = 0.0f;
        int64_t begin = rows * block / blocks, end = rows * (block + 1) / blocks;
        double alpha_sum = 0.0;  // one number over rows * D terms: float32 would lose digits
        for (int64_t row = begin; row < end; ++row) {
            const T* g_row = dy + row * D;
            const T* x_row = x + row * D;
            T* dx_row = dx + row * D;
            vf alpha_row = splat(0.0f);
            int64_t d = 0;
            for (; d + kLanes <= D; d += kLanes) {
                vf g = load(g_row + d), v = load(x_row + d), w = load(weight + d);
                vf t = tanh(alpha * v);
                vf slope = g * w * (1.0f - t * t);
                store(dx_row + d, alpha * slope);
                store(dw + d, load(dw + d) + g * t);
                store(db + d, load(db + d) + g);
                alpha_row += slope * v;
            }
            if (int rest = (int)(D - d)) {
                vf g = load_part(g_row + d, rest), v = load_part(x_row + d, rest), w = load_part(weight + d, rest);
                vf t = tanh(alpha * v);
                vf slope = g * w * (1.0f - t * t);
                store_part(dx_row + d, alpha * slope, rest);
                store_part(dw + d, load_part(dw + d, rest) + g * t, rest);
                store_part(db + d, load_part(db + d, rest) + g, rest);
                alpha_row += slope * v;  // the lanes past `rest` are zero: g is
            }
            alpha_sum += sum(alpha_row);
        }
        scratch[block * stride + 2 * D] = (float)alpha_sum;
    });
    for (int64_t d = 0; d < D; ++d) dweight[d] = dbias[d] = 0.0f;
    double alpha_sum = 0.0;
    for (int64_t block = 0; block < blocks; ++block) {
        const float* part = scratch + block * stride;
        for (int64_t d = 0; d < D; ++d) dweight[d] += part[d];
        for (int64_t d = 0; d < D; ++d) dbias[d] += part[D + d];
        alpha_sum += part[2 * D];
    }
    *dalpha = (float)alpha_sum;
}

void dyt_forward(const void* x, float alpha, const float* weight, const float* bias, void* y, int64_t rows, int64_t D,
                 int dtype, int threads) {
    if (dtype == kBFloat16) forward((const BF16*)x, alpha, weight, bias, (BF16*)y, rows, D, threads);
    else if (dtype == kFloat16) forward((const FP16*)x, alpha, weight, bias, (FP16*)y, rows, D, threads);
    else forward((const float*)x, alpha, weight, bias, (float*)y, rows, D, threads);
}

void dyt_backward(const void* dy, const void* x, float alpha, const float* weight, void* dx, float* dalpha,
                  float* dweight, float* dbias, float* scratch, int64_t rows, int64_t D, int dtype, int threads) {
    if (dtype == kBFloat16)
        backward((const BF16*)dy, (const BF16*)x, alpha, weight, (BF16*)dx, dalpha, dweight, dbias, scratch, rows, D, threads);
    else if (dtype == kFloat16)
        backward((const FP16*)dy, (const FP16*)x, alpha, weight, (FP16*)dx, dalpha, dweight, dbias, scratch, rows, D, threads);
    else
        backward((const float*)dy, (const float*)x, alpha, weight, (float*)dx, dalpha, dweight, dbias, scratch, rows, D, threads);
}

}  // namespace ULTRA_ISA
}  // namespace ultra

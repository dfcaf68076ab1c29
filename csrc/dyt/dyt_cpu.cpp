// Contract: ultra_kernels/dyt/op.py
#include "dyt/dyt.h"

#include "common/pointwise_norm.h"

namespace ultra {
namespace ULTRA_ISA {

struct Tanh {
    static vf value(vf u) { return tanh(u); }
    static vf slope(vf, vf t) { return 1.0f - t * t; }
};

void dyt_forward(const void* x, const void* residual, float alpha, const float* weight, const float* bias, void* y,
                 void* s, int64_t rows, int64_t D, int dtype, int threads) {
    pointwise_norm_forward<Tanh>(x, residual, alpha, 0.0f, weight, bias, y, s, rows, D, dtype, threads);
}

void dyt_backward(const void* dy, const void* ds, const void* x, float alpha, const float* weight, void* dx,
                  float* dalpha, float* dweight, float* dbias, float* scratch, int64_t rows, int64_t D, int dtype,
                  int threads) {
    float sums[2];
    pointwise_norm_backward<Tanh>(dy, ds, x, alpha, 0.0f, weight, dx, dweight, dbias, sums, scratch, rows, D, dtype,
                                  threads);
    *dalpha = sums[0];
}

}  // namespace ULTRA_ISA
}  // namespace ultra

// Contract: ultra_kernels/derf/op.py
#include "derf/derf.h"

#include "common/pointwise_norm.h"

namespace ultra {
namespace ULTRA_ISA {

struct Erf {
    static vf value(vf u) { return erf(u); }
    static vf slope(vf u, vf) { return 1.1283791671f * exp(-(u * u)); }  // 2/√π e^(-u²)
};

void derf_forward(const void* x, const void* residual, float alpha, float shift, const float* weight,
                  const float* bias, void* y, void* s, int64_t rows, int64_t D, int dtype, int threads) {
    pointwise_norm_forward<Erf>(x, residual, alpha, shift, weight, bias, y, s, rows, D, dtype, threads);
}

void derf_backward(const void* dy, const void* ds, const void* x, float alpha, float shift, const float* weight,
                   void* dx, float* dalpha_dshift, float* dweight, float* dbias, float* scratch, int64_t rows,
                   int64_t D, int dtype, int threads) {
    pointwise_norm_backward<Erf>(dy, ds, x, alpha, shift, weight, dx, dweight, dbias, dalpha_dshift, scratch, rows, D,
                                 dtype, threads);
}

}  // namespace ULTRA_ISA
}  // namespace ultra

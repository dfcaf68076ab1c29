// Contract: ultra_kernels/dyt/op.py. Rows are contiguous: x, y, dy, dx are [rows, D] of `dtype`, rows and D at least 1;
// weight and bias are float32 [D], alpha float32 [1]. All addresses are on the device.
#include "common/pointwise_norm.cuh"

namespace {

struct Tanh {
    static constexpr bool kShift = false;
    // An odd polynomial below 0.625, where 1 - 2/(e^2u + 1) would lose the relative precision (common/simd.h).
    __device__ static float value(float u) {
        const float a = fabsf(u), s = u * u;
        const float big = 1.0f - __fdividef(2.0f, ultra::fast_exp2(a * 2.8853900817779268f) + 1.0f);
        float p = s * -5.70498872745e-3f + 2.06390887954e-2f;
        p = p * s - 5.37397155531e-2f;
        p = p * s + 1.33314422036e-1f;
        p = p * s - 3.33332819422e-1f;
        return ultra::select_less(a, 0.625f, p * s * u + u, copysignf(big, u));
    }
    __device__ static float slope(float, float value) { return 1.0f - value * value; }
};

}  // namespace

// residual and s: like x and y, or null.
ULTRA_EXPORT int dyt_forward(const void* x, const void* residual, const float* alpha, const float* weight,
                             const float* bias, void* y, void* s, int64_t rows, int64_t D, int64_t dtype,
                             void* stream) {
    return ultra::pointwise_norm_forward<Tanh>(x, residual, alpha, nullptr, weight, bias, y, s, rows, D, dtype, stream);
}

// Floats of scratch memory for dyt_backward.
ULTRA_EXPORT int64_t dyt_scratch(int64_t rows, int64_t D) { return ultra::norm_scratch(rows, D); }

// x: what was normalised; ds: like dy, or null.
// dweight, dbias: [D], dalpha: [1], all float32 and written, not added to.
ULTRA_EXPORT int dyt_backward(const void* dy, const void* ds, const void* x, const float* alpha, const float* weight,
                              void* dx, float* dalpha, float* dweight, float* dbias, float* scratch, int64_t rows,
                              int64_t D, int64_t dtype, void* stream) {
    return ultra::pointwise_norm_backward<Tanh>(dy, ds, x, alpha, nullptr, weight, dx, dalpha, nullptr, dweight, dbias,
                                                scratch, rows, D, dtype, stream);
}

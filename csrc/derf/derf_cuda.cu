// Contract: ultra_kernels/derf/op.py. Rows are contiguous: x, y, dy, dx are [rows, D] of `dtype`, rows and D at least 1;
// weight and bias are float32 [D], alpha and shift float32 [1]. All addresses are on the device.
#include "common/pointwise_norm.cuh"

namespace {

struct Erf {
    static constexpr bool kShift = true;
    // The fits of common/simd.h: an odd polynomial, and 1 - 2^q(|u|) with q fitted to log2 of erfc.
    __device__ static float value(float u) {
        const float a = fabsf(u) > 4.0f ? 4.0f : fabsf(u), s = u * u;
        float q = a * 2.8997636e-4f - 4.4612354e-3f;
        q = q * a + 3.2345540e-2f;
        q = q * a - 1.5051278e-1f;
        q = q * a - 9.1861767e-1f;
        q = q * a - 1.6272678f;
        q = q * a - 1.9270746e-4f;
        const float big = 1.0f - ultra::fast_exp2(q);
        float p = s * -6.2032725e-4f + 5.0321850e-3f;
        p = p * s - 2.6791466e-2f;
        p = p * s + 1.1282455e-1f;
        p = p * s - 3.7612550e-1f;
        p = p * s + 1.2837915e-1f;
        return ultra::select_less(a, 0.875f, p * u + u, copysignf(big, u));
    }
    __device__ static float slope(float u, float) {  // 2/√π e^(-u²)
        return 1.1283791671f * ultra::fast_exp2(u * u * -1.4426950408889634f);
    }
};

}  // namespace

// residual and s: like x and y, or null.
ULTRA_EXPORT int derf_forward(const void* x, const void* residual, const float* alpha, const float* shift,
                              const float* weight, const float* bias, void* y, void* s, int64_t rows, int64_t D,
                              int64_t dtype, void* stream) {
    return ultra::pointwise_norm_forward<Erf>(x, residual, alpha, shift, weight, bias, y, s, rows, D, dtype, stream);
}

// Floats of scratch memory for derf_backward.
ULTRA_EXPORT int64_t derf_scratch(int64_t rows, int64_t D) { return ultra::norm_scratch(rows, D); }

// x: what was normalised; ds: like dy, or null.
// dweight, dbias: [D], dalpha_dshift: [2], all float32 and written, not added to.
ULTRA_EXPORT int derf_backward(const void* dy, const void* ds, const void* x, const float* alpha, const float* shift,
                               const float* weight, void* dx, float* dalpha_dshift, float* dweight, float* dbias,
                               float* scratch, int64_t rows, int64_t D, int64_t dtype, void* stream) {
    return ultra::pointwise_norm_backward<Erf>(dy, ds, x, alpha, shift, weight, dx, dalpha_dshift, dalpha_dshift + 1,
                                               dweight, dbias, scratch, rows, D, dtype, stream);
}

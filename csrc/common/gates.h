// 2^x for decay products, and the gates of state-space layers.
#pragma once

#include "common/simd.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace ultra {
namespace ULTRA_ISA {

// 1.5 * 2^23: added to a number, it leaves the nearest integer in the low mantissa bits. The bias of the exponent is in
// it already, so that shifting them into place gives 2^n, and 0 for n = -127.
constexpr float kRounding = 12582912.0f + 127.0f;

// 2^x for -127 <= x <= 128, the values of exp2.
static inline vf exp2_bounded(vf x) {
#if defined(__AVX512F__)
    vf n = (vf)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    vf r = x - n;
#else
    vf shifted = x + kRounding;
    vf r = x - (shifted - kRounding);
#endif
    vf p = splat(1.3264727247e-3f);
    p = p * r + 9.6715126881e-3f;
    p = p * r + 5.5507337436e-2f;
    p = p * r + 2.4022242085e-1f;
    p = p * r + 6.9314697760e-1f;
    p = p * r + 1.0f;
#if defined(__AVX512F__)
    return (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    return p * as_float(as_int(shifted) << 23);
#endif
}

// 2^x, 2.2 ulp, exactly 1 at 0; 0 below -126.5 (with AVX-512 subnormal), infinity above 127.5, NaN stays NaN.
// x = n + r, |r| <= 1/2; the degree-5 minimax polynomial in r errs by 9.2e-8.
static inline vf exp2(vf x) {
#if !defined(__AVX512F__)
    x = min(splat(128.0f), max(splat(-127.0f), x));
#endif
    return exp2_bounded(x);
}

// e^-a for a >= 0, 2 ulp, 0 from 87.7 on (with AVX-512 from 104): like exp, without the tests for the other side.
static inline vf exp_minus(vf a) {
#if defined(__AVX512F__)
    vf x = -min(splat(104.0f), a);
    vf n = (vf)_mm512_roundscale_ps((__m512)(x * 1.44269504088896f), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    vf x = -min(splat(88.1f), a);
    vf shifted = x * 1.44269504088896f + kRounding;
    vf n = shifted - kRounding;
#endif
    vf r = x - n * 0.693359375f;  // ln 2 in two parts, the first exact in a product with n
    r = r + n * 2.12194440e-4f;
    vf p = splat(1.3814540106e-3f);
    p = p * r + 8.3687451957e-3f;
    p = p * r + 4.1668390791e-2f;
    p = p * r + 1.6666520398e-1f;
    p = p * r + 4.9999993432e-1f;
    p = p * r * r + r + 1.0f;
#if defined(__AVX512F__)
    return (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    return p * as_float(as_int(shifted) << 23);
#endif
}

// 1 / x for 1 <= x <= 2^126, 1 ulp.
static inline vf reciprocal(vf x) {
#if defined(__AVX512F__)
    vf y = (vf)_mm512_rcp14_ps((__m512)x);
    return y + y * (1.0f - x * y);  // one Newton step: 14 bits become 28
#else
    return 1.0f / x;
#endif
}

// 1 / (1 + e^-x) without overflow on either side; q = e^-|x|.
static inline vf sigmoid(vf x, vf q) { return select(x >= 0.0f, splat(1.0f), q) * reciprocal(1.0f + q); }
static inline vf sigmoid(vf x) { return sigmoid(x, exp_minus(abs(x))); }

// ln(1 + e^x) = max(x, 0) + ln(1 + q), q = e^-|x|, and ln(1 + q) = 2 artanh(s), s = q / (2 + q) <= 1/3: every term
// keeps its relative precision where e^x is tiny.
static inline vf softplus(vf x, vf q) {
    vf s = q * reciprocal(2.0f + q);
    vf s2 = s * s;
    vf p = splat(1.4005994257e-1f);
    p = p * s2 + 1.4000902483e-1f;
    p = p * s2 + 2.0010763628e-1f;
    p = p * s2 + 3.3333208143e-1f;
    return max(splat(0.0f), x) + 2.0f * (s + s * s2 * p);
}

}  // namespace ULTRA_ISA
}  // namespace ultra

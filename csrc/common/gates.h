// 2^x for decay products, and the gates of state-space layers.
#pragma once

#include "common/simd.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace ultra {
namespace ULTRA_ISA {

// 2^x, 2 ulp, exactly 1 at 0; 0 below -126 (with AVX-512 subnormal), infinity from 127.5 on, NaN stays NaN.
// x = n + r, |r| <= 1/2; the degree-5 minimax polynomial in r errs by 9.2e-8.
static inline vf exp2(vf x) {
#if defined(__AVX512F__)
    vf n = (vf)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    vf r = x - n;
#else
    vf clamped = select(x > 128.0f, splat(128.0f), select(x < -126.0f, splat(-126.0f), x));
    vf shifted = clamped + 12582912.0f;  // 1.5 * 2^23: the integer is in the low mantissa bits
    vf r = clamped - (shifted - 12582912.0f);
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
    vi k = as_int(shifted) - as_int(splat(12582912.0f));
    vf scaled = p * as_float((k + 127) << 23);
    return select(x < -126.0f, splat(0.0f), scaled);
#endif
}

// 1 / (1 + e^-x) without overflow on either side.
static inline vf sigmoid(vf x) {
    vf q = exp(-abs(x));
    return select(x >= 0.0f, splat(1.0f), q) / (1.0f + q);
}

// ln(1 + e^x) = max(x, 0) + ln(1 + q), q = e^-|x|, and ln(1 + q) = 2 artanh(s), s = q / (2 + q) <= 1/3: every term keeps
// its relative precision where e^x is tiny.
static inline vf softplus(vf x) {
    vf q = exp(-abs(x));
    vf s = q / (2.0f + q);
    vf s2 = s * s;
    vf p = splat(1.4005994257e-1f);
    p = p * s2 + 1.4000902483e-1f;
    p = p * s2 + 2.0010763628e-1f;
    p = p * s2 + 3.3333208143e-1f;
    return max(x, splat(0.0f)) + 2.0f * (s + s * s2 * p);
}

}  // namespace ULTRA_ISA
}  // namespace ultra

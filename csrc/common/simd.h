// Vectors of floats as wide as the instruction set that this file is compiled for, and the transcendental functions on
// them. Written with the compilers' vector extensions: one source for SSE, AVX2, AVX-512 and NEON.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace ultra {
namespace ULTRA_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float vf __attribute__((vector_size(kLanes * 4)));
typedef int32_t vi __attribute__((vector_size(kLanes * 4)));
typedef uint16_t vh __attribute__((vector_size(kLanes * 2)));  // bfloat16 or float16 bits

enum DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct BF16 { uint16_t bits; };
struct FP16 { uint16_t bits; };

static inline vf splat(float x) { return x - vf{}; }  // x + 0 is another number for -0, and costs an addition
static inline vf as_float(vi x) { return (vf)x; }
static inline vi as_int(vf x) { return (vi)x; }
static inline vf select(vi mask, vf a, vf b) { return as_float((mask & as_int(a)) | (~mask & as_int(b))); }
// b where either is NaN, as the instructions have it.
static inline vf max(vf a, vf b) {
#if defined(__AVX512F__)
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return select(a > b, a, b);
#endif
}
static inline vf min(vf a, vf b) {
#if defined(__AVX512F__)
    return (vf)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (vf)_mm256_min_ps((__m256)a, (__m256)b);
#else
    return select(a < b, a, b);
#endif
}
static inline vf abs(vf x) { return as_float(as_int(x) & 0x7fffffff); }
// copysign(magnitude, sign)
static inline vf with_sign(vf magnitude, vf sign) {
    return as_float((as_int(magnitude) & 0x7fffffff) | (as_int(sign) & (int32_t)0x80000000));
}

// ---- scalar conversions ---------------------------------------------------------------------------------------------
static inline float bits_to_float(uint32_t u) { float f; memcpy(&f, &u, 4); return f; }
static inline uint32_t float_to_bits(float f) { uint32_t u; memcpy(&u, &f, 4); return u; }

static inline float to_float(float x) { return x; }
static inline float to_float(BF16 x) { return bits_to_float((uint32_t)x.bits << 16); }
static inline float to_float(FP16 x) { _Float16 h; memcpy(&h, &x.bits, 2); return (float)h; }

static inline void store_scalar(float* p, float x) { *p = x; }
static inline void store_scalar(BF16* p, float x) {  // round to nearest even; a NaN stays a quiet NaN
    uint32_t u = float_to_bits(x);
    p->bits = (u & 0x7fffffff) > 0x7f800000 ? (uint16_t)((u >> 16) | 0x40)
                                            : (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
static inline void store_scalar(FP16* p, float x) { _Float16 h = (_Float16)x; memcpy(&p->bits, &h, 2); }

// ---- vector loads and stores ----------------------------------------------------------------------------------------
static inline vf load(const float* p) { vf v; memcpy(&v, p, sizeof v); return v; }
static inline vf load(const BF16* p) {
#if defined(__AVX512F__)  // compilers widen a vector of 16 in halves, and narrow it with a table
    return as_float((vi)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)) << 16);
#elif defined(__AVX2__)
    return as_float((vi)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)) << 16);
#else
    vh h; memcpy(&h, p, sizeof h);
    return as_float(__builtin_convertvector(h, vi) << 16);
#endif
}
static inline vf load(const FP16* p) {
    typedef _Float16 vhf __attribute__((vector_size(kLanes * 2)));
    vhf h; memcpy(&h, p, sizeof h);
    return __builtin_convertvector(h, vf);
}
static inline void store(float* p, vf v) { memcpy(p, &v, sizeof v); }
static inline void store(BF16* p, vf v) {
    vi u = as_int(v);
    vi rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    vi nan = (u >> 16) | 0x40;
#if defined(__AVX512F__)
    const __mmask16 is_nan = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
    const __m512i bits = _mm512_mask_mov_epi32((__m512i)rounded, is_nan, (__m512i)nan);
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(bits));
#else
    vi is_nan = (u & 0x7fffffff) > 0x7f800000;
    vh h = __builtin_convertvector((is_nan & nan) | (~is_nan & rounded), vh);
    memcpy(p, &h, sizeof h);
#endif
}
static inline void store(FP16* p, vf v) {
    typedef _Float16 vhf __attribute__((vector_size(kLanes * 2)));
    vhf h = __builtin_convertvector(v, vhf);
    memcpy(p, &h, sizeof h);
}
// The first `n` < kLanes elements; the other lanes read as `fill` and are not written.
template <typename T> static inline vf load_part(const T* p, int n, float fill = 0.0f) {
    vf v = splat(fill);
    for (int i = 0; i < n; ++i) v[i] = to_float(p[i]);
    return v;
}
template <typename T> static inline void store_part(T* p, vf v, int n) {
    for (int i = 0; i < n; ++i) store_scalar(p + i, v[i]);
}
static inline float max_lane(vf v) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)v);
#else
    for (int w = kLanes / 2; w > 0; w /= 2)
        for (int i = 0; i < w; ++i) v[i] = v[i] > v[i + w] ? v[i] : v[i + w];
    return v[0];
#endif
}
// To nearest, ties to even; |x| < 2^31.
static inline vi round_to_int(vf x) {
#if defined(__AVX512F__)
    return (vi)_mm512_cvtps_epi32((__m512)x);
#elif defined(__AVX2__)
    return (vi)_mm256_cvtps_epi32((__m256)x);
#elif defined(__SSE2__)
    return (vi)_mm_cvtps_epi32((__m128)x);
#elif defined(__ARM_NEON)
    return (vi)vcvtnq_s32_f32((float32x4_t)x);
#else
    vi n;
    for (int i = 0; i < kLanes; ++i) n[i] = (int32_t)__builtin_rintf(x[i]);
    return n;
#endif
}
// Neighbouring lanes 2i and 2i + 1 change places.
static inline vf swap_pairs(vf v) {
#if defined(__AVX512F__)
    return (vf)_mm512_permute_ps((__m512)v, 0xb1);
#elif defined(__AVX2__)
    return (vf)_mm256_permute_ps((__m256)v, 0xb1);
#else
    return vf{v[1], v[0], v[3], v[2]};
#endif
}
// Four elements from p, four from p + step, and so on.
static inline vf load_quads(const float* p, int64_t step) {
#if defined(__AVX512F__)
    __m512 v = _mm512_castps128_ps512(_mm_loadu_ps(p));
    v = _mm512_insertf32x4(v, _mm_loadu_ps(p + step), 1);
    v = _mm512_insertf32x4(v, _mm_loadu_ps(p + 2 * step), 2);
    return (vf)_mm512_insertf32x4(v, _mm_loadu_ps(p + 3 * step), 3);
#elif defined(__AVX2__)
    return (vf)_mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), _mm_loadu_ps(p + step), 1);
#else
    return load(p);
#endif
}
// Each group of four lanes becomes column i of the 4 x 4 matrix that the groups at its place make up.
static inline void transpose_quads(vf x[4]) {
#if defined(__AVX512F__)
    const __m512d a = (__m512d)_mm512_unpacklo_ps((__m512)x[0], (__m512)x[1]);
    const __m512d b = (__m512d)_mm512_unpackhi_ps((__m512)x[0], (__m512)x[1]);
    const __m512d c = (__m512d)_mm512_unpacklo_ps((__m512)x[2], (__m512)x[3]);
    const __m512d d = (__m512d)_mm512_unpackhi_ps((__m512)x[2], (__m512)x[3]);
    x[0] = (vf)_mm512_unpacklo_pd(a, c), x[1] = (vf)_mm512_unpackhi_pd(a, c);
    x[2] = (vf)_mm512_unpacklo_pd(b, d), x[3] = (vf)_mm512_unpackhi_pd(b, d);
#elif defined(__AVX2__)
    const __m256d a = (__m256d)_mm256_unpacklo_ps((__m256)x[0], (__m256)x[1]);
    const __m256d b = (__m256d)_mm256_unpackhi_ps((__m256)x[0], (__m256)x[1]);
    const __m256d c = (__m256d)_mm256_unpacklo_ps((__m256)x[2], (__m256)x[3]);
    const __m256d d = (__m256d)_mm256_unpackhi_ps((__m256)x[2], (__m256)x[3]);
    x[0] = (vf)_mm256_unpacklo_pd(a, c), x[1] = (vf)_mm256_unpackhi_pd(a, c);
    x[2] = (vf)_mm256_unpacklo_pd(b, d), x[3] = (vf)_mm256_unpackhi_pd(b, d);
#else
    const vf a = x[0], b = x[1], c = x[2], d = x[3];
    for (int i = 0; i < 4; ++i) x[i] = vf{a[i], b[i], c[i], d[i]};
#endif
}
// Lane i and lane i + w, for w = kLanes / 2 down to 1. Compilers do such a loop through memory: 100 cycles for 16 lanes.
static inline float sum(vf v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)v);
#elif defined(__AVX2__)
    __m128 half = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
#else
    return (v[0] + v[2]) + (v[1] + v[3]);
#endif
}

// ---- functions ------------------------------------------------------------------------------------------------------
// e^x, 1.5 ulp; 0 below -87.3, infinity above 88.7, NaN stays NaN. x = n ln2 + r, |r| <= ln2/2, degree-7 polynomial in r.
static inline vf exp(vf x) {
    vf clamped = select(x > 88.8f, splat(88.8f), x);
    clamped = select(clamped < -87.4f, splat(-87.4f), clamped);
    vf shifted = clamped * 1.44269504088896f + 12582912.0f;  // 1.5 * 2^23: the integer is in the low mantissa bits
    vf n = shifted - 12582912.0f;
    vf r = clamped - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    vf p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    // 2^n in two factors, so that n = 128 gives infinity and n = -126 stays normal
    vi k = as_int(shifted) - as_int(splat(12582912.0f));
    vi half = k >> 1;
    vf scaled = p * as_float((half + 127) << 23) * as_float((k - half + 127) << 23);
    scaled = select(x < -87.33654f, splat(0.0f), scaled);
    return select(x != x, x, scaled);
}

// tanh, 1.5 ulp: an odd polynomial near 0 (1 - 2/(e^2x+1) would lose all relative precision there).
static inline vf tanh(vf x) {
    vf a = abs(x);
    vf big = 1.0f - 2.0f / (exp(a + a) + 1.0f);
    vf s = x * x;
    vf p = splat(-5.70498872745e-3f);
    p = p * s + 2.06390887954e-2f;
    p = p * s - 5.37397155531e-2f;
    p = p * s + 1.33314422036e-1f;
    p = p * s - 3.33332819422e-1f;
    vf small = p * s * x + x;
    return select(a < 0.625f, small, with_sign(big, x));
}

// erf, 1.5 ulp: an odd polynomial near 0, elsewhere 1 - e^q(|x|) with q fitted to ln erfc. Both are minimax fits of the
// relative error, under 1e-8 before rounding; from |x| = 4 on the result is 1 to the last bit.
static inline vf erf(vf x) {
    vf a = abs(x);
    a = select(a > 4.0f, splat(4.0f), a);
    vf q = splat(2.0099629e-4f);
    q = q * a - 3.0922927e-3f;
    q = q * a + 2.2420220e-2f;
    q = q * a - 1.0432751e-1f;
    q = q * a - 6.3673720e-1f;
    q = q * a - 1.1279361f;
    q = q * a - 1.3357463e-4f;
    vf big = 1.0f - exp(q);
    vf s = x * x;
    vf p = splat(-6.2032725e-4f);
    p = p * s + 5.0321850e-3f;
    p = p * s - 2.6791466e-2f;
    p = p * s + 1.1282455e-1f;
    p = p * s - 3.7612550e-1f;
    p = p * s + 1.2837915e-1f;
    return select(a < 0.875f, p * x + x, with_sign(big, x));
}

}  // namespace ULTRA_ISA
}  // namespace ultra

// Sums of ternary codes times int8 numbers, exact in int32. A code is a weight plus one: 0, 1 or 2; the weights' own sum
// is what comes out less the sum of the numbers. Layout of packed codes: PackedTernary in ultra_kernels/ternary/op.py.
#pragma once

#include "common/simd.h"

namespace ultra {
namespace ULTRA_ISA {

constexpr int kPanelRows = 16, kBlockColumns = 16, kBlockBytes = 64, kSlots = 4;  // a block: 16 rows of 16 columns
constexpr int kVectorsOfPanel = kPanelRows / kLanes;
constexpr int kCodeBytes = 4 * kLanes;  // a vector of codes: four columns of kLanes rows

// What a vector of codes and a quad of numbers, the same for every row, add up to. `Partial` keeps narrower sums where
// these are faster: after kMostQuads additions total() must be taken.
#if defined(__AVX512F__)
typedef __m512i Codes;
typedef __m512i Quad;
typedef vi Partial;
constexpr int64_t kMostQuads = INT64_MAX;  // of codes up to 2: where int32 wraps, the subtraction wraps back
constexpr int64_t kMostScaledQuads = 1 << 14;  // 2 · 64 · 4 · 128 each: half of 2^31
static inline Codes load_codes(const uint8_t* p) { return _mm512_loadu_si512(p); }
static inline Quad splat_quad(const int8_t* p) { int32_t q; memcpy(&q, p, 4); return _mm512_set1_epi32(q); }
static inline void multiply_add(Partial& to, Codes c, Quad x) { to = (vi)_mm512_dpbusd_epi32((__m512i)to, c, x); }
static inline vi total(Partial p) { return p; }
// Slot s of packed codes; scaled_slot: times 4^s where sums have room for that, which saves the shift.
constexpr bool kScaledSlots = true;
static inline Codes scaled_slot(Codes packed, int s) {
    return _mm512_and_si512(packed, _mm512_set1_epi8((char)(3 << 2 * s)));
}
static inline Codes slot(Codes packed, int s) {
    return _mm512_and_si512(_mm512_srli_epi16(packed, 2 * s), _mm512_set1_epi8(3));
}
#elif defined(__AVX2__)
typedef __m256i Codes;
typedef __m256i Quad;
typedef int16_t Partial __attribute__((vector_size(32)));  // sums of two products
constexpr int64_t kMostQuads = 60;  // 60 · 2 · 2 · 128 = 30720 < 2^15
constexpr int64_t kMostScaledQuads = kMostQuads;
static inline Codes load_codes(const uint8_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
static inline Quad splat_quad(const int8_t* p) { int32_t q; memcpy(&q, p, 4); return _mm256_set1_epi32(q); }
static inline void multiply_add(Partial& to, Codes c, Quad x) {
    to += (Partial)_mm256_maddubs_epi16(c, x);
}
static inline vi total(Partial p) { return (vi)_mm256_madd_epi16((__m256i)p, _mm256_set1_epi16(1)); }
constexpr bool kScaledSlots = false;  // 128 · 128 · 2 does not fit 16 bits
static inline Codes slot(Codes packed, int s) {
    return _mm256_and_si256(_mm256_srli_epi16(packed, 2 * s), _mm256_set1_epi8(3));
}
static inline Codes scaled_slot(Codes packed, int s) { return slot(packed, s); }
#else
typedef uint8_t Codes __attribute__((vector_size(16)));
#if defined(__ARM_FEATURE_DOTPROD)
typedef int8x16_t Quad;
typedef vi Partial;
constexpr int64_t kMostQuads = INT64_MAX;
static inline Quad splat_quad(const int8_t* p) { int32_t q; memcpy(&q, p, 4); return (Quad)vdupq_n_s32(q); }
static inline void multiply_add(Partial& to, Codes c, Quad x) { to = (vi)vdotq_s32((int32x4_t)to, (int8x16_t)c, x); }
static inline vi total(Partial p) { return p; }
#else
typedef int16_t Quad __attribute__((vector_size(32)));
typedef Quad Partial;
constexpr int64_t kMostQuads = 120;  // 120 · 2 · 128 = 30720 < 2^15
static inline Quad splat_quad(const int8_t* p) {
    typedef int8_t v16 __attribute__((vector_size(16)));
    int32_t q; memcpy(&q, p, 4);
    return __builtin_convertvector((v16)(vi{q, q, q, q}), Quad);
}
static inline void multiply_add(Partial& to, Codes c, Quad x) { to += __builtin_convertvector(c, Quad) * x; }
static inline vi total(Partial p) {
    vi t;
    for (int r = 0; r < 4; ++r) t[r] = p[4 * r] + p[4 * r + 1] + p[4 * r + 2] + p[4 * r + 3];
    return t;
}
#endif
constexpr int64_t kMostScaledQuads = kMostQuads;
constexpr bool kScaledSlots = false;
static inline Codes load_codes(const uint8_t* p) { Codes c; memcpy(&c, p, sizeof c); return c; }
static inline Codes slot(Codes packed, int s) { return (packed >> 2 * s) & 3; }
static inline Codes scaled_slot(Codes packed, int s) { return slot(packed, s); }
#endif

// The first block of vector v of the rows, counted through all panels; the next is kBlockBytes further.
static inline const uint8_t* codes_of_vector(const uint8_t* packed, int64_t blocks, int64_t v) {
    return packed + v / kVectorsOfPanel * blocks * kBlockBytes + v % kVectorsOfPanel * kCodeBytes;
}

}  // namespace ULTRA_ISA
}  // namespace ultra

// Two rates of one core: products of u8 by s8 summed into int32, and reading memory that a cache holds.
#include <immintrin.h>
#include <stdint.h>

extern "C" {

// Operations done (a product and its sum are two) in `rounds` rounds; 0 where the processor has no VNNI.
int64_t int8_dots(int64_t rounds) {
#ifdef __AVX512VNNI__
    __m512i sums[12];  // two a clock, each 4 or 5 clocks late
    const __m512i a = _mm512_set1_epi8(1), b = _mm512_set1_epi8(-1);
    for (__m512i& sum : sums) {
        sum = _mm512_setzero_si512();
        asm volatile("" : "+v"(sum));  // else the compiler sees twelve times the same sum and keeps one
    }
    for (int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 12
        for (__m512i& sum : sums) sum = _mm512_dpbusd_epi32(sum, a, b);
    }
    for (__m512i& sum : sums) asm volatile("" ::"v"(sum));
    return rounds * 12 * 128;
#else
    return 0;
#endif
}

// The sum of n 32-bit numbers, n a multiple of 128.
int32_t read_all(const int32_t* x, int64_t n) {
    int32_t sums[128] = {};
    for (int64_t i = 0; i < n; i += 128)
        for (int j = 0; j < 128; ++j) sums[j] += x[i + j];
    for (int j = 1; j < 128; ++j) sums[0] += sums[j];
    return sums[0];
}
}

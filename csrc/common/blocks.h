// Products of matrices larger than a cache, in blocks: what is common to filling their tiles (common/product.h).
#pragma once

#include "common/product.h"

namespace ultra {
namespace ULTRA_ISA {

constexpr int64_t kColumns = 64, kInner = 128;  // words of a tile of the right factor: 32 KB

static inline int64_t at_most(int64_t n, int64_t most) { return n < most ? n : most; }
static inline int64_t blocks(int64_t n, int64_t of) { return (n + of - 1) / of; }

// The first n numbers, zeros after them.
template <typename T> static inline vf load_up_to(const T* p, int64_t n) {
    return n < kLanes ? load_part(p, (int)n) : load(p);
}

// Pairs (a[i], b[i]) of the first n numbers, zeros after them and for a b that is not there.
template <typename T> static inline void store_bits(Pair* to, const T* a, const T* b, int64_t n) {
#if defined(__AVX512BF16__)
    const __mmask16 some = (__mmask16)((1u << n) - 1);
    const auto half = [&](const T* p) { return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(p ? some : 0, p)); };
    _mm512_storeu_si512(to, _mm512_or_si512(half(a), _mm512_slli_epi32(half(b), 16)));
#else
    __builtin_trap();
#endif
}

// Rows of words from rows of numbers: `get(i, c)` is a vector of number row i; odd rows fill the other half of pairs.
template <typename Get>
static inline void fill_words(int64_t rows, int64_t columns, float* to, int64_t to_row, const Get& get) {
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t c = 0; c < columns; c += kLanes) store(to + i * to_row + c, get(i, c));
}
template <typename Get>
static inline void fill_words(int64_t rows, int64_t columns, Pair* to, int64_t to_row, const Get& get) {
    for (int64_t i = 0; i < rows; i += 2)
        for (int64_t c = 0; c < columns; c += kLanes)
            store(to + i / 2 * to_row + c, get(i, c), i + 1 < rows ? get(i + 1, c) : splat(0.0f));
}

// The same from rows of a matrix, `columns` of them; vectors are filled up with zeros.
template <typename T>
static inline void fill_rows(int64_t rows, int64_t columns, const T* from, int64_t from_row, float* to,
                             int64_t to_row) {
    fill_words(rows, columns, to, to_row,
               [&](int64_t i, int64_t c) { return load_up_to(from + i * from_row + c, columns - c); });
}
template <typename T>
static inline void fill_rows(int64_t rows, int64_t columns, const T* from, int64_t from_row, Pair* to,
                             int64_t to_row) {
    for (int64_t i = 0; i < rows; i += 2, from += 2 * from_row, to += to_row)
        for (int64_t c = 0; c < columns; c += kLanes)
            store_bits(to + c, from + c, i + 1 < rows ? from + from_row + c : nullptr, at_most(columns - c, kLanes));
}

// Asks for rows of a matrix that are needed after the next product.
template <typename T>
static inline void prefetch(int64_t rows, int64_t columns, const T* from, int64_t from_row) {
    constexpr int64_t line = 64 / sizeof(T);
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t c = 0; c < columns; c += line) __builtin_prefetch(from + i * from_row + c, 0, 2);
}

}  // namespace ULTRA_ISA
}  // namespace ultra

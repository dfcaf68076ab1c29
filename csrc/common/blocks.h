// Products of matrices larger than a cache, in blocks: what is common to filling their tiles (common/product.h).
#pragma once

#include "common/product.h"

namespace ultra {
namespace ULTRA_ISA {

// Words of a tile of the right factor: 128 KB, which the second cache delivers as fast as products need it. With long
// sums what becomes of them costs little.
constexpr int64_t kColumns = 64, kInner = 512;

static inline int64_t at_most(int64_t n, int64_t most) { return n < most ? n : most; }
static inline int64_t blocks(int64_t n, int64_t of) { return (n + of - 1) / of; }

// As many numbers of n at a time as fit into tiles of kInner words; even parts, since a short one would cost as many
// loads and stores of sums as a long one.
template <typename Word> static inline int64_t inner_step(int64_t n) {
    const int64_t parts = blocks(n, kInner * kNumbers<Word>);
    return parts > 1 ? (blocks(n, parts) + 31) / 32 * 32 : n;
}

// A right tile [height, columns] of words, in stripes of as many columns as one product takes, each below the one before:
// what it reads then lies together. In rows of 256 bytes it would share a quarter of the first cache's lines.
constexpr int64_t kStripe = kProductVectors * kLanes;
static_assert(kColumns % kStripe == 0, "a tile's memory is whole stripes");

template <typename Word> struct Stripes {
    Word* data;
    int64_t height, columns;

    // body(column, columns, words of row k, their width) for every stripe.
    template <typename Body> void each(int64_t k, const Body& body) const {
        for (int64_t j = 0; j < columns; j += kStripe) {
            const int64_t some = at_most(columns - j, kStripe), width = padded(some);
            body(j, some, data + j * height + k * width, width);
        }
    }
};

// Columns of a transposed left tile that lie together: whole rows of it would share few lines of the first cache.
constexpr int64_t kPanel = 8 * kProductRows;

// Where a product goes that is a part of a longer sum: to `sums`, whose rows are `row` apart; the whole sum to `put`.
template <typename Put>
static inline auto part_of_sum(bool first, bool last, float* sums, int64_t row, const Put& put) {
    return [=](int64_t i, int64_t j, vf x) {
        float* sum = sums + i * row + j;
        if (!first) x += load(sum);
        if (last) put(i, j, x);
        else store(sum, x);
    };
}

// The first n numbers: loaded with zeros after them, stored with nothing after them.
template <typename T> static inline vf load_up_to(const T* p, int64_t n) {
    return n < kLanes ? load_part(p, (int)n) : load(p);
}
template <typename T> static inline void store_up_to(T* p, vf x, int64_t n) {
    if (n < kLanes) store_part(p, x, (int)n);
    else store(p, x);
}

// Pairs (a[i], b[i]) of the first n <= 2 kLanes numbers, zeros after them and for a b that is not there.
template <typename T> static inline void store_bits(Pair* to, const T* a, const T* b, int64_t n) {
#if defined(__AVX512BF16__)
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                                         37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __mmask32 some = n < 2 * kLanes ? (1u << n) - 1 : ~0u;
    const __m512i x = _mm512_maskz_loadu_epi16(some, a), y = _mm512_maskz_loadu_epi16(b ? some : 0, b);
    _mm512_storeu_si512(to, _mm512_permutex2var_epi16(x, low, y));
    if (n > kLanes)
        _mm512_storeu_si512(to + kLanes, _mm512_permutex2var_epi16(x, _mm512_add_epi16(low, _mm512_set1_epi16(16)), y));
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

template <typename Word, typename Get>
static inline void fill_words(int64_t rows, const Stripes<Word>& to, const Get& get) {
    to.each(0, [&](int64_t j, int64_t, Word* at, int64_t width) {
        fill_words(rows, width, at, width, [&](int64_t i, int64_t c) { return get(i, j + c); });
    });
}

// The same from rows of `columns` numbers, row i at from(i); vectors are filled up with zeros.
template <typename From>
static inline void fill_rows(int64_t rows, int64_t columns, const From& from, float* to, int64_t to_row) {
    fill_words(rows, columns, to, to_row,
               [&](int64_t i, int64_t c) { return load_up_to(from(i) + c, columns - c); });
}
template <typename From>
static inline void fill_rows(int64_t rows, int64_t columns, const From& from, Pair* to, int64_t to_row) {
    for (int64_t i = 0; i < rows; i += 2, to += to_row) {
        const auto *a = from(i), *b = i + 1 < rows ? from(i + 1) : nullptr;
        for (int64_t c = 0; c < columns; c += 2 * kLanes) store_bits(to + c, a + c, b ? b + c : nullptr, columns - c);
    }
}
template <typename T, typename Word>
static inline void fill_rows(int64_t rows, int64_t columns, const T* from, int64_t from_row, Word* to,
                             int64_t to_row) {
    fill_rows(rows, columns, [=](int64_t i) { return from + i * from_row; }, to, to_row);
}

// To rows of stripes, the first at row k.
template <typename Word, typename From>
static inline void fill_rows(int64_t rows, int64_t columns, const From& from, const Stripes<Word>& to, int64_t k = 0) {
    to.each(k, [&](int64_t j, int64_t, Word* at, int64_t width) {
        fill_rows(rows, at_most(columns - j, kStripe), [&](int64_t i) { return from(i) + j; }, at, width);
    });
}

// to [rows, b.columns] = a [rows, inner] b from its row k on. Before every few rows meanwhile(begin, end), for all parts
// of [0, work): what the processor must wait for if it is asked for all at once comes while the units are busy.
template <bool turned, typename Word, typename To, typename Meanwhile>
static inline void multiply(int64_t rows, int64_t inner, const Factor<Word, turned>& a, const Stripes<Word>& b,
                            int64_t k, const To& to, int64_t work, const Meanwhile& meanwhile) {
    const int64_t tiles = blocks(rows, kProductRows);
    for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t i = tile * kProductRows;
        const int64_t begin = tile * work / tiles, end = (tile + 1) * work / tiles;
        if (begin < end) meanwhile(begin, end);
        b.each(k, [&](int64_t j, int64_t columns, const Word* right, int64_t width) {
            multiply(at_most(rows - i, kProductRows), columns, inner, a.from(i), right, width,
                     [&](int64_t r, int64_t c, vf x) { to(i + r, j + c, x); });
        });
    }
}
template <bool turned, typename Word, typename To>
static inline void multiply(int64_t rows, int64_t inner, const Factor<Word, turned>& a, const Stripes<Word>& b,
                            int64_t k, const To& to) {
    multiply(rows, inner, a, b, k, to, 0, [](int64_t, int64_t) {});
}

// Prefetches rows of a matrix.
template <typename T>
static inline void prefetch(int64_t rows, int64_t columns, const T* from, int64_t from_row) {
    constexpr int64_t line = 64 / sizeof(T);
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t c = 0; c < columns; c += line) __builtin_prefetch(from + i * from_row + c, 0, 2);
}

}  // namespace ULTRA_ISA
}  // namespace ultra

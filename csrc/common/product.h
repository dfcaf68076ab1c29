// Products of small matrices that lie in cache: tiles whose rows are padded with zeros to whole vectors. The factors are
// of words: a word is a float, or a Pair of bfloat16 numbers that are neighbours along the axis which is summed over.
// Sums are float32. Where the processor has no dot product of pairs, there are only floats.
#pragma once

#include "common/simd.h"

namespace ultra {
namespace ULTRA_ISA {

// Sums held in registers: 12 of AVX2's 16, 24 of AVX-512's 32.
constexpr int kProductRows = 6;
constexpr int kProductVectors = kLanes == 16 ? 4 : 2;

static inline int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

struct Pair { uint32_t bits; };      // the first number in the low half
struct Rounded { uint16_t bits; };   // one of its numbers; subnormal ones become 0

template <typename Word> constexpr int kNumbers = 1;  // of a word
template <> constexpr int kNumbers<Pair> = 2;
// The words that n numbers take along the axis which is summed over.
template <typename Word> constexpr int64_t words(int64_t n) { return (n + kNumbers<Word> - 1) / kNumbers<Word>; }

static inline float to_float(Rounded x) { return to_float(BF16{x.bits}); }
static inline void store_scalar(Rounded* p, float x) { store_scalar((BF16*)p, x); }

static inline float* numbers(float* words) { return words; }
static inline Rounded* numbers(Pair* words) { return (Rounded*)words; }

static inline vf multiply_add(float a, vf b, vf sum) { return sum + splat(a) * b; }
#if defined(__AVX512BF16__)
constexpr bool kPairs = true;  // there is a dot product of pairs
static inline __m512bh load(const Pair* p) { return (__m512bh)_mm512_loadu_si512(p); }
static inline vf multiply_add(Pair a, __m512bh b, vf sum) {
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32((int)a.bits), b);
}
// The pairs (a[i], b[i]), rounded to nearest even.
static inline void store(Pair* p, vf a, vf b) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    _mm512_storeu_si512(p, _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a)));
}
static inline vf load(const Rounded* p) { return load((const BF16*)p); }
static inline void store(Rounded* p, vf x) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh((__m512)x)); }
#else
constexpr bool kPairs = false;  // what follows is then never called
static inline vf load(const Pair*) { __builtin_trap(); }
static inline vf load(const Rounded*) { __builtin_trap(); }
static inline void store(Rounded*, vf) { __builtin_trap(); }
static inline void store(Pair*, vf, vf) { __builtin_trap(); }
static inline vf multiply_add(Pair, vf, vf) { __builtin_trap(); }
#endif

// The left factor: word (i, k) is data[i * row + k], or data[i + k * row] of a turned one.
template <typename Word, bool turned = false> struct Factor {
    const Word* data;
    int64_t row;

    Factor from(int64_t i) const { return {data + i * (turned ? 1 : row), row}; }
};
template <typename Word> using Turned = Factor<Word, true>;

// Where the product goes: element (i, j) is multiplied by by_row[i] and by_distance[j - i] where there are such, then
// added to data[i * row + j] or stored there. Anything that is called with (i, j, vector of elements) can stand for it.
template <typename T = float> struct Product {
    T* data;
    int64_t row;
    bool add = false;
    const float* by_row = nullptr;
    const float* by_distance = nullptr;

    void operator()(int64_t i, int64_t j, vf x) const {
        if (by_distance) x *= load(by_distance + j - i);
        if (by_row) x *= by_row[i];
        T* at = data + i * row + j;
        store(at, add ? load(at) + x : x);
    }
};

template <typename T> static inline Product<T> product(T* data, int64_t row, const float* by_distance) {
    return {data, row, false, nullptr, by_distance};
}

// whole [rows, vectors * kLanes] = the first rows of a times the columns at `right`. It does not know what becomes of
// them and is never inlined: compiled into each of its callers it was a third of the time to build the library.
template <int rows, int vectors, bool turned, typename Word>
__attribute__((noinline)) static void multiply_tile(int64_t inner, const Factor<Word, turned>& a, const Word* right,
                                                    int64_t b_row, float* whole) {
    vf sum[rows][vectors];
    for (int r = 0; r < rows; ++r)
        for (int v = 0; v < vectors; ++v) sum[r][v] = splat(0.0f);
    // Two pointers for six rows, each of which is then one address of an instruction. The compiler, if it saw through
    // them, would keep six distances, and read four of them from the stack for every k.
    constexpr int half = rows > 3 ? 3 : rows;
    const Word *low = a.data, *high = a.from(half).data;
    asm("" : "+r"(low), "+r"(high));
    const int64_t down = turned ? 1 : a.row, along = turned ? a.row : 1;
#pragma GCC unroll 2
    for (int64_t k = 0; k < inner; ++k, low += along, high += along, right += b_row) {
        decltype(load(right)) x[vectors];
        for (int v = 0; v < vectors; ++v) x[v] = load(right + v * kLanes);
        for (int r = 0; r < rows; ++r) {
            const Word left = r < half ? low[r * down] : high[(r - half) * down];
            for (int v = 0; v < vectors; ++v) sum[r][v] = multiply_add(left, x[v], sum[r][v]);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) store(whole + (r * vectors + v) * kLanes, sum[r][v]);
}

template <int vectors, bool turned, typename Word, typename To>
static inline void multiply_columns(int64_t rows, int64_t inner, const Factor<Word, turned>& a, const Word* b,
                                    int64_t b_row, const To& to, int64_t j) {
    alignas(sizeof(vf)) float whole[kProductRows * vectors * kLanes];
    for (int64_t i = 0; i < rows; i += kProductRows) {
        const int64_t some = rows - i < kProductRows ? rows - i : kProductRows;
        const auto from = a.from(i);
        switch (some) {
            case 1: multiply_tile<1, vectors>(inner, from, b + j, b_row, whole); break;
            case 2: multiply_tile<2, vectors>(inner, from, b + j, b_row, whole); break;
            case 3: multiply_tile<3, vectors>(inner, from, b + j, b_row, whole); break;
            case 4: multiply_tile<4, vectors>(inner, from, b + j, b_row, whole); break;
            case 5: multiply_tile<5, vectors>(inner, from, b + j, b_row, whole); break;
            default: multiply_tile<kProductRows, vectors>(inner, from, b + j, b_row, whole);
        }
        for (int64_t r = 0; r < some; ++r)
            for (int v = 0; v < vectors; ++v) to(i + r, j + v * kLanes, load(whole + (r * vectors + v) * kLanes));
    }
}

// to [rows, columns] = a [rows, inner] b [inner, columns]; `inner` counts words, b's rows are b_row words apart.
template <bool turned, typename Word, typename To>
static inline void multiply(int64_t rows, int64_t columns, int64_t inner, const Factor<Word, turned>& a, const Word* b,
                            int64_t b_row, const To& to) {
    int64_t j = 0;
    for (; j + kProductVectors * kLanes <= padded(columns); j += kProductVectors * kLanes)
        multiply_columns<kProductVectors>(rows, inner, a, b, b_row, to, j);
    for (; j < padded(columns); j += kLanes) multiply_columns<1>(rows, inner, a, b, b_row, to, j);
}

// to [columns, padded(rows)] = the transpose of from [rows, columns], in words; the padding becomes 0. Rows of `from` are
// padded to whole vectors.
template <typename Word>
static inline void transpose(int64_t rows, int64_t columns, const Word* from_words, int64_t from_row, Word* to_words) {
    static_assert(sizeof(Word) == sizeof(float), "words are moved as floats");
    const auto* from = (const float*)from_words;
    auto* to = (float*)to_words;
    const int64_t to_row = padded(rows);
    for (int64_t i = 0; i < rows; i += kLanes, from += kLanes * from_row) {
        const int lanes = rows - i < kLanes ? (int)(rows - i) : kLanes;
        for (int64_t c = 0; c < columns; c += 4) {
            vf x[4];
            if (lanes == kLanes) {
                for (int r = 0; r < 4; ++r) x[r] = load_quads(from + r * from_row + c, 4 * from_row);
                transpose_quads(x);
            } else {
                for (int q = 0; q < 4; ++q) {
                    x[q] = splat(0.0f);
                    for (int r = 0; r < lanes; ++r) x[q][r] = from[r * from_row + c + q];
                }
            }
            for (int q = 0; q < 4 && c + q < columns; ++q) store(to + (c + q) * to_row + i, x[q]);
        }
    }
}

// A tile [rows, columns]. `along` holds pairs of neighbours in a row, to be summed over the columns; `down` holds pairs
// of neighbours in a column, to be summed over the rows. With floats both are the same memory.
template <typename Word> struct Tile {
    int64_t columns;
    Word *along, *down;

    int64_t along_row() const { return padded(words<Word>(columns)); }
    int64_t down_row() const { return padded(columns); }
    auto* rows() const { return numbers(along); }  // rows of numbers, rows_row() apart
    int64_t rows_row() const { return along_row() * kNumbers<Word>; }
    Factor<Word> left() const { return {along, along_row()}; }
    Turned<Word> left_turned() const { return {down, down_row()}; }
};

// Rows [rows, columns], times by_row[i] where there is such, as a tile's `down`; the padding of `from` is finite.
static inline void to_down(int64_t rows, int64_t columns, const float* from, int64_t from_row, const float* by_row,
                           float* to) {
    for (int64_t i = 0; i < rows; ++i, from += from_row, to += padded(columns))
        for (int64_t j = 0; j < columns; j += kLanes) store(to + j, load(from + j) * (by_row ? by_row[i] : 1.0f));
}
template <typename T>
static inline void to_down(int64_t rows, int64_t columns, const T* from, int64_t from_row, const float* by_row,
                           Pair* to) {
    for (int64_t i = 0; i < rows; i += 2, from += 2 * from_row, to += padded(columns)) {
        const bool both = i + 1 < rows;
        const float first = by_row ? by_row[i] : 1.0f, second = by_row && both ? by_row[i + 1] : 1.0f;
        for (int64_t j = 0; j < columns; j += kLanes)
            store(to + j, load(from + j) * first, both ? load(from + from_row + j) * second : splat(0.0f));
    }
}

// `down` of a tile whose `along` is filled.
static inline void fill_down(int64_t, const Tile<float>&) {}
static inline void fill_down(int64_t rows, const Tile<Pair>& x) {
    to_down(rows, x.columns, x.rows(), x.rows_row(), nullptr, x.down);
}

}  // namespace ULTRA_ISA
}  // namespace ultra

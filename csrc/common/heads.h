// Tensors [B,T,H,*] seen one head of one sequence at a time, and their rows as the tiles of product.h.
#pragma once

#include <stdint.h>

namespace ultra {

// [B,T,H,*], the last axis contiguous; strides count elements. data is null for an absent tensor.
struct HeadRows {
    char* data;
    int64_t batch, time, head;
    int dtype;
};

// The sequences of [B,T,...]: those between borders [number + 1], packed in one batch row, or every batch row.
struct Sequences {
    const int32_t* borders;  // null: every batch row is one
    int64_t number, length;  // length: T

    int64_t begin(int64_t s) const { return borders ? borders[s] : 0; }
    int64_t end(int64_t s) const { return borders ? borders[s + 1] : length; }
    int64_t longest() const {
        int64_t most = borders ? 0 : length;
        for (int64_t s = 0; borders && s < number; ++s)
            if (end(s) - begin(s) > most) most = end(s) - begin(s);
        return most;
    }
};

}  // namespace ultra

#ifdef ULTRA_ISA

#include "common/product.h"

namespace ultra {
namespace ULTRA_ISA {

static inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

// One head of one sequence.
struct HeadOfSequence {
    int64_t sequence, head, batch, begin, length;

    HeadOfSequence(const Sequences& of, int64_t sequence, int64_t head)
        : sequence(sequence), head(head), batch(of.borders ? 0 : sequence), begin(of.begin(sequence)),
          length(of.end(sequence) - of.begin(sequence)) {}
    int64_t offset(const HeadRows& x, int64_t row) const {
        return batch * x.batch + (begin + row) * x.time + head * x.head;
    }
};

// Sequences cut into blocks of `size` rows. Sequence s owns the blocks from begin / size + s on when they are packed, of
// which the last may have no rows: a block is found without a table.
struct Blocks {
    const Sequences& of;
    int64_t size;

    int64_t per_sequence() const { return (of.length + size - 1) / size; }
    int64_t number() const { return of.borders ? of.length / size + of.number : of.number * per_sequence(); }
    // The sequence of a block; `first` becomes its first row there, which is past the end where it has no rows.
    int64_t find(int64_t block, int64_t& first) const {
        if (!of.borders) {
            first = block % per_sequence() * size;
            return block / per_sequence();
        }
        int64_t low = 0, high = of.number;  // the last s with begin / size + s <= block
        while (high - low > 1) {
            const int64_t middle = (low + high) / 2;
            if (of.begin(middle) / size + middle <= block) low = middle;
            else high = middle;
        }
        first = (block - of.begin(low) / size - low) * size;
        return low;
    }
};

// Cuts scratch memory into aligned pieces; with base = null it only counts.
struct Pieces {
    float* base;
    int64_t used = 0;

    template <typename Word = float> Word* take(int64_t n) {  // floats or pairs: both have 4 bytes
        float* piece = base ? base + used : nullptr;
        used += (n + 15) / 16 * 16;
        return (Word*)piece;
    }
    template <typename Word> Tile<Word> tile(int64_t rows, int64_t columns) {
        Tile<Word> t{columns, nullptr, nullptr};
        t.along = take<Word>(rows * t.along_row());
        t.down = kNumbers<Word> == 1 ? t.along : take<Word>(words<Word>(rows) * t.down_row());
        return t;
    }
};

// Calls f(a word): what the factors of products of q, k and v are made of.
template <typename F>
static inline void with_words(const HeadRows& q, const HeadRows& k, const HeadRows& v, const F& f) {
    if constexpr (kPairs)
        if (q.dtype == kBFloat16 && k.dtype == kBFloat16 && v.dtype == kBFloat16) return f(Pair{});
    f(float{});
}

template <typename T>
static inline void load_rows(const T* from, int64_t step, int64_t rows, int64_t columns, float* to) {
    for (int64_t i = 0; i < rows; ++i, from += step, to += padded(columns)) {
        int64_t c = 0;
        for (; c + kLanes <= columns; c += kLanes) store(to + c, load(from + c));
        if (c < columns) store(to + c, load_part(from + c, (int)(columns - c)));
    }
}

template <typename T>
static inline void store_rows(const float* from, int64_t step, int64_t rows, int64_t columns, T* to) {
    for (int64_t i = 0; i < rows; ++i, from += padded(columns), to += step) {
        int64_t c = 0;
        for (; c + kLanes <= columns; c += kLanes) store(to + c, load(from + c));
        if (c < columns) store_part(to + c, load(from + c), (int)(columns - c));
    }
}

// Rows [first, first + rows) of x as float32 rows that are padded with zeros to whole vectors.
static inline void load_rows(const HeadRows& x, const HeadOfSequence& t, int64_t first, int64_t rows, int64_t columns,
                             float* to) {
    const int64_t at = t.offset(x, first);
    if (x.dtype == kBFloat16) load_rows((const BF16*)x.data + at, x.time, rows, columns, to);
    else if (x.dtype == kFloat16) load_rows((const FP16*)x.data + at, x.time, rows, columns, to);
    else load_rows((const float*)x.data + at, x.time, rows, columns, to);
}

static inline void store_rows(const float* from, const HeadRows& x, const HeadOfSequence& t, int64_t first,
                              int64_t rows, int64_t columns) {
    const int64_t at = t.offset(x, first);
    if (x.dtype == kBFloat16) store_rows(from, x.time, rows, columns, (BF16*)x.data + at);
    else if (x.dtype == kFloat16) store_rows(from, x.time, rows, columns, (FP16*)x.data + at);
    else store_rows(from, x.time, rows, columns, (float*)x.data + at);
}

// Rows [first, first + rows) of x as a tile; its `down` where that is asked for. A tile of pairs takes bfloat16 alone.
static inline void load_tile(const HeadRows& x, const HeadOfSequence& t, int64_t first, int64_t rows,
                             const Tile<float>& to, bool) {
    load_rows(x, t, first, rows, to.columns, to.along);
}
static inline void load_tile(const HeadRows& x, const HeadOfSequence& t, int64_t first, int64_t rows,
                             const Tile<Pair>& to, bool down) {
    const BF16* from = (const BF16*)x.data + t.offset(x, first);
    const int64_t row = to.along_row(), whole = to.columns / 32 * 32, rest = to.columns - whole;
    for (int64_t i = 0; i < rows; ++i, from += x.time) {
        BF16* copy = (BF16*)(to.along + i * row);
        for (int64_t c = 0; c < whole; c += 32) memcpy(copy + c, from + c, 64);
        if (rest) memset(copy + whole, 0, 64), memcpy(copy + whole, from + whole, rest * sizeof(BF16));
    }
    if (down) fill_down(rows, to);
}

// Rows of floats, `row` apart, as a tile: `along`, `down`, or both. Floats that lie in the tile already stay there.
static inline void fill_tile(int64_t rows, const float* from, int64_t row, const Tile<float>& to, bool, bool) {
    for (int64_t i = 0; from != to.along && i < rows; ++i)
        for (int64_t j = 0; j < to.columns; j += kLanes) store(to.along + i * to.along_row() + j, load(from + i * row + j));
}
static inline void fill_tile(int64_t rows, const float* from, int64_t row, const Tile<Pair>& to, bool along,
                             bool down) {
    for (int64_t i = 0; along && i < rows; ++i)
        for (int64_t j = 0; j < to.columns; j += kLanes)
            store(to.rows() + i * to.rows_row() + j, load(from + i * row + j));
    if (down) to_down(rows, to.columns, from, row, nullptr, to.down);
}

}  // namespace ULTRA_ISA
}  // namespace ultra

#endif

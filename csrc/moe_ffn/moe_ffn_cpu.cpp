// Contract: ultra_kernels/moe_ffn/op.py. Tokens are copied into the order of their experts, so that every product has
// whole rows on its left; what becomes of a token is gathered again choice by choice, always in one order.
#include "moe_ffn/moe_ffn.h"

#include "common/blocks.h"
#include "common/gates.h"
#include "common/parallel.h"

namespace ultra {
namespace ULTRA_ISA {

namespace {

// A task's output: so many rows that filling the right tile, and columns that copying the left one, costs little.
constexpr int64_t kTokenRows = 512, kWeightRows = 192, kWeightColumns = 4 * kColumns;
constexpr float kEpsilon = 1e-6f;

template <typename Word> struct NumberOf { using Type = float; };
template <> struct NumberOf<Pair> { using Type = Rounded; };
template <typename Word> using Number = typename NumberOf<Word>::Type;

// An axis of channels: `parts` (gate and up) of `length`, each of which is padded in rows of activations.
struct Axis {
    int64_t parts, length;

    int64_t size() const { return parts * length; }
    int64_t row() const { return parts * moe_row(length); }
};

struct Shape {
    int64_t slots;
    Axis outer, hidden, inner;

    explicit Shape(const MoEProblem& p)
        : slots(p.tokens * p.top_k), outer{1, p.D}, hidden{p.gated ? 2 : 1, p.F}, inner{1, p.F} {}
};

// The slots of every expert, and their blocks of at most kTokenRows.
struct Sections {
    const int64_t* ends;
    int64_t experts;

    struct Block { int64_t expert, row, rows; };

    int64_t begin(int64_t e) const { return e ? ends[e - 1] : 0; }
    int64_t size(int64_t e) const { return ends[e] - begin(e); }
    int64_t count() const {
        int64_t n = 0;
        for (int64_t e = 0; e < experts; ++e) n += blocks(size(e), kTokenRows);
        return n;
    }
    Block block(int64_t i) const {
        int64_t e = 0;
        for (; i >= blocks(size(e), kTokenRows); ++e) i -= blocks(size(e), kTokenRows);
        const int64_t n = blocks(size(e), kTokenRows), from = i * size(e) / n, to = (i + 1) * size(e) / n;
        return {e, begin(e) + from, to - from};
    }
};

// Scratch memory of a thread.
struct Tiles {
    float *out, *right, *left, *value, *slope;  // two of `right`: the next one is filled while products read one

    Tiles(float* scratch, int64_t F) {
        float* at = scratch + thread_index() * floats(F);
        out = at, at += kWeightRows * kWeightColumns;
        right = at, at += 2 * kInner * kColumns;
        left = at, at += kInner * kWeightRows;
        value = at, at += moe_row(F);
        slope = at;
    }
    static int64_t floats(int64_t F) {
        static_assert(kTokenRows * kColumns <= kWeightRows * kWeightColumns, "`out` holds either block");
        return kWeightRows * kWeightColumns + 2 * kInner * kColumns + kInner * kWeightRows + 2 * moe_row(F);
    }
};

// The transpose of [rows, inner] as a right factor: the words of a row go down a column.
template <typename Word, typename T>
void fill_turned(int64_t rows, int64_t inner, const T* from, int64_t from_row, Word* to, Word* spare) {
    constexpr int64_t numbers_of = kNumbers<Word>;
    if (sizeof(T) * numbers_of == sizeof(Word) && from_row % numbers_of == 0 && inner % (4 * numbers_of) == 0)
        return transpose(rows, inner / numbers_of, (const Word*)from, from_row / numbers_of, to);
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t c = 0; c < inner; c += kLanes)
            store(numbers(spare + i * kInner) + c, load_up_to(from + i * from_row + c, inner - c));
    transpose(rows, words<Word>(inner), spare, kInner, to);
}

// A part of a matrix that becomes a right tile: rows of `columns` numbers, or of `inner` if they are to be turned.
template <bool turned, typename Word, typename T> struct Source {
    const T* from;
    int64_t row, columns, inner;

    // A unit of work is a row of words, or as many of their columns as a line of cache holds.
    static constexpr int64_t kUnit = turned ? 16 * kNumbers<Word> : kNumbers<Word>;
    int64_t units() const { return blocks(inner, kUnit); }
    // Asks for the same amount after it as well.
    void fill(int64_t begin, int64_t end, Word* to, Word* spare) const {
        const int64_t k = begin * kUnit, some = at_most(inner, end * kUnit) - k;
        const int64_t ahead = at_most(inner - k - some, some);
        if (turned) {
            prefetch(columns, ahead, from + k + some, row);
            stripes(to).each(words<Word>(k), [&](int64_t j, int64_t few, Word* at, int64_t) {
                fill_turned(few, some, from + j * row + k, row, at, spare);
            });
        } else {
            prefetch(ahead, columns, from + (k + some) * row, row);
            fill_rows(some, columns, [&](int64_t i) { return from + (k + i) * row; }, stripes(to), words<Word>(k));
        }
    }
    Stripes<Word> stripes(Word* tile) const { return {tile, words<Word>(inner), columns}; }
};

// to [slots, out] = left [slots, in] times the weights of each slot's expert, [out, in] if `turned`, else [in, out].
// then(row, rows, column, columns): what becomes of a block of `to` while it is in the cache.
struct Nothing {
    void operator()(int64_t, int64_t, int64_t, int64_t) const {}
};
template <bool turned, typename Word, typename T, typename To, typename Then = Nothing>
void multiply_rows(const Sections& of, const Number<Word>* left, const Axis& in, const T* weights, const Axis& out,
                   const float* bias, To* to, float* scratch, int64_t F, int threads, const Then& then = {}) {
    const int64_t across = blocks(out.length, kColumns), tasks = of.count() * out.parts * across;
    const int64_t step = inner_step<Word>(in.length), steps = blocks(in.length, step);
    const auto source = [&](int64_t i, int64_t s) {
        const int64_t expert = of.block(i / (out.parts * across)).expert, part = i / across % out.parts;
        const int64_t j = i % across * kColumns, k = s % steps * step, row = turned ? in.length : out.length;
        const int64_t down = turned ? part * out.length + j : s / steps * in.length + k, right = turned ? k : j;
        return Source<turned, Word, T>{weights + expert * in.size() * out.size() + down * row + right, row,
                                       at_most(out.length - j, kColumns), at_most(in.length - k, step)};
    };
    parallel_for_ahead(tasks, threads, [&](int64_t i, int64_t next, int64_t turn) {
        const auto block = of.block(i / (out.parts * across));
        const int64_t to_part = i / across % out.parts, j = i % across * kColumns;
        const int64_t columns = at_most(out.length - j, kColumns), wide = padded(columns);
        const Tiles tiles(scratch, F);
        Word *rights[2] = {(Word*)tiles.right, (Word*)tiles.right + kInner * kColumns}, *spare = (Word*)tiles.left;
        float add[kColumns] = {};
        if (bias) memcpy(add, bias + block.expert * out.size() + to_part * out.length + j, columns * sizeof(float));
        To* at = to + block.row * out.row() + to_part * moe_row(out.length) + j;
        const auto put = [&, at](int64_t r, int64_t c, vf x) { store(at + r * out.row() + c, x + load(add + c)); };
        const int64_t all = in.parts * steps;
        for (int64_t s = 0; s < all; ++s) {
            const auto from = source(i, s);
            Word *right = rights[(turn * all + s) % 2], *other = rights[(turn * all + s + 1) % 2];
            if (turn + s == 0) from.fill(0, from.units(), right, spare);
            const bool last = s + 1 == all, more = !last || next < tasks;
            const auto coming = more ? source(last ? next : i, last ? 0 : s + 1) : from;
            const int64_t k = s / steps * moe_row(in.length) + s % steps * step;
            const Factor<Word> rows{(const Word*)(left + block.row * in.row() + k), in.row() / kNumbers<Word>};
            multiply(block.rows, words<Word>(from.inner), rows, from.stripes(right), 0,
                     part_of_sum(s == 0, last, tiles.out, kColumns, put), more ? coming.units() : 0,
                     [&](int64_t begin, int64_t end) { coming.fill(begin, end, other, spare); });
        }
        for (int64_t c = wide; c < at_most(moe_row(out.length) - j, kColumns); c += kLanes)
            for (int64_t r = 0; r < block.rows; ++r) store(at + r * out.row() + c, splat(0.0f));
        then(block.row, block.rows, to_part * moe_row(out.length) + j, at_most(moe_row(out.length) - j, kColumns));
    });
}

// A block of weights: with few slots the panels' memory holds more of its rows, for which right tiles are then filled
// once; sums of one part need no memory of their own, and panels too are filled once for all columns.
struct WeightBlock { int64_t rows, columns; };
template <typename Word>
WeightBlock weight_block(const Sections& of, const Axis& rows, const Axis& columns, int threads) {
    int64_t most = 1;
    for (int64_t e = 0; e < of.experts; ++e) most = of.size(e) > most ? of.size(e) : most;
    if (words<Word>(most) <= kInner) {
        const int64_t high = kInner * kWeightRows / words<Word>(most) / kPanel * kPanel;
        const int64_t parts = of.experts * rows.parts, enough = 4 * threads;
        if (parts * blocks(rows.length, high) >= enough) return {high, columns.length};
        if (parts * blocks(columns.length, kWeightColumns) >= enough) return {high, kWeightColumns};
    }
    return {kWeightRows, kWeightColumns};
}

// The row of each slot: its own, padded with zeros, or that of its token in x.
template <typename N> struct OwnRows {
    const N* data;
    int64_t row;
    const N* operator()(int64_t slot) const { return data + slot * row; }
    static int64_t readable(int64_t n) { return padded(n); }
};
template <typename T> struct TokenRows {
    const T* x;
    const MoEProblem& p;
    const T* operator()(int64_t slot) const { return x + p.order[slot] / p.top_k * p.x_row; }
    static int64_t readable(int64_t n) { return n; }
};

// to [E, rows, columns] = the sum over each expert's slots of left [slots, rows] times the slot's row of `right`.
template <typename Word, typename T, typename Right>
void multiply_slots(const Sections& of, const Number<Word>* left, const Axis& rows, const Right& right,
                    const Axis& columns, T* to, float* scratch, int64_t F, int threads) {
    const auto [high, wide] = weight_block<Word>(of, rows, columns, threads);
    const int64_t down = blocks(rows.length, high), across = blocks(columns.length, wide);
    parallel_for(of.experts * rows.parts * down * across, threads, [&](int64_t i) {
        const int64_t e = i / (rows.parts * down * across), part = i / (down * across) % rows.parts;
        const int64_t n = i / across % down * high, k = i % across * wide;
        const int64_t some_rows = at_most(rows.length - n, high);
        const int64_t some_columns = at_most(columns.length - k, wide);
        T* at = to + (e * rows.size() + part * rows.length + n) * columns.length + k;
        if (!of.size(e)) {
            for (int64_t r = 0; r < some_rows; ++r) memset(at + r * columns.length, 0, some_columns * sizeof(T));
            return;
        }
        const Tiles tiles(scratch, F);
        Word *panels = (Word*)tiles.left, *rights[2] = {(Word*)tiles.right, (Word*)tiles.right + kInner * kColumns};
        const int64_t step = inner_step<Word>(of.size(e));
        for (int64_t s = 0; s < of.size(e); s += step) {
            const int64_t slots = at_most(of.size(e) - s, step), inner = words<Word>(slots);
            const auto* from = left + (of.begin(e) + s) * rows.row() + part * moe_row(rows.length) + n;
            // a few slots at a time: the first cache holds them for all panels
            for (int64_t m = 0; m < slots; m += 16) {
                prefetch(at_most(slots - m - 32, 16), some_rows, from + (m + 32) * rows.row(), rows.row());
                for (int64_t r = 0; r < some_rows; r += kPanel)
                    fill_rows(at_most(slots - m, 16), padded(at_most(some_rows - r, kPanel)), from + m * rows.row() + r,
                              rows.row(), panels + r * inner + words<Word>(m) * kPanel, kPanel);
            }
            const auto tile = [&](int64_t j) {
                return Stripes<Word>{rights[j / kColumns % 2], inner, at_most(some_columns - j, kColumns)};
            };
            const auto fill = [&](int64_t j, int64_t begin, int64_t end) {
                const int64_t first = begin * kNumbers<Word>, some = at_most(slots, end * kNumbers<Word>) - first;
                const auto row = [&](int64_t i) { return right(of.begin(e) + s + first + i) + k + j; };
                fill_rows(some, right.readable(tile(j).columns), row, tile(j), begin);
            };
            fill(0, 0, inner);
            for (int64_t j = 0; j < some_columns; j += kColumns) {
                const int64_t next = j + kColumns, few = tile(j).columns;
                for (int64_t r = 0; r < some_rows; r += kPanel) {
                    T* corner = at + r * columns.length + j;
                    const auto put = [=](int64_t i, int64_t c, vf x) {
                        store_up_to(corner + i * columns.length + c, x, few - c);
                    };
                    // this panel's part of filling the next tile
                    const int64_t begin = inner * r / some_rows, end = inner * at_most(r + kPanel, some_rows) / some_rows;
                    multiply(at_most(some_rows - r, kPanel), inner, Turned<Word>{panels + r * inner, kPanel}, tile(j), 0,
                             part_of_sum(s == 0, s + slots == of.size(e), tiles.out + r * kWeightColumns + j,
                                         kWeightColumns, put),
                             next < some_columns ? end - begin : 0,
                             [&](int64_t from, int64_t to) { fill(next, begin + from, begin + to); });
                }
            }
        }
    });
}

// to [E, columns] = the sum over each expert's slots of rows, times weight[pair of the slot] where there is such.
template <typename N>
void sum_slots(const MoEProblem& p, const N* from, const Axis& columns, const float* weight, float* to, int threads) {
    const Sections of{p.ends, p.experts};
    const int64_t across = blocks(columns.length, kColumns);
    parallel_for(of.experts * columns.parts * across, threads, [&](int64_t i) {
        const int64_t e = i / (columns.parts * across), part = i / across % columns.parts;
        const int64_t begin = i % across * kColumns, end = at_most(columns.length, begin + kColumns);
        for (int64_t c = begin; c < end; c += kLanes) {
            vf sum = {};
            for (int64_t s = of.begin(e); s < p.ends[e]; ++s)
                sum += load(from + s * columns.row() + part * moe_row(columns.length) + c) *
                       (weight ? weight[p.order[s]] : 1.0f);
            store_up_to(to + e * columns.size() + part * columns.length + c, sum, end - c);
        }
    });
}

// to [slots, D] = the token of each slot.
template <typename T, typename N>
void gather_tokens(const MoEProblem& p, const T* from, int64_t from_row, N* to, int threads) {
    for_row_blocks(p.tokens * p.top_k, threads, [&](int64_t begin, int64_t end, int64_t) {
        for (int64_t s = begin; s < end; ++s) {
            const T* row = from + p.order[s] / p.top_k * from_row;
            for (int64_t c = 0; c < p.D; c += kLanes)
                store(to + s * moe_row(p.D) + c, load_up_to(row + c, p.D - c));
        }
    });
}

// to [tokens, D] = the sum over a token's choices, weighted where there are weights [tokens, top_k].
template <typename T, typename N>
void sum_choices(const MoEProblem& p, const N* from, const float* weight, T* to, int threads) {
    for_row_blocks(p.tokens, threads, [&](int64_t begin, int64_t end, int64_t) {
        for (int64_t t = begin; t < end; ++t) {
            for (int64_t c = 0; c < p.D; c += kLanes) {
                vf sum = {};
                for (int64_t i = t * p.top_k; i < (t + 1) * p.top_k; ++i)
                    sum += load(from + p.inverse[i] * moe_row(p.D) + c) * (weight ? weight[i] : 1.0f);
                store_up_to(to + t * p.D + c, sum, p.D - c);
            }
        }
    });
}

// Value and derivative.
struct Silu {
    static void at(vf x, vf& value, vf& slope) {
        const vf s = sigmoid(x);
        value = x * s;
        slope = s + value * (1.0f - s);
    }
};
struct Gelu {
    static void at(vf x, vf& value, vf& slope) {
        const vf cdf = 0.5f + 0.5f * erf(x * 0.70710678118654752f);
        value = x * cdf;
        slope = cdf + x * 0.39894228040143268f * exp(x * x * -0.5f);
    }
};
struct Relu {
    static void at(vf x, vf& value, vf& slope) {
        value = select(x <= 0.0f, splat(0.0f), x);  // NaN stays NaN
        slope = select(x <= 0.0f, splat(0.0f), splat(1.0f));
    }
};
struct Relu2 {
    static void at(vf x, vf& value, vf& slope) {
        const vf r = select(x <= 0.0f, splat(0.0f), x);
        value = r * r;
        slope = r + r;
    }
};

template <typename Body> void with_activation(int which, const Body& body) {
    switch (which) {
        case 0: return body(Silu());
        case 1: return body(Gelu());
        case 2: return body(Relu());
        default: return body(Relu2());
    }
}

// value [F] = the gated activation of a slot, slope [F] = the activation's derivative at the gate; returns 1 / RMS.
template <typename Activation, typename T>
float activate(const MoEProblem& p, const T* hidden, float* value, float* slope) {
    vf squares = {};
    for (int64_t c = 0; c < p.F; c += kLanes) {
        vf a, d;
        Activation::at(load(hidden + c), a, d);
        if (p.gated) a *= load(hidden + moe_row(p.F) + c);
        squares += a * a;
        store(value + c, a);
        store(slope + c, d);
    }
    return p.sub_norm ? 1.0f / __builtin_sqrtf(sum(squares) / (float)p.F + kEpsilon) : 1.0f;
}

template <typename Word, typename T> void forward(const MoEProblem& p, T* y, float* scratch, int threads) {
    const Shape shape(p);
    const Sections of{p.ends, p.experts};
    auto* x = (Number<Word>*)scratch;
    auto* inner = x + shape.slots * shape.outer.row();
    float* rest = scratch + shape.slots * (shape.outer.row() + shape.inner.row());
    auto* hidden = (T*)p.hidden;
    gather_tokens(p, (const T*)p.x, p.x_row, x, threads);
    const bool alone = !p.gated && !p.sub_norm;  // an activation needs its own channel alone
    const auto activate_block = [&](int64_t row, int64_t rows, int64_t column, int64_t columns) {
        if (!alone) return;
        with_activation(p.activation, [&](auto activation) {
            for (int64_t s = row; s < row + rows; ++s)
                for (int64_t c = column; c < column + columns; c += kLanes) {
                    vf value, slope;
                    activation.at(load(hidden + s * shape.hidden.row() + c), value, slope);
                    store(inner + s * shape.inner.row() + c, value);
                }
        });
    };
    multiply_rows<true, Word>(of, x, shape.outer, (const T*)p.w_in, shape.hidden, p.b_in, hidden, rest, p.F, threads,
                              activate_block);
    const auto activate_row = [&](int64_t s, auto activation) {
        const Tiles tiles(rest, p.F);
        const float r = activate<decltype(activation)>(p, hidden + s * shape.hidden.row(), tiles.value, tiles.slope);
        for (int64_t c = 0; c < p.F; c += kLanes) {
            const vf gain = p.sub_norm ? load_up_to(p.sub_norm + c, p.F - c) * r : splat(1.0f);
            store(inner + s * shape.inner.row() + c, load(tiles.value + c) * gain);
        }
    };
    if (!alone)
        with_activation(p.activation, [&](auto activation) {
            for_row_blocks(shape.slots, threads, [&](int64_t begin, int64_t end, int64_t) {
                for (int64_t s = begin; s < end; ++s) activate_row(s, activation);
            });
        });
    multiply_rows<true, Word>(of, inner, shape.inner, (const T*)p.w_out, shape.outer, p.b_out, x, rest, p.F, threads);
    sum_choices(p, x, p.gates, y, threads);
}

// From dinner [slots, F], the gradient of what the second product reads but for the gate: dhidden, gradients of gates,
// and in `inner` gate times what the second product read. dnorm: row_blocks(slots) parts of the gradient of sub_norm.
template <typename Activation, typename T, typename N>
void inner_backward(const MoEProblem& p, const Shape& shape, const N* dy, const N* dinner, N* inner, N* dhidden,
                    float* dgates, float* dnorm, float* rest, int threads) {
    const int64_t F = p.F, half = moe_row(F);
    for_row_blocks(shape.slots, threads, [&](int64_t begin, int64_t end, int64_t block) {
        const Tiles tiles(rest, F);
        float* sums = dnorm + block * half;
        for (int64_t c = 0; c < half; ++c) sums[c] = 0.0f;
        int64_t e = 0;
        for (int64_t s = begin; s < end; ++s) {
            while (s >= p.ends[e]) ++e;
            const T* hidden = (const T*)p.hidden + s * shape.hidden.row();
            const N* d = dinner + s * half;
            const float gate = p.gates[p.order[s]];
            const float r = activate<Activation>(p, hidden, tiles.value, tiles.slope);
            vf dots = {}, of_bias = {};
            for (int64_t c = 0; c < F; c += kLanes) {
                const vf gain = p.sub_norm ? load_up_to(p.sub_norm + c, F - c) : splat(1.0f);
                const vf normal = load(tiles.value + c) * r, dc = load(d + c);
                dots += dc * normal * gain;
                store(inner + s * half + c, normal * gain * gate);
                if (p.sub_norm) store(sums + c, load(sums + c) + dc * normal * gate);
            }
            if (p.b_out)
                for (int64_t c = 0; c < p.D; c += kLanes)
                    of_bias += load(dy + s * moe_row(p.D) + c) * load_up_to(p.b_out + e * p.D + c, p.D - c);
            const float dot = sum(dots), mean = p.sub_norm ? dot / (float)F : 0.0f;
            dgates[p.order[s]] = dot + sum(of_bias);
            N* to = dhidden + s * shape.hidden.row();
            for (int64_t c = 0; c < F; c += kLanes) {
                const vf gain = p.sub_norm ? load_up_to(p.sub_norm + c, F - c) : splat(1.0f);
                const vf dvalue = (load(d + c) * gain - load(tiles.value + c) * r * mean) * r * gate;
                if (!p.gated) {
                    store(to + c, dvalue * load(tiles.slope + c));
                    continue;
                }
                vf value, slope;
                Activation::at(load(hidden + c), value, slope);
                store(to + c, dvalue * slope * load(hidden + half + c));
                store(to + half + c, dvalue * value);
            }
        }
    });
}

template <typename Word, typename T>
void backward(const MoEProblem& p, const MoEGradients& g, float* scratch, int threads) {
    using N = Number<Word>;
    const Shape shape(p);
    const Sections of{p.ends, p.experts};
    const auto rows = [&](const Axis& of_axis) {
        auto* at = (N*)scratch;
        scratch += shape.slots * of_axis.row();
        return at;
    };
    N *x = rows(shape.outer), *dy = rows(shape.outer), *inner = rows(shape.inner), *dinner = rows(shape.inner);
    N* dhidden = rows(shape.hidden);
    float *dnorm = scratch, *rest = scratch + row_blocks(shape.slots) * moe_row(p.F);
    gather_tokens(p, (const T*)g.dy, g.dy_row, dy, threads);
    const auto *w_in = (const T*)p.w_in, *w_out = (const T*)p.w_out;
    multiply_rows<false, Word>(of, dy, shape.outer, w_out, shape.inner, nullptr, dinner, rest, p.F, threads);
    with_activation(p.activation, [&](auto activation) {
        inner_backward<decltype(activation), T>(p, shape, dy, dinner, inner, dhidden, g.dgates, dnorm, rest, threads);
    });
    if (g.dsub_norm) {
        for (int64_t c = 0; c < p.F; ++c) {
            float sum = 0.0f;
            for (int64_t block = 0; block < row_blocks(shape.slots); ++block) sum += dnorm[block * moe_row(p.F) + c];
            g.dsub_norm[c] = sum;
        }
    }
    if (g.db_out) sum_slots(p, dy, shape.outer, p.gates, g.db_out, threads);
    if (g.db_in) sum_slots(p, dhidden, shape.hidden, nullptr, g.db_in, threads);
    if (g.dw_out)
        multiply_slots<Word>(of, dy, shape.outer, OwnRows<N>{inner, shape.inner.row()}, shape.inner, (T*)g.dw_out, rest,
                             p.F, threads);
    if (g.dw_in)
        multiply_slots<Word>(of, dhidden, shape.hidden, TokenRows<T>{(const T*)p.x, p}, shape.outer, (T*)g.dw_in, rest,
                             p.F, threads);
    if (g.dx) {
        multiply_rows<false, Word>(of, dhidden, shape.hidden, w_in, shape.outer, nullptr, x, rest, p.F, threads);
        sum_choices(p, x, nullptr, (T*)g.dx, threads);
    }
}

// The router: a few vectors of work per token; the sums over tokens and the order of the pairs go block by block.
// Floats of a block of tokens: its sum of softmaxes, the sum of its squared logsumexps, and two rows for its work.
int64_t router_floats(int64_t experts) { return 3 * padded(experts) + kLanes; }

// p [padded(n)] = softmax of logits [n], zeros after it; returns the logsumexp.
float softmax(const float* logits, int64_t n, float* p) {
    const float least = -__builtin_inff();
    vf most = splat(least), total = {};
    const auto at = [=](int64_t c) {
        return n - c < kLanes ? load_part(logits + c, (int)(n - c), least) : load(logits + c);
    };
    for (int64_t c = 0; c < n; c += kLanes) most = max(most, at(c));
    const float top = max_lane(most);
    for (int64_t c = 0; c < n; c += kLanes) {
        const vf x = exp(at(c) - top);
        store(p + c, x);
        total += x;
    }
    const float all = sum(total);
    for (int64_t c = 0; c < n; c += kLanes) store(p + c, load(p + c) / all);
    return top + __builtin_logf(all);
}

// The top_k largest of scores [n], the largest first: NaN before all others, of equal ones the lowest index first.
void choose(const float* scores, int64_t n, int64_t top_k, int32_t* chosen) {
    const auto before = [&](int64_t a, int64_t b) {
        return scores[a] > scores[b] || (scores[a] != scores[a] && scores[b] == scores[b]);
    };
    for (int64_t e = 0, found = 0; e < n; ++e) {
        int64_t at = found;
        for (; at > 0 && before(e, chosen[at - 1]); --at)
            if (at < top_k) chosen[at] = chosen[at - 1];
        if (at == top_k) continue;
        chosen[at] = (int32_t)e;
        found = at_most(found + 1, top_k);
    }
}

// weights [padded(top_k)] = the softmax over the chosen logits.
void among_chosen(const float* logits, const int32_t* chosen, int64_t top_k, float* own, float* weights) {
    for (int64_t j = 0; j < top_k; ++j) own[j] = logits[chosen[j]];
    softmax(own, top_k, weights);
}

}  // namespace

int64_t moe_forward_scratch(const MoEProblem& p, int threads) {
    const Shape s(p);
    return s.slots * (s.outer.row() + s.inner.row()) + threads * Tiles::floats(p.F);
}
int64_t moe_backward_scratch(const MoEProblem& p, int threads) {
    const Shape s(p);
    return s.slots * (2 * s.outer.row() + 2 * s.inner.row() + s.hidden.row()) +
           row_blocks(s.slots) * moe_row(p.F) + threads * Tiles::floats(p.F);
}

void moe_forward(const MoEProblem& p, void* y, float* scratch, int threads) {
    if (p.dtype == kFloat32) forward<float>(p, (float*)y, scratch, threads);
    else if (p.dtype == kFloat16) forward<float>(p, (FP16*)y, scratch, threads);
    else if constexpr (kPairs) forward<Pair>(p, (Rounded*)y, scratch, threads);
    else forward<float>(p, (BF16*)y, scratch, threads);
}

void moe_backward(const MoEProblem& p, const MoEGradients& g, float* scratch, int threads) {
    if (p.dtype == kFloat32) backward<float, float>(p, g, scratch, threads);
    else if (p.dtype == kFloat16) backward<float, FP16>(p, g, scratch, threads);
    else if constexpr (kPairs) backward<Pair, Rounded>(p, g, scratch, threads);
    else backward<float, BF16>(p, g, scratch, threads);
}

int64_t moe_route_scratch(int64_t tokens, int64_t experts) {
    return row_blocks(tokens) * (router_floats(experts) + padded(experts));
}

void moe_route(const MoERouting& r, int64_t* order, int64_t* inverse, int64_t* ends, int64_t* counts, float* mean_prob,
               float* z, float* scratch, int threads) {
    const int64_t E = r.experts, row = padded(E), parts = row_blocks(r.tokens);
    const auto own = [=](int64_t block) { return scratch + block * router_floats(E); };
    const auto count = [=](int64_t block) { return (int32_t*)(scratch + parts * router_floats(E)) + block * row; };
    for_row_blocks(r.tokens, threads, [&](int64_t begin, int64_t end, int64_t block) {
        float *probs = own(block), *p = probs + row, *scores = p + row, *squares = scores + row;
        memset(probs, 0, row * sizeof(float));
        memset(count(block), 0, row * sizeof(int32_t));
        *squares = 0.0f;
        for (int64_t t = begin; t < end; ++t) {
            const float *logits = r.logits + t * E, lse = softmax(logits, E, p);
            int32_t* chosen = r.chosen + t * r.top_k;
            *squares += lse * lse;
            for (int64_t c = 0; c < E; c += kLanes) store(probs + c, load(probs + c) + load(p + c));
            for (int64_t e = 0; r.select_bias && e < E; ++e) scores[e] = p[e] + r.select_bias[e];
            choose(r.select_bias ? scores : logits, E, r.top_k, chosen);
            for (int64_t j = 0; j < r.top_k; ++j) ++count(block)[chosen[j]];
            float* gates = r.gates + t * r.top_k;
            if (r.normalize) {
                among_chosen(logits, chosen, r.top_k, scores, p);
                memcpy(gates, p, r.top_k * sizeof(float));
            } else {
                for (int64_t j = 0; j < r.top_k; ++j) gates[j] = p[chosen[j]];
            }
            for (int64_t j = 0; lse != lse && j < r.top_k; ++j) gates[j] = lse;  // a NaN may not be among the chosen
        }
    });
    // Counts become the first slots of each block.
    int64_t slot = 0;
    const float tokens = r.tokens ? (float)r.tokens : 1.0f;
    for (int64_t e = 0; e < E; ++e) {
        const int64_t first = slot;
        float sum = 0.0f;
        for (int64_t block = 0; block < parts; ++block) {
            const int32_t n = count(block)[e];
            count(block)[e] = (int32_t)slot;
            slot += n;
            sum += own(block)[e];
        }
        ends[e] = slot;
        counts[e] = slot - first;
        mean_prob[e] = sum / tokens;
    }
    *z = 0.0f;
    for (int64_t block = 0; block < parts; ++block) *z += own(block)[3 * row] / tokens;
    for_row_blocks(r.tokens, threads, [&](int64_t begin, int64_t end, int64_t block) {
        int32_t* next = count(block);
        for (int64_t pair = begin * r.top_k; pair < end * r.top_k; ++pair) {
            inverse[pair] = next[r.chosen[pair]]++;
            order[inverse[pair]] = pair;
        }
    });
}

void moe_route_backward(const MoERouting& r, const float* dgates, const float* dmean_prob, float dz, float* dlogits,
                        float* scratch, int threads) {
    const int64_t E = r.experts, row = padded(E);
    const float tokens = (float)r.tokens;
    for_row_blocks(r.tokens, threads, [&](int64_t begin, int64_t end, int64_t block) {
        float *p = scratch + block * router_floats(E), *d = p + row, *q = d + row;
        for (int64_t t = begin; t < end; ++t) {
            const float *logits = r.logits + t * E, *dgate = dgates + t * r.top_k;
            const int32_t* chosen = r.chosen + t * r.top_k;
            const float lse = softmax(logits, E, p);
            for (int64_t c = 0; c < E; c += kLanes) store(d + c, load_up_to(dmean_prob + c, E - c) / tokens);
            if (!r.normalize)
                for (int64_t j = 0; j < r.top_k; ++j) d[chosen[j]] += dgate[j];
            vf dots = {};
            for (int64_t c = 0; c < E; c += kLanes) dots += load(p + c) * load(d + c);
            const float dot_all = sum(dots), of_z = 2.0f * dz * lse / tokens;
            for (int64_t c = 0; c < E; c += kLanes)
                store_up_to(dlogits + t * E + c, load(p + c) * (load(d + c) - dot_all + of_z), E - c);
            if (!r.normalize) continue;
            among_chosen(logits, chosen, r.top_k, d, q);
            float dot = 0.0f;
            for (int64_t j = 0; j < r.top_k; ++j) dot += q[j] * dgate[j];
            for (int64_t j = 0; j < r.top_k; ++j) dlogits[t * E + chosen[j]] += q[j] * (dgate[j] - dot);
        }
    });
}

}  // namespace ULTRA_ISA
}  // namespace ultra

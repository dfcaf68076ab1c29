// Contract: ultra_kernels/masked_linear_cross_entropy/op.py. Gradients are made with the loss: a block of rows is
// multiplied by the vocabulary once, and what stays of its logits are exponentials [V, rows] below their tile's maximum.
// Recomputing the logits instead would save that memory and cost a fourth product of this size.
//
//     e[c, r] = exp(l[c, r] - top[tile, r])     dl[c, r] = e[c, r] * exp(top - most) / sum * gain - (c == label) * scale
//     dweight = dl x                            dx = dlᵀ weight, summed in sections of the vocabulary
//
// Logits lie transposed, so that every product reads the weights by rows: on the left of the logits and, a tile of
// classes at a time, on the right of dx. x is laid out once for all tiles.
#include "masked_linear_cross_entropy/masked_linear_cross_entropy.h"

#include "common/blocks.h"
#include "common/parallel.h"

#include <math.h>
#include <string.h>

namespace ultra {
namespace ULTRA_ISA {

namespace {

// Bytes of a block of rows: its exponentials, and its dx in sections. Fewer rows mean more passes over dweight.
constexpr int64_t kKept = 64 << 20, kPartial = 16 << 20;
constexpr int64_t kLeastRows = 256, kMostRows = 1024;
constexpr int64_t kLeastSections = 4, kMostSections = 64;
constexpr float kLowest = -3.4028235e38f;  // finite: a tile of logits that are all -inf has exponentials 0

// Classes of a tile, even: so many rows on the left make up for filling what is on the right.
template <typename Word> constexpr int64_t kClasses = 96 * kNumbers<Word>;

void set(float* p, float x) { *p = x; }
void set(Rounded* p, float x) { store_scalar((BF16*)p, x); }
float get(const float* p) { return *p; }
float get(const Rounded* p) { return to_float(BF16{p->bits}); }

// Sizes that follow from the problem alone, so that sums are cut the same way for every number of threads.
template <typename Word> struct Shape {
    int64_t T, D, V;
    int64_t rows;              // of a block
    int64_t tiles, sections;   // of the vocabulary
    int64_t lanes, kept_row;   // rows padded to whole vectors, and to whole vectors of words
    int64_t x_row, dx_row;     // D padded: words, numbers

    explicit Shape(const CrossEntropyProblem& p) : T(p.T), D(p.D), V(p.V) {
        int64_t most = kKept / (V * (int64_t)sizeof(Word) / kNumbers<Word>);
        most = most < kLeastRows ? kLeastRows : at_most(most, kMostRows);
        rows = blocks(p.rows, blocks(p.rows, most));
        tiles = blocks(V, kClasses<Word>);
        lanes = padded(rows);
        kept_row = padded(words<Word>(rows)) * kNumbers<Word>;
        x_row = padded(words<Word>(D));
        dx_row = blocks(D, kColumns) * kColumns;
        const int64_t some = kPartial / (rows * dx_row * (int64_t)sizeof(float));
        sections = at_most(tiles, some < kLeastSections ? kLeastSections : at_most(some, kMostSections));
    }
    int64_t classes(int64_t tile) const { return at_most(V - tile * kClasses<Word>, kClasses<Word>); }
};

// What all threads share.
template <typename Word> struct Shared {
    Word *x, *x_turned, *x_panels;   // [rows, x_row], panels [D, kColumns] and [rows, kColumns]
    float *top, *sums;               // [tiles, lanes]: maximum and sum of exponentials
    float *most, *gain, *at_label;   // [lanes]: maximum, what multiplies exponentials below it, the label's logit
    Word* kept;                      // [V, kept_row] numbers: the exponentials
    float *dx, *dweight;             // [sections, rows, dx_row]; [V, D], sums that bfloat16 cannot hold
    int64_t floats = 0;

    // scratch may be null, to count the floats.
    Shared(float* scratch, const Shape<Word>& s, const CrossEntropyProblem& p, const CrossEntropyGradients& g) {
        const auto take = [&](int64_t n) {
            floats += n;
            return scratch && n ? scratch + (floats - n) : nullptr;
        };
        const bool all = g.dweight;
        x = (Word*)take(s.rows * s.x_row);
        x_turned = (Word*)take(blocks(s.rows, kColumns) * kColumns * words<Word>(s.D));
        top = take(s.tiles * s.lanes), sums = take(s.tiles * s.lanes);
        most = take(s.lanes), gain = take(s.lanes), at_label = take(s.lanes);
        x_panels = (Word*)take(all ? s.dx_row * words<Word>(s.rows) : 0);
        kept = (Word*)take(all ? s.V * (s.kept_row / kNumbers<Word>) : 0);
        dx = take(all ? s.sections * s.rows * s.dx_row : 0);
        dweight = take(all && g.dweight_dtype != kFloat32 && s.rows < p.rows ? s.V * s.D : 0);
    }
    Stripes<Word> panel(const Shape<Word>& s, int64_t j, int64_t columns) const {
        return {x_panels + j * words<Word>(s.rows), words<Word>(s.rows), columns};
    }
};

// Scratch memory of a thread.
template <typename Word> struct Own {
    Word *left, *right, *along, *down;  // right: a panel of the weights; along and down: dl
    float *out, *factor;

    Own(float* scratch, const Shape<Word>& s) {
        float* at = scratch + thread_index() * floats(s);
        left = (Word*)at, at += kClasses<Word> * s.x_row;
        right = (Word*)at, at += words<Word>(kClasses<Word>) * kColumns;
        along = (Word*)at, at += kClasses<Word> * s.kept_row / kNumbers<Word>;
        down = kNumbers<Word> > 1 ? (Word*)at : along, at += down_floats(s);
        out = at, at += kClasses<Word> * kColumns;
        factor = at;
    }
    static int64_t down_floats(const Shape<Word>& s) {
        return kNumbers<Word> > 1 ? words<Word>(kClasses<Word>) * s.lanes : 0;
    }
    static int64_t floats(const Shape<Word>& s) {
        return kClasses<Word> * s.x_row + words<Word>(kClasses<Word>) * kColumns +
               kClasses<Word> * s.kept_row / kNumbers<Word> + down_floats(s) + kClasses<Word> * kColumns + s.lanes;
    }
};

// Rows of numbers as rows of words: neighbours in a row make a pair.
template <typename Word, typename T>
void fill_along(int64_t columns, const T* from, Word* to) {
    for (int64_t c = 0; c < columns; c += kLanes) store(numbers(to) + c, load_up_to(from + c, columns - c));
}

// Rows of numbers as a right tile: neighbours in a column make a pair, to which float32 is rounded.
template <typename Word, typename T>
void fill_right(const T* from, int64_t from_row, int64_t rows, const Stripes<Word>& to) {
    if constexpr (sizeof(T) * kNumbers<Word> > sizeof(Word))
        fill_words(rows, to,
                   [&](int64_t i, int64_t c) { return load_up_to(from + i * from_row + c, to.columns - c); });
    else
        fill_rows(rows, to.columns, [=](int64_t i) { return from + i * from_row; }, to);
}

// The labelled rows of hidden in the layouts of their three uses.
template <typename Word>
void lay_out(const CrossEntropyProblem& p, const Shape<Word>& s, const int64_t* labelled, int64_t rows,
             const Shared<Word>& to, int threads) {
    parallel_for(blocks(rows, kColumns), threads, [&](int64_t panel) {
        const int64_t i = panel * kColumns, some = at_most(rows - i, kColumns);
        for (int64_t r = i; r < i + some; ++r) {
            const int64_t from = labelled[r] * p.hidden_row;
            Word* x = to.x + r * s.x_row;
            if (p.hidden_dtype == kFloat32) fill_along(s.D, (const float*)p.hidden + from, x);
            else if (p.hidden_dtype == kBFloat16) fill_along(s.D, (const BF16*)p.hidden + from, x);
            else fill_along(s.D, (const FP16*)p.hidden + from, x);
        }
        const Stripes<Word> turned{to.x_turned + i * words<Word>(s.D), words<Word>(s.D), some};
        turned.each(0, [&](int64_t j, int64_t few, Word* at, int64_t) {
            transpose(few, words<Word>(s.D), to.x + (i + j) * s.x_row, s.x_row, at);
        });
    });
    if (!to.x_panels) return;
    parallel_for(blocks(s.D, kColumns), threads, [&](int64_t panel) {
        const int64_t j = panel * kColumns, some = at_most(s.D - j, kColumns);
        fill_rows(rows, some, [&](int64_t i) { return numbers(to.x + i * s.x_row) + j; }, to.panel(s, j, some));
    });
}

// Maximum, exponentials below it and their sum, over the classes of a tile for the rows of a panel `out`.
template <typename Number>
void exponentials(int64_t classes, int64_t rows, const float* out, const float* bias, float* top, float* sums,
                  Number* kept, int64_t kept_row) {
    for (int64_t i = 0; i < rows; i += kLanes) {
        vf most = splat(kLowest), sum = {};
        for (int64_t c = 0; c < classes; ++c)
            most = max(load(out + c * kColumns + i) + (bias ? bias[c] : 0.0f), most);
        for (int64_t c = 0; c < classes; ++c) {
            const vf e = exp(load(out + c * kColumns + i) + (bias ? bias[c] : 0.0f) - most);
            sum += e;
            if (kept) store(kept + c * kept_row + i, e);
        }
        store(top + i, most);
        store(sums + i, sum);
    }
}

// Fills top, sums, at_label and, where gradients are wanted, the exponentials.
template <typename Word, typename T>
void logits(const CrossEntropyProblem& p, const Shape<Word>& s, const int64_t* labelled, int64_t rows,
            const Shared<Word>& shared, float* scratch, int threads) {
    parallel_for(s.tiles, threads, [&](int64_t tile) {
        const Own<Word> own(scratch, s);
        const int64_t first = tile * kClasses<Word>, classes = s.classes(tile), inner = words<Word>(s.D);
        const float* bias = p.bias ? p.bias + first : nullptr;
        for (int64_t c = 0; c < classes; ++c)
            fill_along(s.D, (const T*)p.weight + (first + c) * p.weight_row, own.left + c * s.x_row);
        for (int64_t i = 0; i < rows; i += kColumns) {
            const int64_t some = at_most(rows - i, kColumns);
            const Stripes<Word> right{shared.x_turned + i * inner, inner, some};
            for (int64_t k = 0; k < inner; k += kInner)
                multiply(classes, at_most(inner - k, kInner), Factor<Word>{own.left + k, s.x_row}, right, k,
                         Product<float>{own.out, kColumns, k > 0});
            auto* kept = shared.kept ? numbers(shared.kept) + first * s.kept_row + i : nullptr;
            exponentials(classes, some, own.out, bias, shared.top + tile * s.lanes + i,
                         shared.sums + tile * s.lanes + i, kept, s.kept_row);
            for (int64_t r = i; r < i + some; ++r)
                if (const int64_t c = p.labels[labelled[r]] - first; c >= 0 && c < classes)
                    shared.at_label[r] = own.out[c * kColumns + r - i] + (bias ? bias[c] : 0.0f);
        }
    });
}

// The loss of a block of rows; fills `most` and `gain`.
template <typename Word>
double combine(const CrossEntropyProblem& p, const Shape<Word>& s, int64_t rows, const Shared<Word>& shared) {
    double loss = 0.0;
    for (int64_t i = 0; i < rows; i += kLanes) {
        vf most = splat(kLowest), sum = {};
        for (int64_t t = 0; t < s.tiles; ++t) most = max(load(shared.top + t * s.lanes + i), most);
        for (int64_t t = 0; t < s.tiles; ++t)
            sum += load(shared.sums + t * s.lanes + i) * exp(load(shared.top + t * s.lanes + i) - most);
        store(shared.most + i, most);
        store(shared.gain + i, splat(0.0f));
        for (int64_t r = i; r < at_most(rows, i + kLanes); ++r) {
            const double lse = most[r - i] + log((double)sum[r - i]);
            loss += lse - shared.at_label[r] + p.z_loss * lse * lse;
            shared.gain[r] = (float)(p.scale * (1.0 + 2.0 * p.z_loss * lse) / sum[r - i]);
        }
    }
    return loss;
}

// Two rows of dl where they are left factors: one below the other, and as pairs. Of floats they are there already.
void store_down(float*, vf, vf) {}
void store_down(Pair* to, vf a, vf b) { store(to, a, b); }

// The gradient of a tile's logits, as both left factors.
template <typename Word>
void dlogits(const CrossEntropyProblem& p, const Shape<Word>& s, const int64_t* labelled, int64_t rows, int64_t tile,
             const Shared<Word>& shared, const Own<Word>& own, const Tile<Word>& to, float* dbias, bool add) {
    const int64_t first = tile * kClasses<Word>, classes = s.classes(tile), lanes = padded(rows);
    const auto* kept = numbers(shared.kept) + first * s.kept_row;
    for (int64_t i = 0; i < lanes; i += kLanes)
        store(own.factor + i, exp(load(shared.top + tile * s.lanes + i) - load(shared.most + i)) *
                                  load(shared.gain + i));
    for (int64_t c = 0; c < classes; c += 2) {
        const bool both = c + 1 < classes;
        const auto *one = kept + c * s.kept_row, *two = one + (both ? s.kept_row : 0);
        auto *row = to.rows() + c * to.rows_row(), *next = row + to.rows_row();
        vf total = {}, of_next = {};
        for (int64_t i = 0; i < lanes; i += kLanes) {
            const vf factor = load(own.factor + i);
            const vf a = load(one + i) * factor, b = both ? load(two + i) * factor : splat(0.0f);
            total += a, of_next += b;
            store(row + i, a);
            if (both) store(next + i, b);
            store_down(to.down + words<Word>(c) * to.down_row() + i, a, b);
        }
        if (dbias) dbias[first + c] = sum(total) + (add ? dbias[first + c] : 0.0f);
        if (dbias && both) dbias[first + c + 1] = sum(of_next) + (add ? dbias[first + c + 1] : 0.0f);
    }
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t c = p.labels[labelled[r]] - first;
        if (c < 0 || c >= classes) continue;
        auto* at = to.rows() + c * to.rows_row() + r;
        set(at, get(kept + c * s.kept_row + r) * own.factor[r] - p.scale);
        numbers(to.down + c / kNumbers<Word> * to.down_row() + r)[c % kNumbers<Word>] = *at;
        if (dbias) dbias[first + c] -= p.scale;
    }
}

// A panel of sums, and of those before it, to a matrix.
template <typename To>
void store_panel(int64_t rows, int64_t columns, const float* from, const float* before, To* to, int64_t to_row) {
    for (int64_t r = 0; r < rows; ++r, from += kColumns, to += to_row)
        for (int64_t c = 0; c < columns; c += kLanes) {
            vf x = load(from + c);
            if (before) x += load_up_to(before + r * to_row + c, columns - c);
            store_up_to(to + c, x, columns - c);
        }
}

// Of the labelled rows from number `begin` on.
template <typename Word, typename T>
void gradients(const CrossEntropyProblem& p, const CrossEntropyGradients& g, const Shape<Word>& s, int64_t begin,
               int64_t rows, const Shared<Word>& shared, float* scratch, int threads) {
    const int64_t inner = words<Word>(rows), step = blocks(inner, blocks(inner, kInner));
    const bool last = begin + rows == p.rows;
    float* sums = g.dweight_dtype == kFloat32 ? (float*)g.dweight : shared.dweight;
    parallel_for(s.sections, threads, [&](int64_t section) {
        const Own<Word> own(scratch, s);
        const Tile<Word> dl{rows, own.along, own.down};
        const int64_t begin_tile = section * s.tiles / s.sections, end = (section + 1) * s.tiles / s.sections;
        for (int64_t tile = begin_tile; tile < end; ++tile) {
            const int64_t first = tile * kClasses<Word>, classes = s.classes(tile);
            dlogits(p, s, p.labelled + begin, rows, tile, shared, own, dl, g.dbias, begin > 0);
            for (int64_t j = 0; j < s.D; j += kColumns) {
                const int64_t some = at_most(s.D - j, kColumns), at = first * s.D + j;
                const T* weights = (const T*)p.weight + first * p.weight_row + j;
                float* dx = shared.dx + section * rows * s.dx_row + j;
                prefetch(classes, some, weights, p.weight_row);
                for (int64_t k = 0; k < inner; k += step)
                    multiply(classes, at_most(inner - k, step), Factor<Word>{dl.along + k, dl.along_row()},
                             shared.panel(s, j, some), k, Product<float>{own.out, kColumns, k > 0});
                const float* before = begin > 0 ? sums + at : nullptr;
                if (last && g.dweight_dtype != kFloat32)
                    store_panel(classes, some, own.out, before, (BF16*)g.dweight + at, s.D);
                else
                    store_panel(classes, some, own.out, before, sums + at, s.D);
                const Stripes<Word> right{own.right, words<Word>(classes), some};
                fill_right(weights, p.weight_row, classes, right);
                multiply(rows, words<Word>(classes), dl.left_turned(), right, 0,
                         Product<float>{dx, s.dx_row, tile > begin_tile});
            }
        }
    });
}

template <typename To> void zero_rows(int64_t begin, int64_t end, int64_t columns, To* to) {
    memset(to + begin * columns, 0, (end - begin) * columns * sizeof(To));
}

// dhidden of a block of labelled rows, the sum of its sections, and zeros in the rows before each of them.
template <typename Word, typename To>
void store_dhidden(const CrossEntropyProblem& p, const Shape<Word>& s, int64_t begin, int64_t rows, const float* dx,
                   To* to, int threads) {
    constexpr int64_t few = 16;
    parallel_for(blocks(rows, few), threads, [&](int64_t block) {
        for (int64_t r = block * few; r < at_most(rows, (block + 1) * few); ++r) {
            const int64_t i = begin + r, row = p.labelled[i];
            zero_rows(i ? p.labelled[i - 1] + 1 : 0, row, s.D, to);
            if (i + 1 == p.rows) zero_rows(row + 1, s.T, s.D, to);
            for (int64_t c = 0; c < s.D; c += kLanes) {
                vf sum = {};
                for (int64_t section = 0; section < s.sections; ++section)
                    sum += load(dx + (section * rows + r) * s.dx_row + c);
                store_up_to(to + row * s.D + c, sum, s.D - c);
            }
        }
    });
}

template <typename Word, typename T>
void run(const CrossEntropyProblem& p, const CrossEntropyGradients& g, float* loss, float* scratch, int threads) {
    const Shape<Word> s(p);
    const Shared<Word> shared(scratch, s, p, g);
    float* rest = scratch + shared.floats;
    double total = 0.0;
    for (int64_t begin = 0; begin < p.rows; begin += s.rows) {
        const int64_t rows = at_most(p.rows - begin, s.rows);
        const int64_t* labelled = p.labelled + begin;
        lay_out(p, s, labelled, rows, shared, threads);
        logits<Word, T>(p, s, labelled, rows, shared, rest, threads);
        total += combine(p, s, rows, shared);
        if (!g.dweight) continue;
        gradients<Word, T>(p, g, s, begin, rows, shared, rest, threads);
        if (g.dhidden_dtype == kFloat32) store_dhidden(p, s, begin, rows, shared.dx, (float*)g.dhidden, threads);
        else store_dhidden(p, s, begin, rows, shared.dx, (BF16*)g.dhidden, threads);
    }
    *loss = (float)(total * p.scale);
}

template <typename Word>
int64_t scratch_of(const CrossEntropyProblem& p, const CrossEntropyGradients& g, int threads) {
    const Shape<Word> s(p);
    return Shared<Word>(nullptr, s, p, g).floats + threads * Own<Word>::floats(s);
}

}  // namespace

bool cross_entropy_has_pairs() { return kPairs; }

int64_t cross_entropy_scratch(const CrossEntropyProblem& p, const CrossEntropyGradients& g, int threads) {
    return p.pairs ? scratch_of<Pair>(p, g, threads) : scratch_of<float>(p, g, threads);
}

void cross_entropy(const CrossEntropyProblem& p, const CrossEntropyGradients& g, float* loss, float* scratch,
                   int threads) {
    if constexpr (kPairs) {
        if (p.pairs && p.weight_dtype == kFloat32) return run<Pair, float>(p, g, loss, scratch, threads);
        if (p.pairs) return run<Pair, BF16>(p, g, loss, scratch, threads);
    }
    if (p.weight_dtype == kFloat32) run<float, float>(p, g, loss, scratch, threads);
    else if (p.weight_dtype == kBFloat16) run<float, BF16>(p, g, loss, scratch, threads);
    else run<float, FP16>(p, g, loss, scratch, threads);
}

}  // namespace ULTRA_ISA
}  // namespace ultra

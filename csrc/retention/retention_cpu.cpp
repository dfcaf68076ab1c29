// Contract: ultra_kernels/retention/op.py
//
// A task is one head of one sequence, cut into chunks. Within a chunk the scores are a tile; what lies outside it comes
// through two states [K,V], decayed sums of k v^T: one of the tokens on the left, one of those on the right.
//     left:   carried by gamma^(rows-1-j) from row j to the last row of its chunk, by gamma^(j+1) from there to row j
//     right:  carried by gamma^(j+1) from row j to the last row of the chunk before, by gamma^(rows-1-j) from a chunk's
//             last row to its row j
// so no power of gamma is above 1, and the left state after the last row is the final state of the recurrent form.
// The gradients of k and v are the same sums over q dout^T, which look the other way.
// With C = K = V a chunk costs 6 products C^3 forward and 15 backward; with one or two chunks the states that are zero
// are left out, which is then as cheap as a whole tile of scores.
// Where the processor multiplies pairs of bfloat16 numbers and q, k, v are such, the factors of all products are rounded to
// them (scores, decayed rows, states); sums, states and gradients until they are stored are float32.
#include "retention/retention.h"

#include "common/gates.h"
#include "common/heads.h"
#include "common/parallel.h"

namespace ultra {
namespace ULTRA_ISA {

static int64_t most_chunks(const RetentionProblem& p) { return (p.of.longest() + p.chunk - 1) / p.chunk; }

// A right factor of a product, made for it, and rows to make it from.
template <typename Word> struct Scratch {
    Word *right = nullptr, *rounded = nullptr;

    Scratch() = default;
    Scratch(const RetentionProblem& p, Pieces& pieces) {
        const int64_t longest = max_of(p.chunk, max_of(p.K, p.V));
        right = pieces.take<Word>(longest * padded(longest));
        rounded = pieces.take<Word>(kNumbers<Word> == 1 ? 0 : p.K * padded(words<Word>(p.V)));
    }
};

struct Task : HeadOfSequence {
    int64_t chunks;

    Task(const RetentionProblem& p, int64_t index)
        : HeadOfSequence(p.of, index / p.heads, index % p.heads), chunks((length + p.chunk - 1) / p.chunk) {}
    int64_t rows(const RetentionProblem& p, int64_t chunk) const { return min_of(p.chunk, length - chunk * p.chunk); }
};

// Powers of gamma, all times `factor`. Those below the smallest normal number are 0: products with subnormal numbers are
// slow.
struct Powers {
    float rising[kRetentionMaxChunk + 1 + 16];   // gamma^i
    float falling[kRetentionMaxChunk + 16];      // gamma^(chunk-1-i)
    float distance[2 * kRetentionMaxChunk + 16];  // at kRetentionMaxChunk + d: the weight of a key d after its query
    float constant[kRetentionMaxChunk];           // 1
    int64_t chunk;

    Powers(const RetentionProblem& p, int64_t head, float factor = 1.0f) : chunk(p.chunk) {
        const float rate = p.log_decay[head] < -1e4f ? -1e4f : p.log_decay[head];  // -infinity * 0 is no number
        for (int64_t i = 0; i <= chunk; i += kLanes) {
            vf x;
            for (int lane = 0; lane < kLanes; ++lane) x[lane] = rate * 1.44269504088896f * (float)(i + lane);
            store(rising + i, select(x < -126.0f, splat(0.0f), exp2(x)) * factor);
        }
        for (int64_t i = 0; i < chunk; ++i) falling[i] = rising[chunk - 1 - i];
        for (int64_t d = 0; d < kRetentionMaxChunk; ++d) {
            const float power = d < chunk ? rising[d] : 0.0f;
            distance[kRetentionMaxChunk + d] = p.right || d == 0 ? power : 0.0f;
            distance[kRetentionMaxChunk - d] = p.left || d == 0 ? power : 0.0f;
        }
        distance[0] = 0.0f;
        for (int64_t i = 0; i < kRetentionMaxChunk; ++i) constant[i] = factor;
        for (int i = 0; i < 16; ++i) distance[2 * kRetentionMaxChunk + i] = 0.0f;
    }
    const float* after() const { return rising + 1; }                              // gamma^(j+1)
    const float* until(int64_t rows) const { return falling + (chunk - rows); }    // gamma^(rows-1-j)
    const float* scores() const { return distance + kRetentionMaxChunk; }
    float over(int64_t rows) const { return rising[rows]; }
};

// A decayed sum of products a b^T of rows, [height, padded(width)]; `empty` while it is zero and not stored.
struct State {
    float* data;
    int64_t height, width;
    bool empty = true;

    int64_t row() const { return padded(width); }
    int64_t size() const { return height * row(); }

    // This becomes decay * from + sum over rows of by_row[j] * a_j b_j^T.
    template <typename Word>
    void advance(const State& from, float decay, int64_t rows, const Tile<Word>& a, const Tile<Word>& b,
                 const float* by_row, const Scratch<Word>& m) {
        for (int64_t i = 0; !from.empty && i < size(); i += kLanes) store(data + i, load(from.data + i) * decay);
        to_down(rows, width, b.rows(), b.rows_row(), by_row, m.right);
        multiply(height, width, words<Word>(rows), a.left_turned(), m.right, row(),
                 Product<>{data, row(), !from.empty});
        empty = false;
    }
    // From and to [K, V] without padding; `turned`: this holds the transpose.
    void read(const float* from, bool turned) {
        for (int64_t i = 0; i < size(); ++i) data[i] = 0.0f;
        for (int64_t r = 0; r < height; ++r)
            for (int64_t c = 0; c < width; ++c) data[r * row() + c] = turned ? from[c * height + r] : from[r * width + c];
        empty = false;
    }
    void write(float* to) const {
        for (int64_t r = 0; r < height; ++r)
            for (int64_t c = 0; c < width; ++c) to[r * width + c] = empty ? 0.0f : data[r * row() + c];
    }
};

// out [rows, width] += by_row * (a [rows, height] state)
template <typename Word>
static void add_state(int64_t rows, const Tile<Word>& a, const State& state, const float* by_row, float* out,
                      const Scratch<Word>& m) {
    if (state.empty) return;
    const Word* right = m.right;
    if constexpr (kNumbers<Word> == 1) right = state.data;
    else to_down(state.height, state.width, state.data, state.row(), nullptr, m.right);
    multiply(rows, state.width, words<Word>(state.height), a.left(), right, state.row(),
             Product<>{out, state.row(), true, by_row});
}

// out [rows, height] += by_row * (a [rows, width] state^T)
template <typename Word>
static void add_state_turned(int64_t rows, const Tile<Word>& a, const State& state, const float* by_row, float* out,
                             const Scratch<Word>& m) {
    if (state.empty) return;
    const int64_t width = words<Word>(state.width), row = padded(state.height);
    if constexpr (kNumbers<Word> == 1) {
        transpose(state.height, width, state.data, state.row(), m.right);
    } else {
        fill_tile(state.height, state.data, state.row(), {state.width, m.rounded, nullptr}, true, false);
        transpose(state.height, width, m.rounded, padded(width), m.right);
    }
    multiply(rows, state.height, width, a.left(), m.right, row, Product<>{out, row, true, by_row});
}

static const float* of_task(const float* states, const RetentionProblem& p, const Task& t) {
    return states ? states + (t.sequence * p.heads + t.head) * p.K * p.V : nullptr;
}
static float* of_task(float* states, const RetentionProblem& p, const Task& t) {
    return const_cast<float*>(of_task((const float*)states, p, t));
}

// The scores of the rows of a and b: by_distance * (a b^T).
template <typename Word>
static void fill_scores(int64_t rows, const Tile<Word>& a, const Tile<Word>& b, const float* by_distance,
                        const Tile<Word>& to, const Scratch<Word>& m) {
    transpose(rows, words<Word>(b.columns), b.along, b.along_row(), m.right);
    multiply(rows, rows, words<Word>(a.columns), a.left(), m.right, padded(rows),
             product(to.rows(), to.rows_row(), by_distance));
}

// ---- forward --------------------------------------------------------------------------------------------------------
template <typename Word> struct Forward {
    Tile<Word> q, k, v, scores;
    Scratch<Word> scratch;
    float *out, *left, *right;

    Forward(const RetentionProblem& p, Pieces& pieces) {
        const int64_t C = p.chunk, V = padded(p.V);
        q = pieces.tile<Word>(C, p.K), k = pieces.tile<Word>(C, p.K), v = pieces.tile<Word>(C, p.V);
        scores = pieces.tile<Word>(C, C), scratch = Scratch<Word>(p, pieces);
        out = pieces.take(C * V), left = pieces.take(p.K * V);
        right = pieces.take(p.right ? most_chunks(p) * p.K * V : 0);  // one per chunk
    }
};

template <typename Word>
static void forward_task(const RetentionProblem& p, const Task& t, const HeadRows& out, float* last,
                         const Forward<Word>& m) {
    const Powers decay(p, t.head), scaled(p, t.head, p.scale[t.head]);
    auto right = [&](int64_t c) { return State{m.right + c * p.K * padded(p.V), p.K, p.V}; };
    State after{nullptr, p.K, p.V};
    for (int64_t c = t.chunks - 1; p.right && c > 0; --c) {
        const int64_t rows = t.rows(p, c);
        load_tile(p.k, t, c * p.chunk, rows, m.k, true);
        load_tile(p.v, t, c * p.chunk, rows, m.v, false);
        State before = right(c - 1);
        before.advance(after, decay.over(rows), rows, m.k, m.v, decay.after(), m.scratch);
        after = before;
    }
    State left{m.left, p.K, p.V};
    if (const float* initial = of_task(p.initial, p, t)) left.read(initial, false);
    for (int64_t c = 0; c < t.chunks; ++c) {
        const int64_t rows = t.rows(p, c), first = c * p.chunk, V = padded(p.V);
        const bool next = p.left && (last || c + 1 < t.chunks);
        load_tile(p.q, t, first, rows, m.q, false);
        load_tile(p.k, t, first, rows, m.k, next);
        load_tile(p.v, t, first, rows, m.v, true);
        fill_scores(rows, m.q, m.k, scaled.scores(), m.scores, m.scratch);
        multiply(rows, p.V, words<Word>(rows), m.scores.left(), m.v.down, V, Product<>{m.out, V});
        if (p.left) add_state(rows, m.q, left, scaled.after(), m.out, m.scratch);
        if (p.right && c + 1 < t.chunks) {
            State rest = right(c);
            rest.empty = false;
            add_state(rows, m.q, rest, scaled.until(rows), m.out, m.scratch);
        }
        store_rows(m.out, out, t, first, rows, p.V);
        if (next) left.advance(left, decay.over(rows), rows, m.k, m.v, decay.until(rows), m.scratch);
    }
    if (last) left.write(of_task(last, p, t));
}

int64_t retention_forward_scratch(const RetentionProblem& p) {
    Pieces pieces{nullptr};
    with_words(p.q, p.k, p.v, [&](auto word) { Forward<decltype(word)>(p, pieces); });
    return pieces.used;
}

void retention_forward(const RetentionProblem& p, const HeadRows& out, float* last, float* scratch, int threads) {
    const int64_t per_thread = retention_forward_scratch(p);
    with_words(p.q, p.k, p.v, [&](auto word) {
        parallel_for(p.of.number * p.heads, threads, [&](int64_t index) {
            Pieces pieces{scratch + thread_index() * per_thread};
            forward_task(p, Task(p, index), out, last, Forward<decltype(word)>(p, pieces));
        });
    });
}

// ---- backward -------------------------------------------------------------------------------------------------------
// Keys and values enter through their state turned, [V,K]: only that side is multiplied.
template <typename Word> struct Backward {
    Tile<Word> q, k, v, dout, scores, dscores;
    Scratch<Word> scratch;
    float *dq, *dk, *dv, *keys_left, *keys_right, *queries_left, *queries_right;

    Backward(const RetentionProblem& p, Pieces& pieces) {
        const int64_t C = p.chunk, K = padded(p.K), V = padded(p.V), chunks = most_chunks(p);
        q = pieces.tile<Word>(C, p.K), k = pieces.tile<Word>(C, p.K);
        v = pieces.tile<Word>(C, p.V), dout = pieces.tile<Word>(C, p.V);
        scores = pieces.tile<Word>(C, C), dscores = pieces.tile<Word>(C, C), scratch = Scratch<Word>(p, pieces);
        dq = pieces.take(C * K), dk = pieces.take(C * K), dv = pieces.take(C * V);
        keys_left = pieces.take(p.V * K), queries_left = pieces.take(p.K * V);
        keys_right = pieces.take(p.right ? chunks * p.V * K : 0);               // one per chunk
        queries_right = pieces.take(p.left ? (chunks + 1) * p.K * V : 0);       // and one before the first
    }
};

// dk += v states^T, dv += k states, where the state is a sum of q dout^T.
template <typename Word>
static void add_queries(int64_t rows, const State& queries, const float* by_row, const Backward<Word>& m) {
    add_state(rows, m.k, queries, by_row, m.dv, m.scratch);
    add_state_turned(rows, m.v, queries, by_row, m.dk, m.scratch);
}

// Sum over all elements of a * b; rows of b have `width` floats.
template <typename T>
static double inner_product(int64_t rows, int64_t width, const T* a, int64_t a_row, const float* b) {
    double total = 0.0;
    for (int64_t i = 0; i < rows; ++i) {
        vf x = splat(0.0f);
        for (int64_t j = 0; j < width; j += kLanes) x += load(a + i * a_row + j) * load(b + i * width + j);
        total += sum(x);
    }
    return total;
}

template <typename Word>
static void backward_task(const RetentionProblem& p, const Task& t, const RetentionGradients& g,
                          const Backward<Word>& m) {
    const float scale = p.scale[t.head];
    const Powers decay(p, t.head), scaled(p, t.head, scale);
    const int64_t K = padded(p.K), V = padded(p.V);
    auto keys_right = [&](int64_t c) { return State{m.keys_right + c * p.V * K, p.V, p.K}; };
    auto queries_right = [&](int64_t c) { return State{m.queries_right + (c + 1) * p.K * V, p.K, p.V}; };

    State keys{nullptr, p.V, p.K}, queries{nullptr, p.K, p.V};  // on the right of the chunk in hand
    if (const float* dlast = of_task(g.dlast, p, t)) {
        queries = queries_right(t.chunks - 1);
        queries.read(dlast, false);
    }
    const bool last_empty = queries.empty;
    for (int64_t c = t.chunks - 1; c >= (g.dinitial ? 0 : 1); --c) {
        const int64_t rows = t.rows(p, c), first = c * p.chunk;
        if (p.right && c > 0) {
            load_tile(p.k, t, first, rows, m.k, false);
            load_tile(p.v, t, first, rows, m.v, true);
            State before = keys_right(c - 1);
            before.advance(keys, decay.over(rows), rows, m.v, m.k, decay.after(), m.scratch);
            keys = before;
        }
        if (p.left) {
            load_tile(p.q, t, first, rows, m.q, true);
            load_tile(g.dout, t, first, rows, m.dout, false);
            State before = queries_right(c - 1);
            before.advance(queries, decay.over(rows), rows, m.q, m.dout, scaled.after(), m.scratch);
            queries = before;
        }
    }
    if (g.dinitial) queries.write(of_task(g.dinitial, p, t));

    State keys_left{m.keys_left, p.V, p.K}, queries_left{m.queries_left, p.K, p.V};
    if (const float* initial = of_task(p.initial, p, t)) keys_left.read(initial, true);
    double dscale = 0.0;
    for (int64_t c = 0; c < t.chunks; ++c) {
        const int64_t rows = t.rows(p, c), first = c * p.chunk, inner = words<Word>(rows);
        const bool last = c + 1 == t.chunks;
        load_tile(p.q, t, first, rows, m.q, true);
        load_tile(p.k, t, first, rows, m.k, true);
        load_tile(p.v, t, first, rows, m.v, true);
        load_tile(g.dout, t, first, rows, m.dout, true);
        fill_scores(rows, m.q, m.k, scaled.scores(), m.scores, m.scratch);
        fill_scores(rows, m.dout, m.v, decay.scores(), m.dscores, m.scratch);
        fill_down(rows, m.scores);
        fill_down(rows, m.dscores);

        // dq lacks the scale until it is stored: d scale is its product with q
        multiply(rows, p.K, inner, m.dscores.left(), m.k.down, K, Product<>{m.dq, K});
        multiply(rows, p.K, inner, m.dscores.left_turned(), m.q.down, K, Product<>{m.dk, K, false, scaled.constant});
        multiply(rows, p.V, inner, m.scores.left_turned(), m.dout.down, V, Product<>{m.dv, V});
        if (p.left) {
            add_state(rows, m.dout, keys_left, decay.after(), m.dq, m.scratch);
            State rest = queries_right(c);
            rest.empty = last && last_empty;
            add_queries(rows, rest, decay.until(rows), m);
            if (!last) keys_left.advance(keys_left, decay.over(rows), rows, m.v, m.k, decay.until(rows), m.scratch);
        }
        if (p.right) {
            State rest = keys_right(c);
            rest.empty = last;
            add_state(rows, m.dout, rest, decay.until(rows), m.dq, m.scratch);
            add_queries(rows, queries_left, decay.after(), m);
            if (!last)
                queries_left.advance(queries_left, decay.over(rows), rows, m.q, m.dout, scaled.until(rows), m.scratch);
        }
        store_rows(m.dk, g.dk, t, first, rows, p.K);
        store_rows(m.dv, g.dv, t, first, rows, p.V);
        dscale += inner_product(rows, K, m.q.rows(), m.q.rows_row(), m.dq);
        for (int64_t i = 0; i < rows * K; i += kLanes) store(m.dq + i, load(m.dq + i) * scale);
        store_rows(m.dq, g.dq, t, first, rows, p.K);
    }
    g.dscale[t.sequence * p.heads + t.head] = (float)dscale;
}

int64_t retention_backward_scratch(const RetentionProblem& p) {
    Pieces pieces{nullptr};
    with_words(p.q, p.k, p.v, [&](auto word) { Backward<decltype(word)>(p, pieces); });
    return pieces.used;
}

void retention_backward(const RetentionProblem& p, const RetentionGradients& g, float* scratch, int threads) {
    const int64_t per_thread = retention_backward_scratch(p);
    with_words(p.q, p.k, p.v, [&](auto word) {
        parallel_for(p.of.number * p.heads, threads, [&](int64_t index) {
            Pieces pieces{scratch + thread_index() * per_thread};
            backward_task(p, Task(p, index), g, Backward<decltype(word)>(p, pieces));
        });
    });
}

// ---- one token ------------------------------------------------------------------------------------------------------
static float at(const HeadRows& x, const Task& t, int64_t i) {
    const int64_t where = t.offset(x, 0) + i;
    if (x.dtype == kBFloat16) return to_float(((const BF16*)x.data)[where]);
    if (x.dtype == kFloat16) return to_float(((const FP16*)x.data)[where]);
    return ((const float*)x.data)[where];
}

// A block of columns at a time, so that the output stays in a register.
static void step_task(const RetentionProblem& p, const Task& t, const float* state, float* next, const HeadRows& out) {
    const Powers decay(p, t.head);
    const float gamma = decay.over(1), *from = of_task(state, p, t);
    float* to = of_task(next, p, t);
    for (int64_t c = 0; c < p.V; c += kLanes) {
        const int lanes = (int)min_of(kLanes, p.V - c);
        float value[kLanes] = {};
        for (int lane = 0; lane < lanes; ++lane) value[lane] = at(p.v, t, c + lane);
        const vf v = load(value);
        vf o = splat(0.0f);
        for (int64_t i = 0; i < p.K; ++i) {
            const float* old = from + i * p.V + c;
            const vf x = (lanes == kLanes ? load(old) : load_part(old, lanes)) * gamma + v * at(p.k, t, i);
            if (lanes == kLanes) store(to + i * p.V + c, x);
            else store_part(to + i * p.V + c, x, lanes);
            o += x * (at(p.q, t, i) * p.scale[t.head]);
        }
        HeadRows part = out;
        part.data += c * (out.dtype == kFloat32 ? 4 : 2);
        float result[kLanes];
        store(result, o);
        store_rows(result, part, t, 0, 1, lanes);
    }
}

void retention_step(const RetentionProblem& p, const float* state, float* next, const HeadRows& out, int threads) {
    parallel_for(p.of.number * p.heads, threads,
                 [&](int64_t index) { step_task(p, Task(p, index), state, next, out); });
}

}  // namespace ULTRA_ISA
}  // namespace ultra

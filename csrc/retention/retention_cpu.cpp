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
#include "retention/retention.h"

#include "common/gates.h"
#include "common/parallel.h"
#include "common/product.h"
#include "common/simd.h"

namespace ultra {
namespace ULTRA_ISA {

static int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

static int64_t most_chunks(const RetentionProblem& p) {
    int64_t longest = p.borders ? 0 : p.length;
    for (int64_t s = 0; p.borders && s < p.sequences; ++s) longest = max_of(longest, p.borders[s + 1] - p.borders[s]);
    return (longest + p.chunk - 1) / p.chunk;
}

// Cuts scratch memory into aligned pieces; with base = null it only counts.
struct Pieces {
    float* base;
    int64_t used = 0;

    float* take(int64_t floats) {
        float* piece = base ? base + used : nullptr;
        used += (floats + 15) / 16 * 16;
        return piece;
    }
};

// One head of one sequence.
struct Task {
    int64_t sequence, head, batch, begin, length, chunks;

    Task(const RetentionProblem& p, int64_t index) {
        sequence = index / p.heads, head = index % p.heads;
        batch = p.borders ? 0 : sequence;
        begin = p.borders ? p.borders[sequence] : 0;
        length = (p.borders ? p.borders[sequence + 1] : p.length) - begin;
        chunks = (length + p.chunk - 1) / p.chunk;
    }
    int64_t rows(const RetentionProblem& p, int64_t chunk) const { return min_of(p.chunk, length - chunk * p.chunk); }
};

template <typename T>
static void load_rows(const T* from, int64_t step, int64_t rows, int64_t columns, float factor, float* to) {
    for (int64_t i = 0; i < rows; ++i, from += step, to += padded(columns)) {
        int64_t c = 0;
        for (; c + kLanes <= columns; c += kLanes) store(to + c, load(from + c) * factor);
        if (c < columns) store(to + c, load_part(from + c, (int)(columns - c)) * factor);
    }
}

template <typename T> static void store_rows(const float* from, int64_t step, int64_t rows, int64_t columns, T* to) {
    for (int64_t i = 0; i < rows; ++i, from += padded(columns), to += step) {
        int64_t c = 0;
        for (; c + kLanes <= columns; c += kLanes) store(to + c, load(from + c));
        if (c < columns) store_part(to + c, load(from + c), (int)(columns - c));
    }
}

static int64_t offset(const HeadRows& x, const Task& t, int64_t row) {
    return t.batch * x.batch + (t.begin + row) * x.time + t.head * x.head;
}

// Rows [first, first + rows) of the task as a tile, times `factor`.
static void load_rows(const HeadRows& x, const Task& t, int64_t first, int64_t rows, int64_t columns, float factor,
                      float* to) {
    const int64_t at = offset(x, t, first);
    if (x.dtype == kBFloat16) load_rows((const BF16*)x.data + at, x.time, rows, columns, factor, to);
    else if (x.dtype == kFloat16) load_rows((const FP16*)x.data + at, x.time, rows, columns, factor, to);
    else load_rows((const float*)x.data + at, x.time, rows, columns, factor, to);
}

static void store_rows(const float* from, const HeadRows& x, const Task& t, int64_t first, int64_t rows,
                       int64_t columns) {
    const int64_t at = offset(x, t, first);
    if (x.dtype == kBFloat16) store_rows(from, x.time, rows, columns, (BF16*)x.data + at);
    else if (x.dtype == kFloat16) store_rows(from, x.time, rows, columns, (FP16*)x.data + at);
    else store_rows(from, x.time, rows, columns, (float*)x.data + at);
}

// Powers of gamma. Those below the smallest normal number are 0: products with subnormal numbers are slow.
struct Powers {
    float rising[kRetentionMaxChunk + 1 + 16];   // gamma^i
    float falling[kRetentionMaxChunk + 16];      // gamma^(chunk-1-i)
    float distance[2 * kRetentionMaxChunk + 16];  // at kRetentionMaxChunk + d: the weight of a key d after its query
    int64_t chunk;

    Powers(const RetentionProblem& p, int64_t head) : chunk(p.chunk) {
        const float rate = p.log_decay[head] < -1e4f ? -1e4f : p.log_decay[head];  // -infinity * 0 is no number
        for (int64_t i = 0; i <= chunk; i += kLanes) {
            vf x;
            for (int lane = 0; lane < kLanes; ++lane) x[lane] = rate * 1.44269504088896f * (float)(i + lane);
            store(rising + i, select(x < -126.0f, splat(0.0f), exp2(x)));
        }
        for (int64_t i = 0; i < chunk; ++i) falling[i] = rising[chunk - 1 - i];
        for (int64_t d = 0; d < kRetentionMaxChunk; ++d) {
            const float power = d < chunk ? rising[d] : 0.0f;
            distance[kRetentionMaxChunk + d] = p.right || d == 0 ? power : 0.0f;
            distance[kRetentionMaxChunk - d] = p.left || d == 0 ? power : 0.0f;
        }
        distance[0] = 0.0f;
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

    // This becomes decay * from + sum over rows of by_row[j] * a_j b_j^T. a and b are tiles, `weighted` is scratch.
    void advance(const State& from, float decay, int64_t rows, const float* a, const float* b, const float* by_row,
                 float* weighted) {
        for (int64_t i = 0; !from.empty && i < size(); i += kLanes) store(data + i, load(from.data + i) * decay);
        scale_rows(rows, row(), b, by_row, weighted);
        multiply(height, width, rows, {a, 1, padded(height)}, weighted, row(), {data, row(), !from.empty});
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
static void add_state(int64_t rows, const float* a, const State& state, const float* by_row, float* out) {
    if (state.empty) return;
    multiply(rows, state.width, state.height, {a, padded(state.height), 1}, state.data, state.row(),
             {out, state.row(), true, by_row});
}

static const float* of_task(const float* states, const RetentionProblem& p, const Task& t) {
    return states ? states + (t.sequence * p.heads + t.head) * p.K * p.V : nullptr;
}
static float* of_task(float* states, const RetentionProblem& p, const Task& t) {
    return const_cast<float*>(of_task((const float*)states, p, t));
}

// ---- forward --------------------------------------------------------------------------------------------------------
struct Forward {
    float *q, *k, *v, *k_turned, *scores, *out, *weighted, *left, *right;

    Forward(const RetentionProblem& p, Pieces& pieces) {
        const int64_t C = p.chunk, K = padded(p.K), V = padded(p.V);
        q = pieces.take(C * K), k = pieces.take(C * K), v = pieces.take(C * V);
        k_turned = pieces.take(p.K * padded(C)), scores = pieces.take(C * padded(C));
        out = pieces.take(C * V), weighted = pieces.take(C * V), left = pieces.take(p.K * V);
        right = pieces.take(p.right ? most_chunks(p) * p.K * V : 0);  // one per chunk
    }
};

int64_t retention_forward_scratch(const RetentionProblem& p) {
    Pieces pieces{nullptr};
    Forward(p, pieces);
    return pieces.used;
}

static void forward_task(const RetentionProblem& p, const Task& t, const HeadRows& out, float* last, const Forward& m) {
    const Powers powers(p, t.head);
    auto right = [&](int64_t c) { return State{m.right + c * p.K * padded(p.V), p.K, p.V}; };
    State after{nullptr, p.K, p.V};
    for (int64_t c = t.chunks - 1; p.right && c > 0; --c) {
        const int64_t rows = t.rows(p, c);
        load_rows(p.k, t, c * p.chunk, rows, p.K, 1.0f, m.k);
        load_rows(p.v, t, c * p.chunk, rows, p.V, 1.0f, m.v);
        State before = right(c - 1);
        before.advance(after, powers.over(rows), rows, m.k, m.v, powers.after(), m.weighted);
        after = before;
    }
    State left{m.left, p.K, p.V};
    if (const float* initial = of_task(p.initial, p, t)) left.read(initial, false);
    for (int64_t c = 0; c < t.chunks; ++c) {
        const int64_t rows = t.rows(p, c), first = c * p.chunk;
        load_rows(p.q, t, first, rows, p.K, p.scale[t.head], m.q);
        load_rows(p.k, t, first, rows, p.K, 1.0f, m.k);
        load_rows(p.v, t, first, rows, p.V, 1.0f, m.v);
        transpose(rows, p.K, m.k, padded(p.K), m.k_turned);
        multiply(rows, rows, p.K, {m.q, padded(p.K), 1}, m.k_turned, padded(rows),
                 {m.scores, padded(rows), false, nullptr, powers.scores()});
        multiply(rows, p.V, rows, {m.scores, padded(rows), 1}, m.v, padded(p.V), {m.out, padded(p.V)});
        if (p.left) add_state(rows, m.q, left, powers.after(), m.out);
        if (p.right && c + 1 < t.chunks) {
            State rest = right(c);
            rest.empty = false;
            add_state(rows, m.q, rest, powers.until(rows), m.out);
        }
        store_rows(m.out, out, t, first, rows, p.V);
        if (p.left && (last || c + 1 < t.chunks))
            left.advance(left, powers.over(rows), rows, m.k, m.v, powers.until(rows), m.weighted);
    }
    if (last) left.write(of_task(last, p, t));
}

void retention_forward(const RetentionProblem& p, const HeadRows& out, float* last, float* scratch, int threads) {
    const int64_t per_thread = retention_forward_scratch(p);
    parallel_for(p.sequences * p.heads, threads, [&](int64_t index) {
        Pieces pieces{scratch + thread_index() * per_thread};
        forward_task(p, Task(p, index), out, last, Forward(p, pieces));
    });
}

// ---- backward -------------------------------------------------------------------------------------------------------
// Keys and values enter through their state turned, [V,K]: only that side is multiplied.
struct Backward {
    float *q, *k, *v, *dout, *k_turned, *v_turned, *scores, *dscores, *dq, *dk, *dv, *weighted, *turned;
    float *keys_left, *keys_right, *queries_left, *queries_right;

    Backward(const RetentionProblem& p, Pieces& pieces) {
        const int64_t C = p.chunk, K = padded(p.K), V = padded(p.V), chunks = most_chunks(p);
        q = pieces.take(C * K), k = pieces.take(C * K), v = pieces.take(C * V), dout = pieces.take(C * V);
        k_turned = pieces.take(p.K * padded(C)), v_turned = pieces.take(p.V * padded(C));
        scores = pieces.take(C * padded(C)), dscores = pieces.take(C * padded(C));
        dq = pieces.take(C * K), dk = pieces.take(C * K), dv = pieces.take(C * V);
        weighted = pieces.take(C * max_of(K, V)), turned = pieces.take(p.V * K);
        keys_left = pieces.take(p.V * K), queries_left = pieces.take(p.K * V);
        keys_right = pieces.take(p.right ? chunks * p.V * K : 0);               // one per chunk
        queries_right = pieces.take(p.left ? (chunks + 1) * p.K * V : 0);       // and one before the first
    }
};

int64_t retention_backward_scratch(const RetentionProblem& p) {
    Pieces pieces{nullptr};
    Backward(p, pieces);
    return pieces.used;
}

static void load_chunk(const RetentionProblem& p, const RetentionGradients& g, const Task& t, int64_t c,
                       const Backward& m) {
    const int64_t rows = t.rows(p, c), first = c * p.chunk;
    load_rows(p.q, t, first, rows, p.K, p.scale[t.head], m.q);
    load_rows(p.k, t, first, rows, p.K, 1.0f, m.k);
    load_rows(p.v, t, first, rows, p.V, 1.0f, m.v);
    load_rows(g.dout, t, first, rows, p.V, 1.0f, m.dout);
}

// dk += v states^T, dv += k states, where the state is a sum of q dout^T.
static void add_queries(int64_t rows, const State& queries, const float* by_row, const Backward& m) {
    if (queries.empty) return;
    add_state(rows, m.k, queries, by_row, m.dv);
    transpose(queries.height, queries.width, queries.data, queries.row(), m.turned);
    add_state(rows, m.v, State{m.turned, queries.width, queries.height, false}, by_row, m.dk);
}

// Sum over all elements of a * b.
static double inner_product(int64_t rows, int64_t width, const float* a, const float* b) {
    double total = 0.0;
    for (int64_t i = 0; i < rows; ++i) {
        vf x = splat(0.0f);
        for (int64_t j = 0; j < width; j += kLanes) x += load(a + i * width + j) * load(b + i * width + j);
        total += sum(x);
    }
    return total;
}

static void backward_task(const RetentionProblem& p, const Task& t, const RetentionGradients& g, const Backward& m) {
    const Powers powers(p, t.head);
    const int64_t K = padded(p.K), V = padded(p.V);
    const float scale = p.scale[t.head];
    auto keys_right = [&](int64_t c) { return State{m.keys_right + c * p.V * K, p.V, p.K}; };
    auto queries_right = [&](int64_t c) { return State{m.queries_right + (c + 1) * p.K * V, p.K, p.V}; };

    State keys{nullptr, p.V, p.K}, queries{nullptr, p.K, p.V};  // on the right of the chunk in hand
    if (const float* dlast = of_task(g.dlast, p, t)) {
        queries = queries_right(t.chunks - 1);
        queries.read(dlast, false);
    }
    const bool last_empty = queries.empty;
    for (int64_t c = t.chunks - 1; c >= (g.dinitial ? 0 : 1); --c) {
        const int64_t rows = t.rows(p, c);
        load_chunk(p, g, t, c, m);
        if (p.right && c > 0) {
            State before = keys_right(c - 1);
            before.advance(keys, powers.over(rows), rows, m.v, m.k, powers.after(), m.weighted);
            keys = before;
        }
        if (p.left) {
            State before = queries_right(c - 1);
            before.advance(queries, powers.over(rows), rows, m.q, m.dout, powers.after(), m.weighted);
            queries = before;
        }
    }
    if (g.dinitial) queries.write(of_task(g.dinitial, p, t));

    State keys_left{m.keys_left, p.V, p.K}, queries_left{m.queries_left, p.K, p.V};
    if (const float* initial = of_task(p.initial, p, t)) keys_left.read(initial, true);
    double dscale = 0.0;
    for (int64_t c = 0; c < t.chunks; ++c) {
        const int64_t rows = t.rows(p, c), first = c * p.chunk, C = padded(rows);
        const bool last = c + 1 == t.chunks;
        load_chunk(p, g, t, c, m);
        transpose(rows, p.K, m.k, K, m.k_turned);
        transpose(rows, p.V, m.v, V, m.v_turned);
        const Product scores{m.scores, C, false, nullptr, powers.scores()};
        const Product dscores{m.dscores, C, false, nullptr, powers.scores()};
        multiply(rows, rows, p.K, {m.q, K, 1}, m.k_turned, C, scores);
        multiply(rows, rows, p.V, {m.dout, V, 1}, m.v_turned, C, dscores);

        multiply(rows, p.K, rows, {m.dscores, C, 1}, m.k, K, {m.dq, K});
        multiply(rows, p.K, rows, {m.dscores, 1, C}, m.q, K, {m.dk, K});
        multiply(rows, p.V, rows, {m.scores, 1, C}, m.dout, V, {m.dv, V});
        if (p.left) {
            add_state(rows, m.dout, keys_left, powers.after(), m.dq);
            State rest = queries_right(c);
            rest.empty = last && last_empty;
            add_queries(rows, rest, powers.until(rows), m);
            if (!last) keys_left.advance(keys_left, powers.over(rows), rows, m.v, m.k, powers.until(rows), m.weighted);
        }
        if (p.right) {
            State rest = keys_right(c);
            rest.empty = last;
            add_state(rows, m.dout, rest, powers.until(rows), m.dq);
            add_queries(rows, queries_left, powers.after(), m);
            if (!last)
                queries_left.advance(queries_left, powers.over(rows), rows, m.q, m.dout, powers.until(rows), m.weighted);
        }
        store_rows(m.dk, g.dk, t, first, rows, p.K);
        store_rows(m.dv, g.dv, t, first, rows, p.V);
        load_rows(p.q, t, first, rows, p.K, 1.0f, m.q);  // without the scale, which may be 0
        dscale += inner_product(rows, K, m.q, m.dq);
        for (int64_t i = 0; i < rows * K; i += kLanes) store(m.dq + i, load(m.dq + i) * scale);
        store_rows(m.dq, g.dq, t, first, rows, p.K);
    }
    g.dscale[t.sequence * p.heads + t.head] = (float)dscale;
}

void retention_backward(const RetentionProblem& p, const RetentionGradients& g, float* scratch, int threads) {
    const int64_t per_thread = retention_backward_scratch(p);
    parallel_for(p.sequences * p.heads, threads, [&](int64_t index) {
        Pieces pieces{scratch + thread_index() * per_thread};
        backward_task(p, Task(p, index), g, Backward(p, pieces));
    });
}

// ---- one token ------------------------------------------------------------------------------------------------------
static float at(const HeadRows& x, const Task& t, int64_t i) {
    const int64_t where = offset(x, t, 0) + i;
    if (x.dtype == kBFloat16) return to_float(((const BF16*)x.data)[where]);
    if (x.dtype == kFloat16) return to_float(((const FP16*)x.data)[where]);
    return ((const float*)x.data)[where];
}

// A block of columns at a time, so that the output stays in a register.
static void step_task(const RetentionProblem& p, const Task& t, const float* state, float* next, const HeadRows& out) {
    const Powers powers(p, t.head);
    const float gamma = powers.over(1), *from = of_task(state, p, t);
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
    parallel_for(p.sequences * p.heads, threads,
                 [&](int64_t index) { step_task(p, Task(p, index), state, next, out); });
}

}  // namespace ULTRA_ISA
}  // namespace ultra

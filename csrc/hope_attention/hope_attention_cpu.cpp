// Contract: ultra_kernels/hope_attention/op.py
//
// Logits exist as tiles of kHopeTile queries and as many keys. In light-cone coordinates, (x1 + x2, x1 - x2) / sqrt(2) of
// a pair, channel c of q_m . k_n carries e^(-rate |m - n|), which a tile splits between its two factors:
//     left    keys all left of the queries: the key shrinks up to its tile's last row, the query from there on
//     right   keys all right of the queries, mirrored, with the rates of the other side
//     lower   the tile on the diagonal, keys up to the query: both factors are seen from the tile's centre and reach
//             e^(rate kHopeTile / 2), rate - damping <= 2; what lies above the diagonal overflows and is left out
//     upper   the same tile, keys after the query
// Damping, which has no bound, multiplies the products of lower and upper. Rotary heads turn the pairs instead, and the
// prefix is met by plain queries. Both transforms of pairs are orthogonal: gradients go back through their transposes.
//
// Forward, a task is a few tiles of queries of one head, which share the shaped keys; the softmax runs along the tiles of
// keys. Backward, a task is one head of one sequence; with the saved lse every tile stands alone.
#include "hope_attention/hope_attention.h"

#include "common/gates.h"
#include "common/parallel.h"

#include <math.h>

namespace ultra {
namespace ULTRA_ISA {

constexpr int64_t kTile = kHopeTile;
constexpr int64_t kVectors = kTile / kLanes;
constexpr int64_t kGroup = 4;  // tiles of queries of a forward task
constexpr float kLog2E = 1.44269504088896f, kLn2 = 0.693147180559945f;

enum Kind { kPrefix, kRotary, kLeft, kRight, kLower, kUpper };

static int side_of(Kind kind) { return kind == kRight || kind == kUpper; }
static bool on_diagonal(Kind kind) { return kind == kLower || kind == kUpper; }

// Rows of factors: row i is data + i * step. null: all 1.
struct Rows {
    const float* data;
    int64_t step;
};

static int64_t table_row(const HopeProblem& p) { return (p.K + kHopeColumns - 1) / kHopeColumns * kHopeColumns; }

static Rows table(const HopeProblem& p, const float* data, int side, bool from_last) {
    const int64_t row = table_row(p), first = side * kTile + (from_last ? kTile - 1 : 0);
    return {data + first * row, from_last ? -row : row};
}

static Rows query_factors(const HopeProblem& p, Kind kind) {
    if (on_diagonal(kind)) return table(p, p.tables.query, side_of(kind), false);
    if (kind == kLeft || kind == kRight) return table(p, p.tables.shrink, side_of(kind), kind == kRight);
    return {nullptr, 0};
}

static Rows key_factors(const HopeProblem& p, Kind kind) {
    if (on_diagonal(kind)) return table(p, p.tables.key, side_of(kind), false);
    if (kind == kLeft || kind == kRight) return table(p, p.tables.shrink, side_of(kind), kind == kLeft);
    return {nullptr, 0};
}

// What queries at `query` lose up to the keys at `key`, beyond what the rows of both tiles carry: columns of factors.
static const float* across(const HopeProblem& p, Kind kind, int64_t query, int64_t key, float* columns) {
    if (kind != kLeft && kind != kRight) return nullptr;
    const float gap = (float)(kind == kLeft ? query - (key + kTile - 1) : key - (query + kTile - 1));
    const float* rate = p.tables.rate + side_of(kind) * table_row(p);
    for (int64_t j = 0; j < padded(p.K); j += kLanes) {
        const vf x = load(rate + j) * (-gap * kLog2E);
        store(columns + j, select(x < -126.0f, splat(0.0f), exp2(x)));
    }
    return columns;
}

// to = rows of x times factors; numbers below the smallest normal one become 0: they slow a product down.
static void scale(int64_t rows, int64_t columns, const float* x, const Rows& by_row, const float* by_column,
                  float factor, float* to) {
    const int64_t row = padded(columns);
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < row; j += kLanes) {
            vf y = load(x + i * row + j) * factor;
            if (by_row.data) y *= load(by_row.data + i * by_row.step + j);
            if (by_column) y *= load(by_column + j);
            store(to + i * row + j, select(abs(y) < 1.1754944e-38f, splat(0.0f), y));
        }
}

// to += rows of x times factors
static void add_scaled(int64_t rows, int64_t columns, const float* x, const Rows& by_row, const float* by_column,
                       float factor, float* to) {
    const int64_t row = padded(columns);
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < row; j += kLanes) {
            vf y = load(x + i * row + j) * factor;
            if (by_row.data) y *= load(by_row.data + i * by_row.step + j);
            if (by_column) y *= load(by_column + j);
            store(to + i * row + j, load(to + i * row + j) + y);
        }
}

// Turns the pairs of rows [first, first + rows) of a sequence to light-cone coordinates or rotary positions, in place;
// `back` is the transpose.
static void turn(const HopeProblem& p, bool rotary, int64_t first, int64_t rows, bool back, float* x) {
    const int64_t row = padded(p.K), from = table_row(p);
    vf light;
    for (int lane = 0; lane < kLanes; ++lane) light[lane] = lane % 2 ? -0.70710678f : 0.70710678f;
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < row; j += kLanes) {
            float* at = x + i * row + j;
            const vf own = load(at), other = swap_pairs(own);
            if (!rotary) {
                store(at, own * light + other * 0.70710678f);
            } else {
                const int64_t where = (first + i) * from + j;
                const vf sine = load(p.tables.sine + where) * (back ? -1.0f : 1.0f);
                store(at, own * load(p.tables.cosine + where) + other * sine);
            }
        }
}

// One head of one sequence, and what its tiles of scores are.
struct Task : HeadOfSequence {
    bool rotary;

    Task(const HopeProblem& p, int64_t sequence, int64_t head)
        : HeadOfSequence(p.of, sequence, head), rotary(head < p.rotary_heads) {}

    int64_t rows(int64_t first) const { return min_of(kTile, length - first); }
};

// The keys [lo, hi) of a tile that query i of a tile sees.
struct Visible {
    bool below, above;
    int64_t keys;

    Visible(const HopeProblem& p, Kind kind, int64_t query, int64_t key, int64_t keys) : keys(keys) {
        below = kind == kLower || (kind == kRotary && p.causal && query == key);
        above = kind == kUpper;
    }
    int64_t lo(int64_t i) const { return above ? i + 1 : 0; }
    int64_t hi(int64_t i) const { return below ? min_of(i + 1, keys) : keys; }
};

static vf only(vf x, int64_t first, int64_t lo, int64_t hi, float otherwise) {
    if (lo <= first && first + kLanes <= hi) return x;
    for (int lane = 0; lane < kLanes; ++lane)
        if (first + lane < lo || first + lane >= hi) x[lane] = otherwise;
    return x;
}

// A tile of keys and values, as the tiles of one kind need them.
template <typename Word> struct Keys {
    Tile<Word> k, v;
    Word *k_turned, *v_turned;
    float* rows;  // of keys, turned, without factors

    Keys() = default;
    Keys(const HopeProblem& p, Pieces& pieces) {
        k = pieces.tile<Word>(kTile, p.K), v = pieces.tile<Word>(kTile, p.V);
        k_turned = pieces.take<Word>(p.K * kTile), v_turned = pieces.take<Word>(p.V * kTile);
        rows = pieces.take(kTile * padded(p.K));
    }
};

// Rows of floats that a tile is then made of: its own memory where it holds floats.
static float* rows_for(const Tile<float>& tile, float*) { return tile.along; }
static float* rows_for(const Tile<Pair>&, float* scratch) { return scratch; }

// kinds that see the same keys and values differ in the factors alone.
template <typename Word>
static void load_keys(const HopeProblem& p, const Task& t, bool prefix, int64_t key, int64_t keys, bool backward,
                      const Keys<Word>& m) {
    const HeadOfSequence of_prefix(Sequences{nullptr, 1, p.prefix}, 0, t.head);
    const HeadOfSequence& from = prefix ? of_prefix : (const HeadOfSequence&)t;
    load_rows(prefix ? p.prefix_k : p.k, from, key, keys, p.K, m.rows);
    if (!prefix) turn(p, t.rotary, key, keys, false, m.rows);
    load_tile(prefix ? p.prefix_v : p.v, from, key, keys, m.v, !backward);
    if (backward) transpose(keys, words<Word>(p.V), m.v.along, m.v.along_row(), m.v_turned);
}

template <typename Word>
static void shape_keys(const HopeProblem& p, Kind kind, int64_t keys, bool backward, const Keys<Word>& m, float* spare) {
    float* rows = rows_for(m.k, spare);
    scale(keys, p.K, m.rows, key_factors(p, kind), nullptr, 1.0f, rows);
    fill_tile(keys, rows, padded(p.K), m.k, true, backward);
    transpose(keys, words<Word>(p.K), m.k.along, m.k.along_row(), m.k_turned);
}

template <typename Word>
static void shape_queries(const HopeProblem& p, Kind kind, int64_t rows, const float* from, const float* by_column,
                          float factor, bool down, const Tile<Word>& q, float* spare) {
    float* to = rows_for(q, spare);
    scale(rows, p.K, from, query_factors(p, kind), by_column, factor, to);
    fill_tile(rows, to, padded(p.K), q, true, down);
}

template <typename Word>
static void fill_logits(const HopeProblem& p, Kind kind, int64_t rows, int64_t keys, const Tile<Word>& q,
                        const Keys<Word>& m, const float* damping, float* logits) {
    multiply(rows, keys, words<Word>(p.K), q.left(), m.k_turned, padded(keys),
             product(logits, kTile, on_diagonal(kind) ? damping + kTile : nullptr));
}

// e^(-|d| damping) at kTile + d.
static void fill_damping(const HopeProblem& p, float* damping) {
    for (int64_t d = 0; d < 2 * kTile + 16; ++d) {
        const int64_t distance = d < kTile ? kTile - d : d - kTile;
        damping[d] = distance < kTile ? p.tables.damping[distance] : 0.0f;
    }
}

static float* lse_of(const HopeProblem& p, const Task& t) {
    return p.lse + (t.batch * p.heads + t.head) * p.of.length + t.begin;
}

// ---- forward --------------------------------------------------------------------------------------------------------
template <typename Word> struct Forward {
    Keys<Word> keys;
    Tile<Word> q, weights;
    float *plain, *turned, *spare, *columns, *damping, *logits, *out, *most, *total;

    Forward(const HopeProblem& p, Pieces& pieces) : keys(p, pieces) {
        const int64_t K = padded(p.K);
        q = pieces.tile<Word>(kTile, p.K), weights = pieces.tile<Word>(kTile, kTile);
        plain = pieces.take(kGroup * kTile * K), turned = pieces.take(kGroup * kTile * K);
        spare = pieces.take(kTile * K), columns = pieces.take(K), damping = pieces.take(2 * kTile + 16);
        logits = pieces.take(kTile * kTile), out = pieces.take(kGroup * kTile * padded(p.V));
        most = pieces.take(kGroup * kTile), total = pieces.take(kGroup * kTile * kLanes);
    }
};

// Joins a tile of logits, in powers of 2, to the softmax of the rows from `first` on: most is the largest logit of a row,
// total a vector of partial sums.
template <typename Word>
static void join(const HopeProblem& p, const Visible& visible, int64_t first, int64_t rows, const Forward<Word>& m) {
    const int64_t V = padded(p.V);
    float *out = m.out + first * V, *most = m.most + first, *totals = m.total + first * kLanes;
    for (int64_t i = 0; i < rows; ++i) {
        vf x[kVectors], largest = splat(-INFINITY);
        const int64_t lo = visible.lo(i), hi = visible.hi(i);
        for (int64_t v = 0; v < kVectors; ++v) {
            x[v] = splat(-INFINITY);
            if (v * kLanes < visible.keys)
                x[v] = only(load(m.logits + i * kTile + v * kLanes), v * kLanes, lo, hi, -INFINITY);
            largest = max(x[v], largest);
        }
        const float before = most[i], now = fmaxf(before, max_lane(largest));
        vf sum = splat(0.0f);
        for (int64_t v = 0; v < kVectors; ++v) {
            const vf w = exp2(x[v] - now);
            sum += w;
            store(m.weights.rows() + i * m.weights.rows_row() + v * kLanes, w);
        }
        float* total = totals + i * kLanes;
        if (now != before) {
            const vf shrink = exp2(splat(before - now));
            store(total, load(total) * shrink);
            most[i] = now;
            for (int64_t j = 0; j < V; j += kLanes) store(out + i * V + j, load(out + i * V + j) * shrink);
        }
        store(total, load(total) + sum);
    }
}

template <typename Word>
static void forward_task(const HopeProblem& p, const Task& t, int64_t query, const HeadRows& out,
                         const Forward<Word>& m) {
    const int64_t rows = min_of(kGroup * kTile, t.length - query), K = padded(p.K), V = padded(p.V);
    fill_damping(p, m.damping);
    load_rows(p.q, t, query, rows, p.K, m.plain);
    memcpy(m.turned, m.plain, rows * K * sizeof(float));
    turn(p, t.rotary, query, rows, false, m.turned);
    for (int64_t i = 0; i < rows; ++i) m.most[i] = -INFINITY, store(m.total + i * kLanes, splat(0.0f));
    for (int64_t i = 0; i < rows * V; i += kLanes) store(m.out + i, splat(0.0f));

    // The tiles of queries from `first` on, before `last`, meet the keys that are loaded.
    auto meet = [&](Kind kind, int64_t key, int64_t keys, int64_t first, int64_t last) {
        if (first >= last) return;
        shape_keys(p, kind, keys, false, m.keys, m.spare);
        for (; first < last; first += kTile) {
            const int64_t at = first - query, height = min_of(kTile, last - first);
            const float* by_column = across(p, kind, first, key, m.columns);
            const float* from = (kind == kPrefix ? m.plain : m.turned) + at * K;
            shape_queries(p, kind, height, from, by_column, p.scale * kLog2E, false, m.q, m.spare);
            fill_logits(p, kind, height, keys, m.q, m.keys, m.damping, m.logits);
            join(p, Visible(p, kind, first, key, keys), at, height, m);
            multiply(height, p.V, words<Word>(keys), m.weights.left(), m.keys.v.down, V,
                     Product<>{m.out + at * V, V, true});
        }
    };
    const int64_t end = query + rows;
    for (int64_t key = 0; key < p.prefix; key += kTile) {
        const int64_t keys = min_of(kTile, p.prefix - key);
        load_keys(p, t, true, key, keys, false, m.keys);
        meet(kPrefix, key, keys, query, end);
    }
    for (int64_t key = 0; key < (p.causal ? end : t.length); key += kTile) {
        const int64_t keys = min_of(kTile, t.length - key);
        load_keys(p, t, false, key, keys, false, m.keys);
        if (t.rotary) {
            meet(kRotary, key, keys, p.causal ? max_of(query, key) : query, end);
            continue;
        }
        if (query <= key && key < end) meet(kLower, key, keys, key, key + keys);
        meet(kLeft, key, keys, max_of(query, key + keys), end);
        if (p.causal) continue;
        if (query <= key && key < end) meet(kUpper, key, keys, key, key + keys);
        meet(kRight, key, keys, query, min_of(end, key));
    }
    float* lse = lse_of(p, t) + query;
    for (int64_t i = 0; i < rows; ++i) {
        const float total = sum(load(m.total + i * kLanes));
        lse[i] = m.most[i] * kLn2 + logf(total);
        const float inverse = 1.0f / total;
        for (int64_t j = 0; j < V; j += kLanes) store(m.out + i * V + j, load(m.out + i * V + j) * inverse);
    }
    store_rows(m.out, out, t, query, rows, p.V);
}

int64_t hope_forward_scratch(const HopeProblem& p) {
    Pieces pieces{nullptr};
    with_words(p.q, p.k, p.v, [&](auto word) { Forward<decltype(word)>(p, pieces); });
    return pieces.used;
}

void hope_forward(const HopeProblem& p, const HeadRows& out, float* scratch, int threads) {
    const int64_t per_thread = hope_forward_scratch(p);
    const Blocks blocks{p.of, kGroup * kTile};
    with_words(p.q, p.k, p.v, [&](auto word) {
        parallel_for(blocks.number() * p.heads, threads, [&](int64_t index) {
            int64_t query;
            const Task t(p, blocks.find(index / p.heads, query), index % p.heads);
            if (query >= t.length) return;
            Pieces pieces{scratch + thread_index() * per_thread};
            forward_task(p, t, query, out, Forward<decltype(word)>(p, pieces));
        });
    });
}

// ---- backward -------------------------------------------------------------------------------------------------------
template <typename Word> struct Backward {
    Keys<Word> keys;
    Tile<Word> q, dout, weights, dlogits;
    float *queries, *part, *spare, *columns, *damping, *logits, *products, *dq, *dk, *dk_part, *dv, *delta;

    Backward(const HopeProblem& p, Pieces& pieces) : keys(p, pieces) {
        const int64_t K = padded(p.K), V = padded(p.V), longest = p.of.longest();
        q = pieces.tile<Word>(kTile, p.K), dout = pieces.tile<Word>(kTile, p.V);
        weights = pieces.tile<Word>(kTile, kTile), dlogits = pieces.tile<Word>(kTile, kTile);
        queries = pieces.take(kTile * K), part = pieces.take(kTile * K), spare = pieces.take(kTile * K);
        columns = pieces.take(K), damping = pieces.take(2 * kTile + 16);
        logits = kNumbers<Word> == 1 ? (float*)weights.along : pieces.take(kTile * kTile);
        products = kNumbers<Word> == 1 ? (float*)dlogits.along : pieces.take(kTile * kTile);
        dq = pieces.take(longest * K), dk = pieces.take(kTile * K), dk_part = pieces.take(kTile * K);
        dv = pieces.take(2 * kTile * V), delta = pieces.take(longest);
    }
};

// delta[i] = (row i of dout) . (row i of o)
template <typename Word>
static void fill_delta(const HopeProblem& p, const Task& t, const HopeGradients& g, const Backward<Word>& m) {
    const int64_t V = padded(p.V);
    float *o = m.dv, *dout = m.dv + kTile * V;  // which nothing uses yet
    for (int64_t first = 0; first < t.length; first += kTile) {
        const int64_t rows = t.rows(first);
        load_rows(g.o, t, first, rows, p.V, o);
        load_rows(g.dout, t, first, rows, p.V, dout);
        for (int64_t i = 0; i < rows; ++i) {
            vf total = splat(0.0f);
            for (int64_t j = 0; j < V; j += kLanes) total += load(o + i * V + j) * load(dout + i * V + j);
            m.delta[first + i] = sum(total);
        }
    }
}

// Logits become weights, products become the logits' gradients. Returns the sum of gradient * logit * |distance|.
template <typename Word>
static float differentiate(const Visible& visible, int64_t rows, int64_t distance, bool wants_damping, const float* lse,
                           const float* delta, const Backward<Word>& m) {
    vf total = splat(0.0f), lane_number;
    for (int lane = 0; lane < kLanes; ++lane) lane_number[lane] = (float)lane;
    for (int64_t i = 0; i < rows; ++i) {
        const int64_t lo = visible.lo(i), hi = visible.hi(i);
        for (int64_t j = 0; j < visible.keys; j += kLanes) {
            float *logit = m.logits + i * kTile + j, *product = m.products + i * kTile + j;
            // left out before the exponential: above the diagonal of `lower` there may be infinities
            const vf x = only(load(logit), j, lo, hi, -INFINITY);
            const vf w = exp2((x - lse[i]) * kLog2E);
            const vf dlogit = w * (load(product) - delta[i]);
            if (wants_damping) {
                const vf gap = abs((float)(distance + i - j) - lane_number);
                total += dlogit * only(x, j, lo, hi, 0.0f) * gap;
            }
            store(logit, w);
            store(product, dlogit);
        }
    }
    return sum(total);
}

template <typename Word>
static double backward_keys(const HopeProblem& p, const Task& t, const HopeGradients& g, Kind kind, int64_t key,
                            int64_t keys, int64_t first, int64_t last, bool more, const Backward<Word>& m) {
    if (first >= last) return 0.0;
    const int64_t K = padded(p.K), V = padded(p.V);
    double ddamping = 0.0;
    shape_keys(p, kind, keys, true, m.keys, m.spare);
    for (int64_t query = first; query < last; query += kTile) {
        const int64_t rows = t.rows(query), inner = words<Word>(rows);
        const float* by_column = across(p, kind, query, key, m.columns);
        load_rows(p.q, t, query, rows, p.K, m.queries);
        if (kind != kPrefix) turn(p, t.rotary, query, rows, false, m.queries);
        shape_queries(p, kind, rows, m.queries, by_column, p.scale, true, m.q, m.spare);
        load_tile(g.dout, t, query, rows, m.dout, true);
        fill_logits(p, kind, rows, keys, m.q, m.keys, m.damping, m.logits);
        multiply(rows, keys, words<Word>(p.V), m.dout.left(), m.keys.v_turned, padded(keys),
                 Product<>{m.products, kTile});
        const bool wants_damping = g.ddamping && kind != kPrefix && kind != kRotary;
        ddamping += differentiate(Visible(p, kind, query, key, keys), rows, query - key, wants_damping,
                                  lse_of(p, t) + query, m.delta + query, m);
        if (on_diagonal(kind))  // of the products that the damping multiplied
            for (int64_t i = 0; i < rows; ++i)
                for (int64_t j = 0; j < keys; j += kLanes) {
                    float* x = m.products + i * kTile + j;
                    store(x, load(x) * load(m.damping + kTile + j - i));
                }
        fill_tile(rows, m.logits, kTile, m.weights, false, true);
        fill_tile(rows, m.products, kTile, m.dlogits, true, true);
        multiply(keys, p.V, inner, m.weights.left_turned(), m.dout.down, V, Product<>{m.dv, V, more || query > first});
        multiply(keys, p.K, inner, m.dlogits.left_turned(), m.q.down, K, Product<>{m.dk_part, K, query > first});
        multiply(rows, p.K, words<Word>(keys), m.dlogits.left(), m.keys.k.down, K, Product<>{m.part, K});
        if (kind == kPrefix) turn(p, t.rotary, query, rows, false, m.part);
        add_scaled(rows, p.K, m.part, query_factors(p, kind), by_column, p.scale, m.dq + query * K);
    }
    add_scaled(keys, p.K, m.dk_part, key_factors(p, kind), nullptr, 1.0f, m.dk);
    return ddamping;
}

template <typename Word>
static void backward_task(const HopeProblem& p, const Task& t, const HopeGradients& g, const Backward<Word>& m) {
    const int64_t K = padded(p.K), T = t.length;
    fill_damping(p, m.damping);
    fill_delta(p, t, g, m);
    for (int64_t i = 0; i < T * K; i += kLanes) store(m.dq + i, splat(0.0f));
    auto clear_dk = [&] {
        for (int64_t i = 0; i < kTile * K; i += kLanes) store(m.dk + i, splat(0.0f));
    };
    for (int64_t key = 0; key < p.prefix; key += kTile) {
        const int64_t keys = min_of(kTile, p.prefix - key), V = padded(p.V);
        load_keys(p, t, true, key, keys, true, m.keys);
        clear_dk();
        backward_keys(p, t, g, kPrefix, key, keys, 0, T, false, m);
        for (int64_t i = 0; i < keys; ++i) {
            const int64_t at = (t.sequence * p.prefix + key + i) * p.heads + t.head;
            for (int64_t j = 0; j < p.K; ++j) g.dprefix_k[at * p.K + j] = T ? m.dk[i * K + j] : 0.0f;
            for (int64_t j = 0; j < p.V; ++j) g.dprefix_v[at * p.V + j] = T ? m.dv[i * V + j] : 0.0f;
        }
    }
    double ddamping = 0.0;
    for (int64_t key = 0; key < T; key += kTile) {
        const int64_t keys = t.rows(key), after = key + keys;
        load_keys(p, t, false, key, keys, true, m.keys);
        clear_dk();
        if (t.rotary) {
            backward_keys(p, t, g, kRotary, key, keys, p.causal ? key : 0, T, false, m);
        } else {
            ddamping += backward_keys(p, t, g, kLower, key, keys, key, after, false, m);
            ddamping += backward_keys(p, t, g, kLeft, key, keys, after, T, true, m);
            if (!p.causal) {
                ddamping += backward_keys(p, t, g, kUpper, key, keys, key, after, true, m);
                ddamping += backward_keys(p, t, g, kRight, key, keys, 0, key, true, m);
            }
        }
        turn(p, t.rotary, key, keys, true, m.dk);
        store_rows(m.dk, g.dk, t, key, keys, p.K);
        store_rows(m.dv, g.dv, t, key, keys, p.V);
    }
    turn(p, t.rotary, 0, T, true, m.dq);
    store_rows(m.dq, g.dq, t, 0, T, p.K);
    if (g.ddamping) g.ddamping[t.sequence * p.heads + t.head] = (float)-ddamping;
}

int64_t hope_backward_scratch(const HopeProblem& p) {
    Pieces pieces{nullptr};
    with_words(p.q, p.k, p.v, [&](auto word) { Backward<decltype(word)>(p, pieces); });
    return pieces.used;
}

void hope_backward(const HopeProblem& p, const HopeGradients& g, float* scratch, int threads) {
    const int64_t per_thread = hope_backward_scratch(p);
    with_words(p.q, p.k, p.v, [&](auto word) {
        parallel_for(p.of.number * p.heads, threads, [&](int64_t index) {
            Pieces pieces{scratch + thread_index() * per_thread};
            backward_task(p, Task(p, index / p.heads, index % p.heads), g, Backward<decltype(word)>(p, pieces));
        });
    });
}

}  // namespace ULTRA_ISA
}  // namespace ultra

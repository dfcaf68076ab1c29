// Contract: ultra_kernels/sigmoid_attention/op.py
//
// Scores exist as tiles of kQueries x kKeys that stay in cache. Forward, a task is a block of queries of one head, which
// meets the keys tile by tile; rows do not couple, so nothing is rescaled. Backward, a task is one head of one sequence:
// every tile of scores is computed once and gives its part of dq, dk and dv, 5 products; dq waits in scratch.
#include "sigmoid_attention/sigmoid_attention.h"

#include "common/gates.h"
#include "common/parallel.h"

#include <math.h>

namespace ultra {
namespace ULTRA_ISA {

constexpr int64_t kQueries = 128, kKeys = 64;
constexpr float kLog2E = 1.44269504088896f, kEpsilon = 1e-6f;

// Weights of logits that are times and added to -log2(e) already: 1 / (1 + 2^x). The tail below is exact to the last
// bits of a float, which 1/2 + tanh/2 is not. complement becomes 1 - weight without its cancellation.
static inline vf weight(vf x, vf& complement) {
    const vf e = exp2(min(splat(126.0f), x));
    const vf w = reciprocal(1.0f + e);
    complement = e * w;
    return w;
}

// A vector of keys from `first` on, of which the first `visible` count: the others become 0.
static inline vf visible_alone(vf x, int64_t first, int64_t visible) {
    if (first + kLanes <= visible) return x;
    for (int lane = 0; lane < kLanes; ++lane)
        if (first + lane >= visible) x[lane] = 0.0f;
    return x;
}

// What turns a score into the argument of `weight`.
struct Logit {
    float factor, bias;

    Logit(const SigmoidProblem& p, const HeadOfSequence& t) {
        bias = p.normalize ? 0.0f : p.head_bias ? p.head_bias[t.head] : p.bias;
        if (p.bias_of_length && !p.normalize) bias = -logf((float)max_of(t.length, 1));
        factor = -kLog2E * p.scale, bias *= -kLog2E;
    }
};

// Keys of the tile [key, key + keys) that query `row` sees.
static int64_t visible(const SigmoidProblem& p, int64_t row, int64_t key, int64_t keys) {
    return p.causal ? max_of(0, min_of(keys, row + 1 - key)) : keys;
}

static float* sums_of(const SigmoidProblem& p, const HeadOfSequence& t) {
    return p.sums + (t.batch * p.heads + t.head) * p.of.length + t.begin;
}

// ---- forward --------------------------------------------------------------------------------------------------------
template <typename Word> struct Forward {
    Tile<Word> q, k, v, weights;
    Word* k_turned;
    float *scores, *out;

    Forward(const SigmoidProblem& p, Pieces& pieces) {
        q = pieces.tile<Word>(kQueries, p.K), k = pieces.tile<Word>(kKeys, p.K), v = pieces.tile<Word>(kKeys, p.V);
        weights = pieces.tile<Word>(kQueries, kKeys), k_turned = pieces.take<Word>(p.K * kKeys);
        scores = kNumbers<Word> == 1 ? (float*)weights.along : pieces.take(kQueries * kKeys);
        out = pieces.take(kQueries * padded(p.V));
    }
};

template <typename Word>
static void forward_task(const SigmoidProblem& p, const HeadOfSequence& t, int64_t first, const HeadRows& out,
                         const Forward<Word>& m) {
    const int64_t rows = min_of(kQueries, t.length - first), V = padded(p.V);
    const int64_t end = p.causal ? first + rows : t.length;
    const Logit logit(p, t);
    double sums[kQueries] = {};
    load_tile(p.q, t, first, rows, m.q, false);
    for (int64_t key = 0; key < end; key += kKeys) {
        const int64_t keys = min_of(kKeys, end - key);
        load_tile(p.k, t, key, keys, m.k, false);
        load_tile(p.v, t, key, keys, m.v, true);
        transpose(keys, words<Word>(p.K), m.k.along, m.k.along_row(), m.k_turned);
        multiply(rows, keys, words<Word>(p.K), m.q.left(), m.k_turned, padded(keys), Product<>{m.scores, kKeys});
        for (int64_t i = 0; i < rows; ++i) {
            const int64_t seen = visible(p, first + i, key, keys);
            vf total = splat(0.0f), complement;
            for (int64_t j = 0; j < keys; j += kLanes) {
                const vf x = load(m.scores + i * kKeys + j) * logit.factor + logit.bias;
                const vf w = visible_alone(weight(x, complement), j, seen);
                store(m.weights.rows() + i * m.weights.rows_row() + j, w);
                total += w;
            }
            if (p.normalize) sums[i] += sum(total);
        }
        multiply(rows, p.V, words<Word>(keys), m.weights.left(), m.v.down, V, Product<>{m.out, V, key > 0});
    }
    for (int64_t i = 0; p.normalize && i < rows; ++i) {
        sums_of(p, t)[first + i] = (float)sums[i];
        const float inverse = 1.0f / ((float)sums[i] + kEpsilon);
        for (int64_t j = 0; j < V; j += kLanes) store(m.out + i * V + j, load(m.out + i * V + j) * inverse);
    }
    store_rows(m.out, out, t, first, rows, p.V);
}

int64_t sigmoid_forward_scratch(const SigmoidProblem& p) {
    Pieces pieces{nullptr};
    with_words(p.q, p.k, p.v, [&](auto word) { Forward<decltype(word)>(p, pieces); });
    return pieces.used;
}

void sigmoid_forward(const SigmoidProblem& p, const HeadRows& out, float* scratch, int threads) {
    const int64_t per_thread = sigmoid_forward_scratch(p);
    const Blocks blocks{p.of, kQueries};
    with_words(p.q, p.k, p.v, [&](auto word) {
        parallel_for(blocks.number() * p.heads, threads, [&](int64_t index) {
            int64_t first;
            const HeadOfSequence t(p.of, blocks.find(index / p.heads, first), index % p.heads);
            if (first >= t.length) return;
            Pieces pieces{scratch + thread_index() * per_thread};
            forward_task(p, t, first, out, Forward<decltype(word)>(p, pieces));
        });
    });
}

// ---- backward -------------------------------------------------------------------------------------------------------
template <typename Word> struct Backward {
    Tile<Word> q, k, v, dout, weights, dscores;
    Word *k_turned, *v_turned;
    float *scores, *products, *dq, *dk, *dv, *inverse, *delta;

    Backward(const SigmoidProblem& p, Pieces& pieces) {
        const int64_t K = padded(p.K), V = padded(p.V), longest = p.of.longest();
        q = pieces.tile<Word>(kQueries, p.K), dout = pieces.tile<Word>(kQueries, p.V);
        k = pieces.tile<Word>(kKeys, p.K), v = pieces.tile<Word>(kKeys, p.V);
        weights = pieces.tile<Word>(kQueries, kKeys), dscores = pieces.tile<Word>(kQueries, kKeys);
        k_turned = pieces.take<Word>(p.K * kKeys), v_turned = pieces.take<Word>(p.V * kKeys);
        scores = kNumbers<Word> == 1 ? (float*)weights.along : pieces.take(kQueries * kKeys);
        products = kNumbers<Word> == 1 ? (float*)dscores.along : pieces.take(kQueries * kKeys);
        dq = pieces.take(longest * K), dk = pieces.take(kKeys * K), dv = pieces.take(kKeys * V);
        inverse = pieces.take(p.normalize ? longest : 0), delta = pieces.take(p.normalize ? longest : 0);
    }
};

// inverse[i] = 1 / (row i's sum + epsilon), delta[i] = inverse[i] * (row i of dout) . (row i of o)
template <typename Word>
static void prepare_rows(const SigmoidProblem& p, const HeadOfSequence& t, const SigmoidGradients& g,
                         const Backward<Word>& m) {
    const int64_t V = padded(p.V);
    const int64_t step = kKeys / 2;
    float *o = m.dv, *dout = m.dv + step * V;  // which nothing uses yet
    for (int64_t first = 0; first < t.length; first += step) {
        const int64_t rows = min_of(step, t.length - first);
        load_rows(g.o, t, first, rows, p.V, o);
        load_rows(g.dout, t, first, rows, p.V, dout);
        for (int64_t i = 0; i < rows; ++i) {
            vf total = splat(0.0f);
            for (int64_t j = 0; j < V; j += kLanes) total += load(o + i * V + j) * load(dout + i * V + j);
            m.inverse[first + i] = 1.0f / (sums_of(p, t)[first + i] + kEpsilon);
            m.delta[first + i] = m.inverse[first + i] * sum(total);
        }
    }
}

template <typename Word>
static void backward_task(const SigmoidProblem& p, const HeadOfSequence& t, const SigmoidGradients& g,
                          const Backward<Word>& m) {
    const int64_t K = padded(p.K), V = padded(p.V);
    const Logit logit(p, t);
    double dbias = 0.0;
    if (p.normalize) prepare_rows(p, t, g, m);
    for (int64_t key = 0; key < t.length; key += kKeys) {
        const int64_t keys = min_of(kKeys, t.length - key), start = p.causal ? key / kQueries * kQueries : 0;
        load_tile(p.k, t, key, keys, m.k, true);
        load_tile(p.v, t, key, keys, m.v, false);
        transpose(keys, words<Word>(p.K), m.k.along, m.k.along_row(), m.k_turned);
        transpose(keys, words<Word>(p.V), m.v.along, m.v.along_row(), m.v_turned);
        for (int64_t first = start; first < t.length; first += kQueries) {
            const int64_t rows = min_of(kQueries, t.length - first);
            load_tile(p.q, t, first, rows, m.q, true);
            load_tile(g.dout, t, first, rows, m.dout, !p.normalize);
            if (p.normalize) {
                for (int64_t i = 0; i < rows; ++i)
                    for (int64_t j = 0; j < V; j += kLanes) {
                        auto* x = m.dout.rows() + i * m.dout.rows_row() + j;
                        store(x, load(x) * m.inverse[first + i]);
                    }
                fill_down(rows, m.dout);
            }
            multiply(rows, keys, words<Word>(p.K), m.q.left(), m.k_turned, padded(keys), Product<>{m.scores, kKeys});
            multiply(rows, keys, words<Word>(p.V), m.dout.left(), m.v_turned, padded(keys),
                     Product<>{m.products, kKeys});
            vf total = splat(0.0f);
            for (int64_t i = 0; i < rows; ++i) {
                const int64_t seen = visible(p, first + i, key, keys);
                const float delta = p.normalize ? m.delta[first + i] : 0.0f;
                for (int64_t j = 0; j < keys; j += kLanes) {
                    float *score = m.scores + i * kKeys + j, *product = m.products + i * kKeys + j;
                    vf complement;
                    const vf w = visible_alone(weight(load(score) * logit.factor + logit.bias, complement), j, seen);
                    const vf dscore = w * complement * (load(product) - delta);
                    total += dscore;
                    store(score, w);
                    store(product, dscore * p.scale);
                }
            }
            dbias += sum(total);
            fill_tile(rows, m.scores, kKeys, m.weights, false, true);
            fill_tile(rows, m.products, kKeys, m.dscores, true, true);
            const int64_t inner = words<Word>(rows);
            const bool more = first > start;
            multiply(keys, p.V, inner, m.weights.left_turned(), m.dout.down, V, Product<>{m.dv, V, more});
            multiply(keys, p.K, inner, m.dscores.left_turned(), m.q.down, K, Product<>{m.dk, K, more});
            multiply(rows, p.K, words<Word>(keys), m.dscores.left(), m.k.down, K,
                     Product<>{m.dq + first * K, K, key > 0});
        }
        store_rows(m.dk, g.dk, t, key, keys, p.K);
        store_rows(m.dv, g.dv, t, key, keys, p.V);
    }
    store_rows(m.dq, g.dq, t, 0, t.length, p.K);
    g.dbias[t.sequence * p.heads + t.head] = (float)dbias;
}

int64_t sigmoid_backward_scratch(const SigmoidProblem& p) {
    Pieces pieces{nullptr};
    with_words(p.q, p.k, p.v, [&](auto word) { Backward<decltype(word)>(p, pieces); });
    return pieces.used;
}

void sigmoid_backward(const SigmoidProblem& p, const SigmoidGradients& g, float* scratch, int threads) {
    const int64_t per_thread = sigmoid_backward_scratch(p);
    with_words(p.q, p.k, p.v, [&](auto word) {
        parallel_for(p.of.number * p.heads, threads, [&](int64_t index) {
            Pieces pieces{scratch + thread_index() * per_thread};
            backward_task(p, HeadOfSequence(p.of, index / p.heads, index % p.heads), g,
                          Backward<decltype(word)>(p, pieces));
        });
    });
}

}  // namespace ULTRA_ISA
}  // namespace ultra

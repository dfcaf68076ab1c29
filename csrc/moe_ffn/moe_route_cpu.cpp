// Contract: moe_route of ultra_kernels/moe_ffn/op.py. A few vectors of work per token; the sums over tokens and the order
// of the pairs go block by block.
#include "moe_ffn/moe_ffn.h"

#include "common/blocks.h"
#include "common/gates.h"
#include "common/parallel.h"

namespace ultra {
namespace ULTRA_ISA {

namespace {

inline int64_t wide(int64_t experts) { return padded(experts); }

// Floats of a block of tokens: its sum of softmaxes, the sum of its squared logsumexps, and two rows for its work.
inline int64_t floats(int64_t experts) { return 3 * wide(experts) + kLanes; }

// p [wide(n)] = softmax of logits [n], zeros after it; returns the logsumexp.
inline float softmax(const float* logits, int64_t n, float* p) {
    const float least = -__builtin_inff();
    vf most = splat(least), total = {};
    const auto at = [=](int64_t c) {
        return n - c < kLanes ? load_part(logits + c, (int)(n - c), least) : load(logits + c);
    };
    for (int64_t c = 0; c < n; c += kLanes) most = max(most, at(c));
    const float top = max_lane(most);
    for (int64_t c = 0; c < n; c += kLanes) {
        vf x = at(c);
        x = select(x == splat(least), splat(0.0f), exp(x - top));
        store(p + c, x);
        total += x;
    }
    const float all = sum(total);
    for (int64_t c = 0; c < n; c += kLanes) store(p + c, load(p + c) / all);
    return top + __builtin_logf(all);
}

// The top_k largest of scores [n], the largest first: NaN before all others, of equal ones the lowest index first.
inline void choose(const float* scores, int64_t n, int64_t top_k, int32_t* chosen) {
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

// weights [wide(top_k)] = the softmax over the chosen logits.
inline void among_chosen(const float* logits, const int32_t* chosen, int64_t top_k, float* own, float* weights) {
    for (int64_t j = 0; j < top_k; ++j) own[j] = logits[chosen[j]];
    softmax(own, top_k, weights);
}

}  // namespace

int64_t moe_route_scratch(int64_t tokens, int64_t experts) {
    return row_blocks(tokens) * (floats(experts) + wide(experts));
}

void moe_route(const MoERouting& r, int64_t* order, int64_t* inverse, int64_t* ends, int64_t* counts, float* mean_prob,
               float* z, float* scratch, int threads) {
    const int64_t E = r.experts, row = wide(E), parts = row_blocks(r.tokens);
    const auto own = [=](int64_t block) { return scratch + block * floats(E); };
    const auto count = [=](int64_t block) { return (int32_t*)(scratch + parts * floats(E)) + block * row; };
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
    const int64_t E = r.experts, row = wide(E);
    const float tokens = (float)r.tokens;
    for_row_blocks(r.tokens, threads, [&](int64_t begin, int64_t end, int64_t block) {
        float *p = scratch + block * floats(E), *d = p + row, *q = d + row;
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

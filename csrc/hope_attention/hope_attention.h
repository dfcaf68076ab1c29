// Contract: ultra_kernels/hope_attention/op.py
#pragma once

#include "common/heads.h"
#include "common/isa.h"

#include <stdint.h>

namespace ultra {

constexpr int64_t kHopeTile = 64;    // queries, and keys, of a tile: the longest distance of the tables below
constexpr int64_t kHopeColumns = 16;  // rows of the tables are padded with zeros to multiples of this

// Rates are what channel c of a key loses per token of distance, in light-cone coordinates. Side 0 is of keys on the left
// of their queries, side 1 of those on the right, where the two channels of a pair swap.
struct HopeTables {
    const float* rate;     // [2, K]: with damping
    const float* shrink;   // [2, kHopeTile, K]: e^(-j rate)
    const float* query;    // [2, kHopeTile, K]: e^(-+(j - kHopeTile / 2) (rate - damping)), for tiles on the diagonal
    const float* key;      // [2, kHopeTile, K]: 1 / query
    const float* damping;  // [kHopeTile]: e^(-j damping)
    const float* cosine;   // [T, K] of the rotary heads, and the sines, with a minus for the first channel of a pair
    const float* sine;
};

struct HopeProblem {
    int64_t heads, K, V, rotary_heads, prefix;  // prefix: keys before every sequence
    Sequences of;
    HeadRows q, k, v;
    HeadRows prefix_k, prefix_v;  // [1, prefix, H, *]
    HopeTables tables;
    float scale;
    bool causal;
    float* lse;  // [B,H,T]: ln of the sum of the exponentials of a row's logits
};

struct HopeGradients {
    HeadRows o, dout, dq, dk, dv;
    float* ddamping;                // [sequences, H], or null: summed over the tokens of one sequence
    float *dprefix_k, *dprefix_v;   // [sequences, prefix, H, *], likewise
};

}  // namespace ultra

ULTRA_FOR_EACH_ISA(
    // Floats of scratch memory per thread.
    int64_t hope_forward_scratch(const HopeProblem& p);
    int64_t hope_backward_scratch(const HopeProblem& p);

    void hope_forward(const HopeProblem& p, const HeadRows& out, float* scratch, int threads);
    void hope_backward(const HopeProblem& p, const HopeGradients& g, float* scratch, int threads);
)

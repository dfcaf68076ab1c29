// Contract: ultra_kernels/moe_ffn/op.py. The router and the experts are two calls: gates and the order come in between.
#pragma once

#include "common/isa.h"

#include <stdint.h>

namespace ultra {

// Slots are the pairs token * top_k + choice, sorted by expert.
struct MoEProblem {
    int64_t tokens, experts, top_k, D, F;
    bool gated;
    int activation;                        // silu, gelu, relu, relu2
    int dtype;                             // of x, weights and hidden
    const void* x;                         // [tokens, D], rows x_row apart
    int64_t x_row;
    const float* gates;                    // [tokens, top_k]
    const int64_t *order, *inverse, *ends; // the pair of a slot, the slot of a pair, the end of each expert's slots
    const void *w_in, *w_out;              // [E, F or 2F, D], [E, D, F]
    const float *b_in, *b_out, *sub_norm;  // [E, F or 2F], [E, D], [F]; each may be null
    void* hidden;                          // [slots, moe_row(F) once or twice]: before the activation
};

// Of the gradients, those that are not wanted are null; dgates never is.
struct MoEGradients {
    const void* dy;  // [tokens, D], rows dy_row apart, in x's dtype
    int64_t dy_row;
    void* dx;        // [tokens, D]
    float* dgates;   // [tokens, top_k]
    void *dw_in, *dw_out;
    float *db_in, *db_out, *dsub_norm;
};

// What the router's kernels share. select_bias [experts] may be null.
struct MoERouting {
    int64_t tokens, experts, top_k;
    bool normalize;
    const float *logits, *select_bias;  // [tokens, experts]
    float* gates;                       // [tokens, top_k]; not of the backward
    int32_t* chosen;                    // the same shape
};

// Rows of activations are padded with zeros: whole vectors, and whole words of pairs. op.py allocates by the same rule.
inline int64_t moe_row(int64_t n) { return (n + 31) / 32 * 32; }

}  // namespace ultra

ULTRA_FOR_EACH_ISA(
    // Floats of scratch memory.
    int64_t moe_forward_scratch(const MoEProblem& p, int threads);
    int64_t moe_backward_scratch(const MoEProblem& p, int threads);

    void moe_forward(const MoEProblem& p, void* y, float* scratch, int threads);
    void moe_backward(const MoEProblem& p, const MoEGradients& g, float* scratch, int threads);

    // mean_prob [experts], z [1]; the others as in MoEProblem, counts [experts].
    int64_t moe_route_scratch(int64_t tokens, int64_t experts);
    void moe_route(const MoERouting& r, int64_t* order, int64_t* inverse, int64_t* ends, int64_t* counts,
                   float* mean_prob, float* z, float* scratch, int threads);
    void moe_route_backward(const MoERouting& r, const float* dgates, const float* dmean_prob, float dz, float* dlogits,
                            float* scratch, int threads);
)

// Contract: ultra_kernels/retention/op.py
#pragma once

#include "common/heads.h"
#include "common/isa.h"

#include <stdint.h>

namespace ultra {

constexpr int64_t kRetentionChunk = 64;      // tokens of a chunk unless the caller asks for another length
constexpr int64_t kRetentionMaxChunk = 128;  // its tiles of scores still fit the second cache

struct RetentionProblem {
    int64_t heads, K, V, chunk;
    Sequences of;
    HeadRows q, k, v;
    const float *log_decay, *scale;  // [H]
    bool left, right;                // a query sees the keys before it, after it; always the one at its own position
    const float* initial;            // [sequences, H, K, V] or null
};

struct RetentionGradients {
    HeadRows dout, dq, dk, dv;
    const float* dlast;  // [sequences, H, K, V] or null
    float *dinitial;     // the same, or null
    float* dscale;       // [sequences, H]: d scale, summed over the tokens of one sequence
};

}  // namespace ultra

ULTRA_FOR_EACH_ISA(
    // Floats of scratch memory per thread.
    int64_t retention_forward_scratch(const RetentionProblem& p);
    int64_t retention_backward_scratch(const RetentionProblem& p);

    // last: [sequences, H, K, V], or null.
    void retention_forward(const RetentionProblem& p, const HeadRows& out, float* last, float* scratch, int threads);
    void retention_backward(const RetentionProblem& p, const RetentionGradients& g, float* scratch, int threads);

    // One token: state [B,H,K,V] becomes next = gamma state + k v^T; o = scale q^T next. Length and borders are unused.
    void retention_step(const RetentionProblem& p, const float* state, float* next, const HeadRows& out, int threads);
)

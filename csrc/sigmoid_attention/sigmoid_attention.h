// Contract: ultra_kernels/sigmoid_attention/op.py
#pragma once

#include "common/heads.h"
#include "common/isa.h"

#include <stdint.h>

namespace ultra {

struct SigmoidProblem {
    int64_t heads, K, V;
    Sequences of;
    HeadRows q, k, v;
    float scale, bias;
    bool bias_of_length;    // the bias is -ln of the sequence's length
    const float* head_bias;  // [H], instead of bias; or null
    bool normalize, causal;
    float* sums;  // [B,H,T]: of each row's weights; with normalize alone
};

struct SigmoidGradients {
    HeadRows o, dout, dq, dk, dv;  // o with normalize alone
    float* dbias;                  // [sequences, H]: summed over the tokens of one sequence
};

}  // namespace ultra

ULTRA_FOR_EACH_ISA(
    // Floats of scratch memory per thread.
    int64_t sigmoid_forward_scratch(const SigmoidProblem& p);
    int64_t sigmoid_backward_scratch(const SigmoidProblem& p);

    void sigmoid_forward(const SigmoidProblem& p, const HeadRows& out, float* scratch, int threads);
    void sigmoid_backward(const SigmoidProblem& p, const SigmoidGradients& g, float* scratch, int threads);
)

// Contract: ultra_kernels/masked_linear_cross_entropy/op.py, of the labelled rows alone.
#pragma once

#include "common/isa.h"

#include <stdint.h>

namespace ultra {

struct CrossEntropyProblem {
    int64_t T, rows, D, V;
    bool pairs;  // products of bfloat16, to which float32 is rounded; else of float32
    const void* hidden;  // [T, D], rows hidden_row apart
    int64_t hidden_row;
    int hidden_dtype;
    const void* weight;  // [V, D], rows weight_row apart
    int64_t weight_row;
    int weight_dtype;
    const int64_t* labels;    // [T]; of the labelled rows within 0..V-1
    const int64_t* labelled;  // [rows], rising
    const float* bias;        // [V]; may be null
    float z_loss, scale;      // of the loss and of its gradients
};

// All null where only the loss is wanted; dbias may be null by itself. Float32 or bfloat16, dbias float32.
struct CrossEntropyGradients {
    void* dhidden;  // [T, D]
    int dhidden_dtype;
    void* dweight;  // [V, D]
    int dweight_dtype;
    float* dbias;   // [V]
};

}  // namespace ultra

ULTRA_FOR_EACH_ISA(
    // Whether there are products of bfloat16.
    bool cross_entropy_has_pairs();

    // Floats of scratch memory.
    int64_t cross_entropy_scratch(const CrossEntropyProblem& p, const CrossEntropyGradients& g, int threads);

    void cross_entropy(const CrossEntropyProblem& p, const CrossEntropyGradients& g, float* loss, float* scratch,
                       int threads);
)

// Contract: ultra_kernels/bitlinear/op.py; the forward is csrc/ternary's. Gradients of y = x̂ Ŵᵀ: dx̂ = dy Ŵ, dŴ = dyᵀ x̂.
#pragma once

#include "common/isa.h"
#include "ternary/ternary.h"

#include <stdint.h>

namespace ultra {

struct OutputGradient {
    const void* data;  // [M, N] float32; with `pairs` bfloat16, rows an even number apart
    int64_t row;
    bool pairs;
};

}  // namespace ultra

ULTRA_FOR_EACH_ISA(
    bool bitlinear_pairs();
    int64_t bitlinear_scratch(int threads);  // floats

    // dx [M, K] = dy · codes · gamma.
    void bitlinear_dx(const OutputGradient& dy, int64_t M, const TernaryMatrix& w, const float* gamma, float* dx,
                      float* scratch, int threads);

    // dweight [N, K] = (dy · step)ᵀ · codes of x.
    void bitlinear_dweight(const OutputGradient& dy, int64_t N, int64_t K, const Int8Rows& x, float* dweight,
                           float* scratch, int threads);

    // Through norm(x) = weight · x · rstd: dx in x's dtype, dweight [K]; grad [M, K]. parts: row_blocks(M) * K floats.
    void bitlinear_norm_backward(const float* grad, const void* x, int64_t x_row, int dtype, const float* rstd,
                                 const float* weight, int64_t M, int64_t K, void* dx, float* dweight, float* parts,
                                 int threads);

    // A number that changes with nearly every change of the n numbers of `size` bytes.
    uint64_t bitlinear_fingerprint(const void* data, int64_t n, int64_t size);
)

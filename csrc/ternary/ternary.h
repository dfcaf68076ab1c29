// Contract: ultra_kernels/ternary/op.py and ultra_kernels/bitlinear/op.py. Packed codes are PackedTernary's; M rows of x,
// N of the matrix, K columns.
#pragma once

#include "common/isa.h"

#include <stdint.h>

namespace ultra {

struct TernaryMatrix {
    const uint8_t* codes;
    int64_t N, K;
};

// Groups of consecutive rows: ends [count] is where each one's end; each has a matrix, a scale and a bias of its own, one
// after another in memory.
struct TernaryGroups {
    const int64_t* ends;
    int64_t count;
};

// Rows of x [M, K] as codes · step.
struct Int8Rows {
    int8_t* codes;
    float* step;
    int64_t M;
};

}  // namespace ultra

ULTRA_FOR_EACH_ISA(
    int64_t ternary_scratch(int64_t M, int64_t K);  // bytes, for either product

    // y [M, N] = x · codesᵀ; rows of x are x_row >= K apart: up to 15 bytes between them are read.
    void ternary_matmul(const int8_t* x, int64_t x_row, int64_t M, const TernaryMatrix& w, int32_t* y, char* scratch,
                        int threads);

    // codes, step of norm(x); norm_weight null: of x itself. rstd [M] is written with a norm alone.
    void ternary_quantize_rows(const void* x, int64_t x_row, int dtype, int64_t K, const float* norm_weight,
                               const Int8Rows& to, float* rstd, int threads);

    // y [M, N] = (codes of x · codesᵀ) · step · scale + bias; w is the first matrix, bias [count, N] or null.
    void ternary_product(const Int8Rows& x, const TernaryGroups& of, const TernaryMatrix& w, const float* scale,
                         const float* bias, void* y, int dtype, char* scratch, int threads);

    // Both in turn, x and y of `dtype`.
    int64_t ternary_linear_scratch(int64_t M, int64_t K);
    void ternary_linear(const void* x, int64_t x_row, int64_t M, const TernaryGroups& of, const TernaryMatrix& w,
                        const float* scale, const float* bias, void* y, int dtype, char* scratch, int threads);

    // Of each of `count` matrices, one after another: gamma = mean of |weight| unless `median`, when it is read; packed
    // codes of clip(round(weight / (gamma + 1e-5))).
    void ternary_quantize_weight(const void* weight, int dtype, int64_t count, int64_t N, int64_t K, bool median,
                                 float* gamma, uint8_t* packed, int threads);
)

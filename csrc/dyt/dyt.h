// Contract: ultra_kernels/dyt/op.py. Rows are contiguous: x, y, dy, dx are [rows, D]; weight and bias are float32 [D].
// residual, s, ds: the same shape and dtype, or null without a residual; ds is null where only y has a gradient.
#pragma once

#include "common/isa.h"

#include <stdint.h>

ULTRA_FOR_EACH_ISA(
    void dyt_forward(const void* x, const void* residual, float alpha, const float* weight, const float* bias, void* y,
                     void* s, int64_t rows, int64_t D, int dtype, int threads);

    // x: what was normalised, s where there is a residual. dx is the residual's gradient too.
    // dweight, dbias: [D], dalpha: [1], all float32 and written, not added to.
    // scratch: row_blocks(rows) * (2 * D + 2) floats.
    void dyt_backward(const void* dy, const void* ds, const void* x, float alpha, const float* weight, void* dx,
                      float* dalpha, float* dweight, float* dbias, float* scratch, int64_t rows, int64_t D, int dtype,
                      int threads);
)

// Contract: ultra_kernels/derf/op.py. Rows are contiguous: x, y, dy, dx are [rows, D]; weight and bias are float32 [D].
// residual, s, ds: the same shape and dtype, or null without a residual; ds is null where only y has a gradient.
#pragma once

#include "common/isa.h"

#include <stdint.h>

ULTRA_FOR_EACH_ISA(
    void derf_forward(const void* x, const void* residual, float alpha, float shift, const float* weight,
                      const float* bias, void* y, void* s, int64_t rows, int64_t D, int dtype, int threads);

    // x: what was normalised, s where there is a residual. dx is the residual's gradient too.
    // dweight, dbias: [D], dalpha_dshift: [2], all float32 and written, not added to.
    // scratch: row_blocks(rows) * (2 * D + 2) floats.
    void derf_backward(const void* dy, const void* ds, const void* x, float alpha, float shift, const float* weight,
                       void* dx, float* dalpha_dshift, float* dweight, float* dbias, float* scratch, int64_t rows,
                       int64_t D, int dtype, int threads);
)

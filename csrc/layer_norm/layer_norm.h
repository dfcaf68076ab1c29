// Contract: ultra_kernels/layer_norm/op.py. Rows are contiguous: x, y, dy, dx are [rows, D]; weight and bias are
// float32 [D]. residual, s, ds: the same shape and dtype, or null without a residual; ds is null where only y has a
// gradient. stats [rows, 3]: what the backward needs to normalise again, kNumbers of the .cpp file.
#pragma once

#include "common/isa.h"

#include <stdint.h>

ULTRA_FOR_EACH_ISA(
    void layer_norm_forward(const void* x, const void* residual, const float* weight, const float* bias, void* y,
                            void* s, float* stats, int64_t rows, int64_t D, float eps, int dtype, int threads);

    // x: what was normalised, s where there is a residual. dx is the residual's gradient too.
    // dweight, dbias: [D], float32 and written, not added to. scratch: row_blocks(rows) * 2 * D floats.
    void layer_norm_backward(const void* dy, const void* ds, const void* x, const float* stats, const float* weight,
                             void* dx, float* dweight, float* dbias, float* scratch, int64_t rows, int64_t D,
                             int dtype, int threads);
)

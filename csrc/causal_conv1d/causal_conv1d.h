// Contract: ultra_kernels/causal_conv1d/op.py. The direction is an offset: output t is act(bias + sum over k < width of
// weight[k] * x[t + first + k]), float32 weight [width, D] (mirrored by the caller for direction "backward").
#pragma once

#include "common/isa.h"
#include "common/view.h"

#include <stdint.h>

namespace ultra {

struct ConvProblem {
    int64_t batch, channels, length, width, first;
    View x;
    const float *weight, *bias;  // bias [D] or null
    const int32_t* borders;      // [sequences + 1], or null: every batch row is one sequence
    int64_t sequences;
    bool silu;
};

constexpr int64_t kConvBlock = 64;    // channels of one task
constexpr int64_t kConvRows = 64;     // time steps of one tile
constexpr int64_t kConvMaxWidth = 8;

}  // namespace ultra

ULTRA_FOR_EACH_ISA(
    void conv_forward(const ConvProblem& p, const View& y, int threads);

    // dweight [width, D] and dbias [D], float32, are written, not added to.
    void conv_backward(const ConvProblem& p, const View& dy, const View& dx, float* dweight, float* dbias, int threads);
)

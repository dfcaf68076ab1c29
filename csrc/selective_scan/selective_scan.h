// Contract: ultra_kernels/selective_scan/op.py and ultra_kernels/bidirectional_scan/op.py, which share these kernels.
#pragma once

#include "common/isa.h"
#include "common/view.h"

#include <stdint.h>

namespace ultra {

constexpr int64_t kScanSegment = 64;  // steps between two saved states: SEGMENT of selective_scan/op.py
constexpr int64_t kScanBlock = 64;    // channels of one task; dB and dC have one partial sum per block

// B or C as float32 [directions, batch, groups, L, N], N contiguous; strides count elements.
struct ScanRows {
    const float* data;
    int64_t direction, batch, group, time;
};

struct ScanProblem {
    int64_t directions;  // 1, read backwards if `reverse`; or 2: first forwards, then backwards, summed
    int64_t batch, channels, length, states, groups;
    View u, z;
    View delta;
    int64_t delta_direction;                // stride of delta's direction axis
    const float *A, *D, *delta_bias;        // [directions, D, N], [D] or null, [directions, D] or null
    ScanRows B, C;
    const int32_t* borders;                 // [sequences + 1], or null: every batch row is one sequence
    int64_t sequences;
    float* states_saved;                    // [directions, batch, slots, N, D], at least one slot per segment
    int64_t slots;
    bool reverse, softplus, shift;
};

struct ScanGradients {
    View dy, du, dz, ddelta;
    int64_t ddelta_direction;
    const float* dlast;                     // as last_state, or null
    float *dA, *dD, *dbias;                 // [batch, directions, D, N], [batch, D], [batch, directions, D]
    float *dB, *dC;                         // [directions, batch, groups, L, N]
    float *dB_parts, *dC_parts;             // the same, once per channel block of a group
};

// Channel blocks of one group.
inline int64_t scan_blocks(int64_t channels, int64_t groups) {
    return (channels / groups + kScanBlock - 1) / kScanBlock;
}

}  // namespace ultra

ULTRA_FOR_EACH_ISA(
    // Floats of scratch memory per thread.
    int64_t scan_forward_scratch(const ScanProblem& p);
    int64_t scan_backward_scratch(const ScanProblem& p);

    // last: float32 [batch or sequences, D, N], or null.
    void scan_forward(const ScanProblem& p, const View& out, float* last, float* scratch, int threads);
    void scan_backward(const ScanProblem& p, const ScanGradients& g, float* scratch, int threads);
)

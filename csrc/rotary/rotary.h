// Contract: ultra_kernels/rotary/op.py
#pragma once

#include "common/heads.h"
#include "common/isa.h"

#include <stdint.h>

namespace ultra {

// The position of every token: int64 where wide, else int32. Strides count elements.
struct Positions {
    const char* data;
    int64_t batch, time;
    bool wide;
};

// Of ultra_kernels/_rotations.py: the rows of positions from `first` on, `row` numbers apart, with a number for each
// channel; the sine of the first channel of a pair has a minus.
struct Rotations {
    const float *cosine, *sine;
    int64_t first, row;
};

struct RotaryProblem {
    int64_t batch, length, heads, K;
    HeadRows x, y;
    Positions positions;
    Rotations rotations;
    bool back;  // by the negated angles
};

}  // namespace ultra

ULTRA_FOR_EACH_ISA(
    void rotary(const RotaryProblem& p, int threads);
)

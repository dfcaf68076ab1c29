// The functions of simd.h on arrays, for the tests that measure their accuracy on every instruction set.
#pragma once

#include "common/isa.h"

#include <stdint.h>

ULTRA_FOR_EACH_ISA(
    // y[i] = f(x[i]); function: 0 exp, 1 tanh, 2 erf. Anything else leaves y alone.
    void simd_apply(int function, const float* x, float* y, int64_t n);
)

#include "common/simd_test.h"

#include "common/gates.h"
#include "common/simd.h"

namespace ultra {
namespace ULTRA_ISA {

template <typename F> static void apply(const F& f, const float* x, float* y, int64_t n) {
    for (int64_t i = 0; i < n; i += kLanes) {
        if (n - i >= kLanes) store(y + i, f(load(x + i)));
        else store_part(y + i, f(load_part(x + i, (int)(n - i))), (int)(n - i));
    }
}

void simd_apply(int function, const float* x, float* y, int64_t n) {
    if (function == 0) apply([](vf v) { return exp(v); }, x, y, n);
    if (function == 1) apply([](vf v) { return tanh(v); }, x, y, n);
    if (function == 2) apply([](vf v) { return erf(v); }, x, y, n);
    if (function == 3) apply([](vf v) { return exp2(v); }, x, y, n);
}

}  // namespace ULTRA_ISA
}  // namespace ultra

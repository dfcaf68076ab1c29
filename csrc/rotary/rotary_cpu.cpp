// Contract: ultra_kernels/rotary/op.py
//
// One read of x through its strides and one write; a row of the tables serves all heads of its token.
#include "rotary/rotary.h"

#include "common/parallel.h"

namespace ultra {
namespace ULTRA_ISA {

constexpr int64_t kAhead = 4;        // tokens that are asked for before their turn: half the time beyond the cache
constexpr int64_t kBlock = 1 << 16;  // numbers of a block; of smaller blocks more is asked for by the wrong thread

// All heads of one token; back: by the negated angle.
template <bool back, typename T>
static void turn(const RotaryProblem& p, int64_t b, int64_t t, const float* cosine, const float* sine) {
    const int64_t K = p.K, last = K - kLanes, x_head = p.x.head, y_head = p.y.head, ahead = kAhead * p.x.time;
    const T* x = (const T*)p.x.data + b * p.x.batch + t * p.x.time;
    T* y = (T*)p.y.data + b * p.y.batch + t * p.y.time;
    const auto turned = [&](vf own, int64_t at) {
        const vf across = swap_pairs(own) * load(sine + at);
        return back ? own * load(cosine + at) - across : own * load(cosine + at) + across;
    };
    for (int64_t h = p.heads; h > 0; --h, x += x_head, y += y_head) {
        if (last < 0) store_part(y, turned(load_part(x, (int)K), 0), (int)K);
        for (int64_t j = 0; last >= 0 && j < K; j += kLanes) {
            const int64_t at = min_of(j, last);  // the last vector of a row may cover the one before
            __builtin_prefetch(x + at + ahead);
            store(y + at, turned(load(x + at), at));
        }
    }
}

static int64_t place(const Positions& p, int64_t b, int64_t t) {
    const int64_t at = b * p.batch + t * p.time;
    return p.wide ? ((const int64_t*)p.data)[at] : ((const int32_t*)p.data)[at];
}

template <bool back, typename T> static void turn_all(const RotaryProblem& p, int threads) {
    const int64_t tokens = p.batch * p.length, size = max_of(kBlock / (p.heads * p.K), 1);
    parallel_for((tokens + size - 1) / size, threads, [&](int64_t block) {
        for (int64_t n = block * size; n < min_of(tokens, (block + 1) * size); ++n) {
            const int64_t b = n / p.length, t = n % p.length;
            const int64_t row = (place(p.positions, b, t) - p.rotations.first) * p.rotations.row;
            turn<back, T>(p, b, t, p.rotations.cosine + row, p.rotations.sine + row);
        }
    });
}

template <bool back> static void turn_all(const RotaryProblem& p, int threads) {
    if (p.x.dtype == kBFloat16) turn_all<back, BF16>(p, threads);
    else if (p.x.dtype == kFloat16) turn_all<back, FP16>(p, threads);
    else turn_all<back, float>(p, threads);
}

void rotary(const RotaryProblem& p, int threads) { p.back ? turn_all<true>(p, threads) : turn_all<false>(p, threads); }

}  // namespace ULTRA_ISA
}  // namespace ultra

// Work is cut into blocks whose number depends on the problem alone, never on the number of threads: sums over blocks
// are then the same bits on any machine, which exact resume relies on.
#pragma once

#include "common/row_blocks.h"

#include <atomic>
#include <stdint.h>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace ultra {
namespace ULTRA_ISA {

// Within a body of parallel_for: the number of the thread that runs it, for scratch memory.
static inline int thread_index() {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

// Runs body(i) for i in [0, n) on at most `threads` threads. Without OpenMP it runs them in turn.
template <typename Body> static inline void parallel_for(int64_t n, int threads, const Body& body) {
    if (threads > n) threads = (int)n;
#ifdef _OPENMP
    if (threads > 1) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
        for (int64_t i = 0; i < n; ++i) body(i);
        return;
    }
#endif
    for (int64_t i = 0; i < n; ++i) body(i);
}

// body(begin, end, block) for blocks of rows that depend on their number alone.
template <typename Body> static inline void for_row_blocks(int64_t rows, int threads, const Body& body) {
    const int64_t n = row_blocks(rows);
    parallel_for(n, threads, [&](int64_t i) { body(i * rows / n, (i + 1) * rows / n, i); });
}

// parallel_for of tasks that are prepared during the one before: body(i, next, turn), where `next` is what this thread
// runs after i (n or more: nothing) and `turn` counts its tasks.
template <typename Body> static inline void parallel_for_ahead(int64_t n, int threads, const Body& body) {
    std::atomic<int64_t> taken{0};
    const auto run = [&] {
        int64_t turn = 0;
        for (int64_t i = taken++, next; i < n; i = next) {
            next = taken++;
            body(i, next, turn++);
        }
    };
    if (threads > n) threads = (int)n;
#ifdef _OPENMP
    if (threads > 1) {
#pragma omp parallel num_threads(threads)
        run();
        return;
    }
#endif
    run();
}

}  // namespace ULTRA_ISA
}  // namespace ultra

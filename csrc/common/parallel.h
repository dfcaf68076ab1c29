// Work is cut into blocks whose number depends on the problem alone, never on the number of threads: sums over blocks
// are then the same bits on any machine, which exact resume relies on.
#pragma once

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

}  // namespace ULTRA_ISA
}  // namespace ultra

// CUDA C++ under a plain C++ compiler: enough of cuda_runtime.h to run the kernels of csrc/ on a CPU, for tests. Compiled
// with this folder first on the include path (tests/ops/test_cuda.py), with -x c++ -std=c++20.
//
// Blocks run one after another. The threads of a block take turns on one thread of the system: each runs up to the next
// barrier, in order, so that a missing __syncthreads() lets the first ones read what the last have not written. With
// -DEMULATION_THREADS they are threads of the system that meet at real barriers, slower by two orders of magnitude, and
// -fsanitize=thread finds every race. Dynamic shared memory is NaN when a block begins. Compiled with
// -fsanitize=alignment, a vector at an address between two vectors stops the process, as it stops a GPU.
#pragma once

#undef _FORTIFY_SOURCE  // its longjmp takes another thread's stack for a mistake

#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <thread>
#include <vector>

#include <setjmp.h>
#include <ucontext.h>

#define __global__
#define __device__
#define __host__
#define __shared__ static  // one block at a time
#define __launch_bounds__(...)

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 { unsigned x, y, z, w; };

inline dim3 gridDim, blockDim;
inline thread_local dim3 blockIdx, threadIdx;

namespace emulation {
constexpr unsigned kWarp = 32, kMaxThreads = 1024;
constexpr size_t kSharedUnasked = 48 << 10, kSharedMost = 99 << 10;  // of sm_86 and sm_120; sm_80 and sm_90 have more

#ifdef EMULATION_THREADS
using Barrier = std::barrier<>;
inline void wait(Barrier& barrier) { barrier.arrive_and_wait(); }

template <typename Body> void run_block(unsigned threads, const Body& body) {
    std::vector<std::thread> running;
    for (unsigned t = 0; t < threads; ++t) running.emplace_back(body, t);
    for (auto& thread : running) thread.join();
}
#else
constexpr size_t kStack = 256 << 10;

struct Barrier {
    unsigned size, arrived = 0, generation = 0;
    explicit Barrier(unsigned size) : size(size) {}
};

struct Thread {
    ucontext_t start;
    jmp_buf state;
    dim3 block;
    bool started = false, done = false;
    std::unique_ptr<char[]> stack{new char[kStack]};
};

inline std::vector<Thread> running;
inline unsigned current;
inline jmp_buf host;

inline void go_on() {
    Thread& thread = running[current];
    threadIdx = dim3(current), blockIdx = thread.block;
    if (thread.started) _longjmp(thread.state, 1);
    thread.started = true;
    setcontext(&thread.start);
}
inline void next() {
    do current = (current + 1) % running.size();
    while (running[current].done);
    go_on();
}
inline void yield() {
    running[current].block = blockIdx;
    if (_setjmp(running[current].state) == 0) next();
}
inline void wait(Barrier& barrier) {
    const unsigned generation = barrier.generation;
    if (++barrier.arrived == barrier.size) barrier.arrived = 0, ++barrier.generation;
    while (barrier.generation == generation) yield();
}

template <typename Body> void run_block(unsigned threads, const Body& body) {
    static const Body* task;
    static unsigned left;
    task = &body, left = threads;
    running = std::vector<Thread>(threads);
    for (auto& thread : running) {
        getcontext(&thread.start);
        thread.start.uc_stack.ss_sp = thread.stack.get();
        thread.start.uc_stack.ss_size = kStack;
        makecontext(&thread.start, +[] {
            (*task)(current);
            running[current].done = true;
            if (--left == 0) _longjmp(host, 1);
            next();
        }, 0);
    }
    current = 0;
    if (_setjmp(host) == 0) go_on();
    running.clear();
}
#endif

inline Barrier* block = nullptr;  // of the running block, and of each of its warps
inline std::vector<std::unique_ptr<Barrier>> warps;
inline uint64_t lanes[kMaxThreads];
inline std::vector<uint4> shared;
inline std::map<void*, size_t> shared_allowed;

// Every lane of the warp gives an x and sees what all have given.
template <typename T, typename Look> auto exchange(T x, const Look& look) {
    static_assert(sizeof x <= sizeof lanes[0]);
    auto& warp = *warps[threadIdx.x / kWarp];
    memcpy(&lanes[threadIdx.x], &x, sizeof x);
    wait(warp);
    auto result = look([](unsigned lane) {
        T given;
        memcpy(&given, &lanes[threadIdx.x / kWarp * kWarp + lane], sizeof given);
        return given;
    });
    wait(warp);
    return result;
}
}  // namespace emulation

// Tests lower it, so that small shapes walk over the grid as huge ones do.
extern "C" {
__attribute__((visibility("default"))) inline unsigned emulation_max_grid_y = 65535;
}

inline void __syncthreads() { emulation::wait(*emulation::block); }
inline void __syncwarp() { emulation::wait(*emulation::warps[threadIdx.x / emulation::kWarp]); }

template <typename T> T __shfl_sync(unsigned, T x, unsigned lane) {
    return emulation::exchange(x, [lane](const auto& given) { return given(lane % emulation::kWarp); });
}
template <typename T> T __shfl_xor_sync(unsigned, T x, unsigned mask) {
    return __shfl_sync(0xffffffffu, x, threadIdx.x % emulation::kWarp ^ mask);
}
inline unsigned __ballot_sync(unsigned, bool predicate) {
    return emulation::exchange(predicate, [](const auto& given) {
        unsigned mask = 0;
        for (unsigned lane = 0; lane < emulation::kWarp; ++lane) mask |= (unsigned)given(lane) << lane;
        return mask;
    });
}

inline float __fdividef(float a, float b) { return a / b; }
inline int __float2int_rn(float x) { return x != x ? 0 : (int)nearbyintf(x); }
inline int __dp4a(int a, int b, int c) {  // wraps around
    unsigned sum = (unsigned)c;
    for (int shift = 0; shift < 32; shift += 8) sum += (unsigned)((int8_t)(a >> shift) * (int8_t)(b >> shift));
    return (int)sum;
}
inline void __stwb(uint4* p, uint4 x) { *p = x; }

// ---- host ---------------------------------------------------------------------------------------------------------
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9, cudaErrorUnknown = 999 };
enum cudaMemcpyKind { cudaMemcpyDeviceToHost = 2 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
struct CUstream_st;
typedef CUstream_st* cudaStream_t;
struct cudaLaunchConfig_t { dim3 gridDim, blockDim; size_t dynamicSmemBytes; cudaStream_t stream; };

inline cudaError_t cudaMalloc(void** p, size_t n) { return *p = malloc(n), cudaSuccess; }
inline cudaError_t cudaFree(void* p) { return free(p), cudaSuccess; }
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t n, cudaMemcpyKind) {
    return memcpy(to, from, n), cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = 13000, cudaSuccess; }
inline cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 13000, cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t code) {
    return code == cudaErrorInvalidConfiguration ? "invalid configuration argument" : "another error";
}
template <typename Kernel> cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
    if ((size_t)bytes > emulation::kSharedMost) return cudaErrorInvalidValue;
    emulation::shared_allowed[(void*)kernel] = bytes;
    return cudaSuccess;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments... arguments) {
    const unsigned threads = config->blockDim.x;
    const size_t bytes = config->dynamicSmemBytes, asked = emulation::shared_allowed[(void*)kernel];
    gridDim = config->gridDim, blockDim = config->blockDim;
    if (gridDim.x > 0x7fffffffu || gridDim.y > 65535 || gridDim.z > 65535 || threads > emulation::kMaxThreads ||
        !gridDim.x || !gridDim.y || !gridDim.z || !threads || threads % emulation::kWarp)
        return cudaErrorInvalidConfiguration;
    if (bytes > (asked > emulation::kSharedUnasked ? asked : emulation::kSharedUnasked)) return cudaErrorInvalidValue;
    if (gridDim.y > emulation_max_grid_y) gridDim.y = emulation_max_grid_y;
    emulation::Barrier block(threads);
    emulation::block = &block;
    emulation::shared.resize((bytes + sizeof(uint4) - 1) / sizeof(uint4));
    for (unsigned warp = 0; warp < threads / emulation::kWarp; ++warp)
        emulation::warps.push_back(std::make_unique<emulation::Barrier>(emulation::kWarp));
    emulation::run_block(threads, [=](unsigned t) {
        threadIdx = dim3(t, 0, 0);
        for (unsigned z = 0; z < gridDim.z; ++z)
            for (unsigned y = 0; y < gridDim.y; ++y)
                for (unsigned x = 0; x < gridDim.x; ++x) {
                    blockIdx = dim3(x, y, z);
                    if (t == 0 && bytes) memset((void*)emulation::shared.data(), 0xff, bytes);
                    __syncthreads();
                    kernel(arguments...);
                    __syncthreads();  // shared memory is free for the next block
                }
    });
    emulation::warps.clear();
    return cudaSuccess;
}

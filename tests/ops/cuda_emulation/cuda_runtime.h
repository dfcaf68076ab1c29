// CUDA C++ under a plain C++ compiler: enough of cuda_runtime.h to run the kernels of csrc/ on a CPU, for tests. Compiled
// with this folder first on the include path (tests/ops/test_cuda.py), with -x c++ -std=c++20.
//
// Blocks run one after another; the threads of a block are threads of the system that meet at real barriers, so a
// missing __syncthreads() is a real race (-fsanitize=thread finds it). Compiled with -fsanitize=alignment, a vector at an
// address between two vectors stops the process, as it stops a GPU.
#pragma once

#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

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
inline std::barrier<>* block = nullptr;  // of the running block, and of each of its warps
inline std::vector<std::barrier<>*> warps;
inline uint64_t lanes[kMaxThreads];
}  // namespace emulation

// Tests lower it, so that small shapes walk over the grid as huge ones do.
extern "C" {
__attribute__((visibility("default"))) inline unsigned emulation_max_grid_y = 65535;
}

inline void __syncthreads() { emulation::block->arrive_and_wait(); }

template <typename T> T __shfl_xor_sync(unsigned, T x, int mask) {
    static_assert(sizeof x <= sizeof emulation::lanes[0]);
    auto& warp = *emulation::warps[threadIdx.x / emulation::kWarp];
    memcpy(&emulation::lanes[threadIdx.x], &x, sizeof x);
    warp.arrive_and_wait();
    memcpy(&x, &emulation::lanes[threadIdx.x ^ mask], sizeof x);
    warp.arrive_and_wait();
    return x;
}

inline float __fdividef(float a, float b) { return a / b; }
inline void __stwb(uint4* p, uint4 x) { *p = x; }

// ---- host ---------------------------------------------------------------------------------------------------------
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9, cudaErrorUnknown = 999 };
enum cudaMemcpyKind { cudaMemcpyDeviceToHost = 2 };
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

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments... arguments) {
    const unsigned threads = config->blockDim.x;
    gridDim = config->gridDim, blockDim = config->blockDim;
    if (gridDim.x > 0x7fffffffu || gridDim.y > 65535 || gridDim.z > 65535 || threads > emulation::kMaxThreads ||
        !gridDim.x || !gridDim.y || !gridDim.z || !threads || threads % emulation::kWarp)
        return cudaErrorInvalidConfiguration;
    if (gridDim.y > emulation_max_grid_y) gridDim.y = emulation_max_grid_y;
    std::barrier<> block(threads);
    std::vector<std::thread> running;
    emulation::block = &block;
    for (unsigned warp = 0; warp < threads / emulation::kWarp; ++warp)
        emulation::warps.push_back(new std::barrier<>(emulation::kWarp));
    for (unsigned t = 0; t < threads; ++t)
        running.emplace_back([=] {
            threadIdx = dim3(t, 0, 0);
            for (unsigned z = 0; z < gridDim.z; ++z)
                for (unsigned y = 0; y < gridDim.y; ++y)
                    for (unsigned x = 0; x < gridDim.x; ++x) {
                        blockIdx = dim3(x, y, z);
                        kernel(arguments...);
                        __syncthreads();  // shared memory is free for the next block
                    }
        });
    for (auto& thread : running) thread.join();
    for (auto* warp : emulation::warps) delete warp;
    emulation::warps.clear();
    return cudaSuccess;
}

// What the CUDA kernels share: elements in memory, vectors of them, sums over a block, launches.
//
// Sources use what the emulation of tests/ops/cuda_emulation has too (no <<<>>>, no header of CUDA but the three below),
// so that the same code runs under a C++ compiler on a machine without a GPU.
//
// A CUDA source exports extern "C" functions of addresses, int64_t and float, and last a stream, that return kSuccess or
// the code of a CUDA error (common/library_cuda.cu has the words); ultra_kernels/<op>/cuda.py owns every check.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>
#include <string.h>

#define ULTRA_EXPORT extern "C" __attribute__((visibility("default")))

namespace ultra {

enum DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };  // DTYPES of ultra_kernels/_native.py

constexpr int kSuccess = cudaSuccess;
constexpr int kWarp = 32;
constexpr int kMaxGridY = 65535;  // of gridDim.y and gridDim.z; gridDim.x goes to 2^31 - 1

template <typename I> __host__ __device__ constexpr I ceil_div(I a, I b) { return (a + b - 1) / b; }

// ---- vectors ------------------------------------------------------------------------------------------------------
constexpr int kVectorBytes = 16;  // the widest load that sm_80 and sm_90 have

// N elements that lie side by side in memory.
template <typename T, int N> struct Vector { T v[N]; };

// Addresses are aligned to kVectorBytes, or N is 1.
template <int N, typename T> __device__ inline Vector<T, N> load(const T* p) {
    Vector<T, N> x;
    if constexpr (N == 1) x.v[0] = *p;
    else {
        static_assert(sizeof x % kVectorBytes == 0);
        uint4 raw[sizeof x / kVectorBytes];
#pragma unroll
        for (unsigned i = 0; i < sizeof x / kVectorBytes; ++i) raw[i] = reinterpret_cast<const uint4*>(p)[i];
        memcpy(&x, raw, sizeof x);
    }
    return x;
}
template <typename T, int N> __device__ inline void store(T* p, const Vector<T, N>& x) {
    if constexpr (N == 1) *p = x.v[0];
    else {
        static_assert(sizeof x % kVectorBytes == 0);
        uint4 raw[sizeof x / kVectorBytes];
        memcpy(raw, &x, sizeof x);
#pragma unroll
        for (unsigned i = 0; i < sizeof x / kVectorBytes; ++i)
            __stwb(reinterpret_cast<uint4*>(p) + i, raw[i]);  // nvcc 13 cuts an assignment into four stores
    }
}

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }

template <typename T, int N> __device__ inline Vector<float, N> widen(const Vector<T, N>& x) {
    Vector<float, N> out;
#pragma unroll
    for (int i = 0; i < N; ++i) out.v[i] = to_float(x.v[i]);
    return out;
}

// Two at a time: one instruction rounds and packs a pair.
__device__ inline void narrow(float x, float* out) { *out = x; }
__device__ inline void narrow(float x, __nv_bfloat16* out) { *out = __float2bfloat16_rn(x); }
__device__ inline void narrow(float x, __half* out) { *out = __float2half_rn(x); }
__device__ inline void narrow(float x, float y, float* out) { out[0] = x, out[1] = y; }
__device__ inline void narrow(float x, float y, __nv_bfloat16* out) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);
    memcpy(out, &pair, sizeof pair);
}
__device__ inline void narrow(float x, float y, __half* out) {
    const __half2 pair = __floats2half2_rn(x, y);
    memcpy(out, &pair, sizeof pair);
}
template <typename T, int N> __device__ inline Vector<T, N> narrow(const Vector<float, N>& x) {
    Vector<T, N> out;
    if constexpr (N == 1) narrow(x.v[0], out.v);
    else {
#pragma unroll
        for (int i = 0; i < N; i += 2) narrow(x.v[i], x.v[i + 1], out.v + i);
    }
    return out;
}

// Whether whole vectors can be read at every address given (null counts as aligned) and at every row of D elements.
template <typename T, typename... Addresses> bool vectors_fit(int64_t D, Addresses... addresses) {
    bool aligned = ((reinterpret_cast<uintptr_t>(addresses) % kVectorBytes == 0) && ...);
    return aligned && D % (kVectorBytes / (int64_t)sizeof(T)) == 0;
}

// ---- arithmetic ---------------------------------------------------------------------------------------------------
// 2^x in one instruction, 2 ulp; 0 below 2^-126. exp2f adds three to reach the numbers below that.
__device__ inline float fast_exp2(float x) {
#ifdef __CUDA_ARCH__
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return exp2f(x);
#endif
}

// a < b ? yes : no, without a branch. nvcc makes one of `?:` to save work, which costs more: lanes mostly disagree.
__device__ inline float select_less(float a, float b, float yes, float no) {
#ifdef __CUDA_ARCH__
    float y;
    asm("{ .reg .pred p; setp.lt.f32 p, %1, %2; selp.f32 %0, %3, %4, p; }"
        : "=f"(y) : "f"(a), "f"(b), "f"(yes), "f"(no));
    return y;
#else
    return a < b ? yes : no;
#endif
}

// x, of which the compiler knows nothing: what is made of it stays where it is written. Hoisted out of a loop, addresses
// that a kernel needs once per turn would fill its registers.
__device__ inline int opaque(int x) {
#ifdef __CUDA_ARCH__
    asm volatile("" : "+r"(x));
#endif
    return x;
}
__device__ inline int64_t opaque(int64_t x) {
#ifdef __CUDA_ARCH__
    asm volatile("" : "+l"(x));
#endif
    return x;
}

// ---- sums in a fixed order: the same bits on every run -------------------------------------------------------------
__device__ inline float warp_sum(float x) {  // every lane gets it
#pragma unroll
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) x += __shfl_xor_sync(0xffffffffu, x, lanes);
    return x;
}

// The sum over a block of `Warps` warps; thread 0 gets it. All threads call it; `shared` has `Warps` floats and may be
// used again after the next __syncthreads().
template <int Warps> __device__ inline float block_sum(float x, float* shared) {
    x = warp_sum(x);
    if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = x;
    __syncthreads();
    float total = 0.0f;
    if (threadIdx.x == 0) {
#pragma unroll
        for (int warp = 0; warp < Warps; ++warp) total += shared[warp];
    }
    return total;
}

// ---- launches -----------------------------------------------------------------------------------------------------
// The shared memory that a launch asked for, aligned to kVectorBytes.
__device__ inline float* dynamic_shared() {
#ifdef __CUDACC__
    extern __shared__ uint4 dynamic_shared_words[];
    return reinterpret_cast<float*>(dynamic_shared_words);
#else
    return reinterpret_cast<float*>(emulation::shared.data());
#endif
}

// Queues a kernel on `stream`, with `shared_bytes` of dynamic shared memory, and returns kSuccess or the error's code,
// which it clears. Up to 99 KiB of it fit every GPU that the library serves.
template <typename... Parameters, typename... Arguments>
int launch_shared(void (*kernel)(Parameters...), dim3 grid, int threads, int64_t shared_bytes, void* stream,
                  Arguments... arguments) {
    constexpr int64_t kUnasked = 48 << 10;  // more has to be asked for
    int code = kSuccess;
    if (shared_bytes > kUnasked)
        code = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared_bytes);
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    if (code == kSuccess) code = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
    if (code != kSuccess) cudaGetLastError();
    return code;
}
template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, int threads, void* stream, Arguments... arguments) {
    return launch_shared(kernel, grid, threads, 0, stream, arguments...);
}

}  // namespace ultra

// What ultra_kernels/libultra_cuda.so says of itself, and the kernel that proves that a GPU can run it (ultra_kernels/_cuda.py).
#include "common/cuda.cuh"

namespace {

constexpr int kAbi = 4;  // raised with every change of an exported signature; _cuda.py refuses another number

__global__ void probe_kernel(int* out, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i] = 3 * i + 1;
}

}  // namespace

ULTRA_EXPORT int ultra_cuda_abi() { return kAbi; }
ULTRA_EXPORT const char* ultra_cuda_version() { return ULTRA_VERSION; }
ULTRA_EXPORT const char* ultra_cuda_archs() { return ULTRA_ARCHS; }  // "sm_80 compute_90": machine code and PTX
ULTRA_EXPORT const char* ultra_cuda_error(int code) { return cudaGetErrorString((cudaError_t)code); }

// Versions as 1000 * major + 10 * minor: what the driver supports (0 without a driver), and what is linked in here.
ULTRA_EXPORT int ultra_cuda_driver() {
    int version = 0;
    return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}
ULTRA_EXPORT int ultra_cuda_runtime() {
    int version = 0;
    return cudaRuntimeGetVersion(&version) == cudaSuccess ? version : 0;
}

// kSuccess when the current GPU runs a kernel of this library and its numbers come back.
ULTRA_EXPORT int ultra_cuda_probe() {
    constexpr int n = 100;
    int *out = nullptr, numbers[n] = {};
    int code = cudaMalloc((void**)&out, sizeof numbers);
    if (code == ultra::kSuccess) code = ultra::launch(probe_kernel, dim3(2), 64, nullptr, out, n);
    if (code == ultra::kSuccess) code = cudaMemcpy(numbers, out, sizeof numbers, cudaMemcpyDeviceToHost);
    cudaFree(out);
    cudaGetLastError();
    for (int i = 0; code == ultra::kSuccess && i < n; ++i)
        if (numbers[i] != 3 * i + 1) code = cudaErrorUnknown;
    return code;
}

// float16 as cuda_fp16.h names it; see cuda_runtime.h.
#pragma once

struct __half { _Float16 value; };
struct __half2 { __half x, y; };

inline float __half2float(__half x) { return x.value; }
inline __half __float2half_rn(float x) { return {(_Float16)x}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }

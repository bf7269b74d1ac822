// One word of a row of logits: its types, a target as its index, and the transforms from a raw word x to the logit z.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "ptx.cuh"

namespace dpo_fast::cuda {

constexpr float kLog2e = 1.44269504088896340736f;

template <class T>
constexpr int kVector = 16 / sizeof(T);

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (sizeof(T) == 4) {
    return x;
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else {
    return __float2bfloat16_rn(x);
  }
}

// 16 bytes of words.
template <class T>
struct alignas(16) Vector {
  T words[kVector<T>];
};

// A target as an index into its row, and a term for its log-prob: 0, or NaN for a target outside [0, V).
struct Target {
  int64_t index;
  float fault;
};

__device__ __forceinline__ Target checked(int64_t target, int V) {
  return target >= 0 && target < V ? Target{target, 0.0f} : Target{0, __int_as_float(0x7fffffff)};
}

// The transforms: z of a word x, and d z / d x = factor() * slope.

struct Plain {
  __device__ __forceinline__ float z(float x) const { return x; }
  __device__ __forceinline__ float z(float x, float& slope) const {
    slope = 1;
    return x;
  }
  __device__ __forceinline__ float factor() const { return 1; }
};

// Products by __fmul_rn are not fused with a later subtraction, so a z is the same number wherever it is computed.
struct Scaled {
  float a;
  __device__ __forceinline__ float z(float x) const { return __fmul_rn(x, a); }
  __device__ __forceinline__ float z(float x, float& slope) const {
    slope = 1;
    return z(x);
  }
  __device__ __forceinline__ float factor() const { return a; }
};

// cap * tanh(a * x). With u = 1 / (exp(2 a x) + 1), tanh = 1 - 2 u and 1 - tanh^2 = 4 u (1 - u), exact at both infinities.
struct Capped {
  float a, cap;
  __device__ __forceinline__ float z(float x) const {
    float slope;
    return z(x, slope);
  }
  __device__ __forceinline__ float z(float x, float& slope) const {
    const float u = reciprocal(exp2_fast(x * (2 * kLog2e * a)) + 1);
    slope = 4 * u * (1 - u);
    return __fmul_rn(cap, 1 - 2 * u);
  }
  __device__ __forceinline__ float factor() const { return a * cap; }
};

}  // namespace dpo_fast::cuda

// Instructions for which CUDA C++ has no exact expression.
#pragma once

namespace dpo_fast::cuda {

// 2^x to 2 units in the last place; below 2^-126 it is 0.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x to 1 unit in the last place; 0 for an infinite x.
__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Communication between blocks. The additions return the counter's value before them.

__device__ __forceinline__ int add_relaxed(int* counter, int x) {
  int before;
  asm volatile("atom.add.relaxed.gpu.global.s32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(x) : "memory");
  return before;
}

__device__ __forceinline__ int add_acq_rel(int* counter, int x) {
  int before;
  asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(x) : "memory");
  return before;
}

__device__ __forceinline__ int load_acquire(const int* counter) {
  int now;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(now) : "l"(counter) : "memory");
  return now;
}

// Loads a number that another block wrote, past L1, which may hold an older value.
__device__ __forceinline__ float load_shared_number(const float* p) {
  float x;
  asm volatile("ld.relaxed.gpu.global.f32 %0, [%1];" : "=f"(x) : "l"(p) : "memory");
  return x;
}

__device__ __forceinline__ void wait_a_little() { __nanosleep(64); }

}  // namespace dpo_fast::cuda

// CUDA C++ on a CPU, as far as csrc/cuda uses it, so that its kernels run where there is no GPU.
//
// A block runs on one thread of the CPU, and each of its CUDA threads on a stack of its own (a fiber). A fiber runs until a
// barrier or a shuffle, where the others get their turn, in an order that changes from turn to turn: a missing barrier lets
// a thread read too early or too late. Several blocks run at a time, and what they tell each other goes through the
// atomics of C++. What this cannot show is speed, and how a GPU rounds exp2, log and the reciprocal.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#undef __shared__
#undef __launch_bounds__
#undef __grid_constant__
#undef __global__
#define __shared__ static thread_local
#define __launch_bounds__(...)
#define __grid_constant__
#define __global__

namespace emulated {

struct Index {
  unsigned x;
};

extern thread_local Index thread, block, threads, blocks;

// Waits for all threads of the block that have not returned.
void barrier();
// Waits for the 32 threads of the warp; returns the bits that the thread `lane ^ other` brought.
uint64_t exchange(uint64_t bits, int other);
// Whether the environment asks for this fault (EMULATOR_FAULT), with which a test shows that a race would be seen.
bool has_fault(const char* name);
// Runs `thread_of_kernel` for each thread of each block; returns when all have ended.
void launch(int64_t grid, int threads_per_block, const std::function<void()>& thread_of_kernel);

template <class T>
T shuffle_xor(T x, int other) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &x, sizeof(T));
  bits = exchange(bits, other);
  std::memcpy(&x, &bits, sizeof(T));
  return x;
}

}  // namespace emulated

namespace dpo_fast::cuda {
using std::isnan;
using std::max;
using std::min;
}  // namespace dpo_fast::cuda

#define threadIdx emulated::thread
#define blockIdx emulated::block
#define blockDim emulated::threads
#define gridDim emulated::blocks
#define __syncthreads emulated::barrier
#define __shfl_xor_sync(mask, x, other) emulated::shuffle_xor(x, other)
#define __int_as_float(bits) __builtin_bit_cast(float, int(bits))
#define __fmul_rn(a, b) ((a) * (b))

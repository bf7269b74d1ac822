// What csrc/cuda/ptx.cuh has in PTX, in C++: the same memory orders, and exp2 and the reciprocal with their roundings to 0.
#pragma once

#include <cfloat>
#include <thread>

#include "emulator.h"

namespace dpo_fast::cuda {

inline float exp2_fast(float x) {
  const float y = std::exp2(x);
  return y < FLT_MIN ? 0.0f : y;  // a NaN stays one
}

inline float reciprocal(float x) { return 1 / x; }

inline int add_relaxed(int* counter, int x) { return __atomic_fetch_add(counter, x, __ATOMIC_RELAXED); }
inline int add_acq_rel(int* counter, int x) {
  static const bool orders = !emulated::has_fault("counters order nothing");
  return __atomic_fetch_add(counter, x, orders ? __ATOMIC_ACQ_REL : __ATOMIC_RELAXED);
}
inline int load_acquire(const int* counter) { return __atomic_load_n(counter, __ATOMIC_ACQUIRE); }
// It is an ordinary load here, so that a tool that knows C++'s memory orders sees whether it is ordered after the store.
inline float load_shared_number(const float* p) { return *p; }
inline void wait_a_little() { std::this_thread::yield(); }

}  // namespace dpo_fast::cuda

// The functions that the kernels share: one block works on one row of logits, x [V], wherever it lies in memory.
//
//   word       z = transform(x) (words.cuh)
//   thread     top = max z, total = sum exp(z - top); for the statistics sum exp(z - top) (z - top),
//              sum exp(2 (z - top)), sum z; all are in registers and updated once per kUpdate words
//   row        top and log_total = log sum exp(z - top), kept apart: `z - top - log_total` keeps digits that
//              `z - (top + log_total)` rounds away when the logits are far from zero
//   gradient   coef * (onehot - exp(z - top - log_total)) * dz/dx
//
// A row is read in vectors of 16 bytes, with kLoads of them in flight per thread: three blocks of 256 threads have 48 KB
// in flight per SM (counted, not measured). An odd V puts rows at odd addresses. Each of the few words before the first
// and after the last whole vector (the edges) then goes to one thread. Where x and out are not aligned alike, both are
// accessed word by word, neighbouring words by neighbouring threads.
//
// No block keeps a row between its two reads. In dpo_fused the gradient waits for all rows of the pair, and a row of
// 128256 words in bfloat16 has 250 KB, more than the 227 KB of shared memory of an SM.
#pragma once

#include <cfloat>
#include <cstdint>

#include "kernels.h"
#include "words.cuh"

namespace dpo_fast::cuda {

constexpr int kLoads = 4;
constexpr int kUpdate = 16;

// ---- Blocks ----

struct Max {
  template <class T>
  __device__ __forceinline__ T operator()(T x, T y) const {
    return x > y ? x : y;
  }
};

struct Sum {
  template <class T>
  __device__ __forceinline__ T operator()(T x, T y) const {
    return x + y;
  }
};

// Joins the threads' x in a fixed order and returns the result to every thread. All threads must call it, in whole warps.
template <class T, class Join>
__device__ __forceinline__ T block_join(T x, Join join) {
  __shared__ T warps[32];
#pragma unroll
  for (int other = 16; other > 0; other /= 2) x = join(x, __shfl_xor_sync(0xffffffffu, x, other));
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
  __syncthreads();
  x = warps[0];
  for (int warp = 1; warp < int(blockDim.x) / 32; warp++) x = join(x, warps[warp]);
  __syncthreads();
  return x;
}

// Returns to every thread what thread 0 finds.
template <class Find>
__device__ __forceinline__ int from_first(Find find) {
  __shared__ int found;
  if (threadIdx.x == 0) found = find();
  __syncthreads();
  const int x = found;
  __syncthreads();
  return x;
}

// ---- Where the words of a row are ----

struct Span {
  int head, body, tail;  // words before the first whole vector, in whole vectors, after the last
};

template <class T>
__device__ __forceinline__ Span span(const T* row, int V) {
  const int past = int((reinterpret_cast<uintptr_t>(row) & 15) / sizeof(T));
  const int head = min((kVector<T> - past) % kVector<T>, V);
  const int body = (V - head) / kVector<T> * kVector<T>;
  return {head, body, V - head - body};
}

// Calls use(words, i) for the vectors i < n of this thread: kLoads of them are loaded, then used kGroup at a time (i is
// the first of a group, whose vectors are blockDim.x apart); the last ones are used one by one.
template <int kGroup, class T, class Use>
__device__ __forceinline__ void each_vector(const Vector<T>* vectors, int n, Use use) {
  static_assert(kLoads % kGroup == 0);
  const int threads = blockDim.x;
  int i = threadIdx.x;
  for (; i + (kLoads - 1) * threads < n; i += kLoads * threads) {
    uint4 raw[kLoads];
#pragma unroll
    for (int k = 0; k < kLoads; k++) raw[k] = reinterpret_cast<const uint4*>(vectors)[i + k * threads];
#pragma unroll
    for (int k = 0; k < kLoads; k += kGroup) {
      Vector<T> group[kGroup];
#pragma unroll
      for (int j = 0; j < kGroup; j++) group[j] = __builtin_bit_cast(Vector<T>, raw[k + j]);
      use(group, i + k * threads);
    }
  }
  uint4 raw[kLoads - 1];
#pragma unroll
  for (int k = 0; k < kLoads - 1; k++) {
    if (i + k * threads < n) raw[k] = reinterpret_cast<const uint4*>(vectors)[i + k * threads];
  }
#pragma unroll
  for (int k = 0; k < kLoads - 1; k++) {
    if (i + k * threads < n) {
      const Vector<T> one[1] = {__builtin_bit_cast(Vector<T>, raw[k])};
      use(one, i + k * threads);
    }
  }
}

// ---- One read: log-sum-exp and statistics ----

template <bool kStatistics>
struct Running {
  // The top is finite, so that -inf - top is not NaN.
  float top = -FLT_MAX, total = 0;
  // These are sums of exp(z - top) (z - top), exp(2 (z - top)) and z; they are unused without statistics.
  float moment = 0, squares = 0, plain = 0;

  // Turns the sums for the old top into those for a new one. exp(-inf) is 0, and its products must be 0 too.
  __device__ __forceinline__ void lift(float new_top) {
    const float down = top - new_top, alpha = exp2_fast(down * kLog2e);
    if (kStatistics) {
      moment = alpha > 0 ? alpha * (moment + total * down) : 0.0f;
      squares *= alpha * alpha;
    }
    total *= alpha;
    top = new_top;
  }

  template <int kCount>
  __device__ __forceinline__ void add(const float (&z)[kCount]) {
    float new_top = top;
    // fmaxf skips NaN; the sums below do not.
#pragma unroll
    for (int k = 0; k < kCount; k++) new_top = fmaxf(new_top, z[k]);
    lift(new_top);
    float sum = 0;
#pragma unroll
    for (int k = 0; k < kCount; k++) {
      const float shifted = z[k] - top, e = exp2_fast(shifted * kLog2e);
      sum += e;
      if (kStatistics) {
        moment += e > 0 ? e * shifted : 0.0f;
        squares += e * e;
        plain += z[k];
      }
    }
    total += sum;
  }
};

// The results of a row, the same in every thread.
struct Row {
  float top, log_total;
  float entropy, plain, log_squares;  // only with statistics
};

template <bool kStatistics, class T, class Z>
__device__ __forceinline__ Row reduce_row(const T* row, int V, Z transform) {
  constexpr int kGroup = kUpdate / kVector<T>;
  const Span s = span(row, V);
  Running<kStatistics> running;
  each_vector<kGroup>(reinterpret_cast<const Vector<T>*>(row + s.head), s.body / kVector<T>,
                      [&](const auto& group, int) {
                        float z[sizeof(group) / sizeof(T)];
#pragma unroll
                        for (int k = 0; k < int(sizeof(group) / sizeof(T)); k++) {
                          z[k] = transform.z(to_float(group[k / kVector<T>].words[k % kVector<T>]));
                        }
                        running.add(z);
                      });
  const int edge = threadIdx.x;
  if (edge < s.head + s.tail) {
    const float z[1] = {transform.z(to_float(row[edge < s.head ? edge : edge + s.body]))};
    running.add(z);
  }
  running.lift(block_join(running.top, Max()));
  const float total = block_join(running.total, Sum()), log_total = logf(total);
  Row found{running.top, log_total, 0, 0, 0};
  if (kStatistics) {
    found.entropy = log_total - block_join(running.moment, Sum()) / total;
    found.plain = block_join(running.plain, Sum());
    found.log_squares = logf(block_join(running.squares, Sum())) - 2 * log_total;
  }
  return found;
}

// ---- One write ----

// out[v] = f(in[v]) for v < V; out may be in.
template <class T, class F>
__device__ __forceinline__ void map_row(const T* in, T* out, int V, F f) {
  const int threads = blockDim.x;
  if (((reinterpret_cast<uintptr_t>(in) ^ reinterpret_cast<uintptr_t>(out)) & 15) != 0) {
    constexpr int kWords = 8;
    for (int i = threadIdx.x; i < V; i += kWords * threads) {
      T words[kWords];
#pragma unroll
      for (int k = 0; k < kWords; k++) {
        if (i + k * threads < V) words[k] = in[i + k * threads];
      }
#pragma unroll
      for (int k = 0; k < kWords; k++) {
        if (i + k * threads < V) out[i + k * threads] = from_float<T>(f(to_float(words[k])));
      }
    }
    return;
  }
  const Span s = span(in, V);
  each_vector<1>(reinterpret_cast<const Vector<T>*>(in + s.head), s.body / kVector<T>,
                 [&](const Vector<T>(&group)[1], int i) {
                   Vector<T> mapped;
#pragma unroll
                   for (int k = 0; k < kVector<T>; k++) mapped.words[k] = from_float<T>(f(to_float(group[0].words[k])));
                   reinterpret_cast<uint4*>(out + s.head)[i] = __builtin_bit_cast(uint4, mapped);
                 });
  const int edge = threadIdx.x;
  if (edge < s.head + s.tail) {
    const int v = edge < s.head ? edge : edge + s.body;
    out[v] = from_float<T>(f(to_float(in[v])));
  }
}

// out = coef * d log p[target] / d row. `out` may be the row.
template <class T, class Z>
__device__ __forceinline__ void write_gradient(const T* row, T* out, int V, int64_t target, float coef, float top,
                                               float log_total, Z transform) {
  coef *= transform.factor();
  float at_target = 0;
  if (threadIdx.x == 0) {
    float slope;
    const float z = transform.z(to_float(row[target]), slope);
    // expm1 keeps all digits of 1 - p where p is near 1.
    at_target = coef * slope * -expm1f((z - top) - log_total);
  }
  // In place, no thread may write before thread 0 has read.
  __syncthreads();
  const float log2_total = log_total * kLog2e;
  map_row(row, out, V, [=](float x) {
    float slope;
    const float z = transform.z(x, slope);
    return -coef * slope * exp2_fast((z - top) * kLog2e - log2_total);
  });
  // Another thread wrote the target's word above, so it is overwritten here: one barrier per row costs less than one
  // comparison per word.
  __syncthreads();
  if (threadIdx.x == 0) out[target] = from_float<T>(at_target);
}

template <class T>
__device__ __forceinline__ void write_zeros(T* out, int V) {
  const Span s = span(out, V);
  for (int i = threadIdx.x; i < s.body / kVector<T>; i += blockDim.x) {
    reinterpret_cast<uint4*>(out + s.head)[i] = uint4{0, 0, 0, 0};
  }
  const int edge = threadIdx.x;
  if (edge < s.head + s.tail) out[edge < s.head ? edge : edge + s.body] = from_float<T>(0);
}

// ---- Launches ----

// The threads of a block: at most `most`, and fewer where some would have nothing to load.
template <class T>
int threads_for(int V, int most) {
  int threads = most;
  while (threads > 32 && kLoads * kVector<T> * threads > V) threads /= 2;
  return threads;
}

// Calls launch(T()) with the type T of the words.
template <class Launch>
cudaError_t with_type(Dtype dtype, Launch launch) {
  switch (dtype) {
    case Dtype::f32: launch(float()); break;
    case Dtype::f16: launch(__half()); break;
    case Dtype::bf16: launch(__nv_bfloat16()); break;
  }
  return cudaGetLastError();
}

}  // namespace dpo_fast::cuda

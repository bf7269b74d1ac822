// Log-probs of targets from logits [N, V], their gradient, and both in one launch for a head's tile of logits.
//
//   logps_fwd   logp = z[target] - logsumexp(z)                         1 read of the scored rows
//   logps_bwd   out = coef * (onehot - softmax(z)) * dz/dx              1 read, 1 write
//   residual_   logp, and the row becomes (onehot - softmax) * dz/dx    1 read from memory, 1 from L2, 1 write
//   scale_      a gradient times the one number that backward() gets    nothing where it is 1, else 1 read, 1 write
//
// One block works on one row (rows.cuh). Rows whose target is ignored, or whose coefficient is 0, are not read.

#include <algorithm>

#include "rows.cuh"

namespace dpo_fast::cuda {
namespace {

constexpr int kThreads = 256;
// A tile of logits may have no more rows than a GPU has SMs; twice the warps per row then keep as many loads in flight.
// There are two blocks per SM, or one of twice the threads. The latter has half as many rows between their two reads, so
// that more of the second reads can come from L2. Neither has been measured.
constexpr int kResidualThreads = 512;

// Stores the results of a row, by thread 0; `picked` is z[target].
template <bool kStatistics>
__device__ __forceinline__ void store_row(int64_t n, const Logits& x, bool scored, float picked, const Row& row,
                                          float temperature, float* logps, float* statistics) {
  logps[n] = (picked - row.top) - row.log_total;
  if (kStatistics) {
    statistics[n] = row.entropy;
    statistics[x.N + n] = row.plain * temperature / x.V;
    statistics[2 * x.N + n] = scored && picked >= row.top && !isnan(row.log_total);
    statistics[3 * x.N + n] = row.log_squares;
  }
}

template <class T, class Z, bool kStatistics>
__global__ void __launch_bounds__(kThreads, 3)
    logps_fwd_kernel(Logits x, Targets targets, Z transform, float temperature, float* logps, float* lse,
                     float* statistics) {
  const int64_t n = blockIdx.x, target = targets.data[n];
  // An ignored row stores 0 everywhere.
  float picked = 0;
  Row found{0, 0, 0, 0, 0};
  const bool scored = target != targets.ignore_index;
  if (scored) {
    const T* row = static_cast<const T*>(x.data) + n * x.stride;
    const Target word = checked(target, x.V);
    picked = transform.z(to_float(row[word.index])) + word.fault;
    found = reduce_row<kStatistics>(row, x.V, transform);
  }
  if (threadIdx.x != 0) return;
  lse[n] = found.top + found.log_total;
  store_row<kStatistics>(n, x, scored, picked, found, temperature, logps, statistics);
}

template <class T, class Z>
__global__ void __launch_bounds__(kThreads, 3)
    logps_bwd_kernel(Logits x, Targets targets, Z transform, const float* lse, const float* coef, T* out,
                     int64_t stride_out) {
  const int64_t n = blockIdx.x, target = targets.data[n];
  const float c = coef[n];
  if (target != targets.ignore_index && c != 0) {
    const T* row = static_cast<const T*>(x.data) + n * x.stride;
    const Target word = checked(target, x.V);
    write_gradient(row, out + n * stride_out, x.V, word.index, c + word.fault, lse[n], 0, transform);
  } else {
    write_zeros(out + n * stride_out, x.V);
  }
}

template <class T, class Z, bool kStatistics, int kBlocks>
__global__ void __launch_bounds__(2 * kResidualThreads / kBlocks, kBlocks)
    residual_kernel(Logits x, Targets targets, Z transform, float temperature, float* logps, float* statistics) {
  const int64_t n = blockIdx.x, target = targets.data[n];
  T* row = static_cast<T*>(x.data) + n * x.stride;
  if (target == targets.ignore_index) {
    if (threadIdx.x == 0) store_row<kStatistics>(n, x, false, 0, Row{0, 0, 0, 0, 0}, temperature, logps, statistics);
    write_zeros(row, x.V);
    return;
  }
  const Target word = checked(target, x.V);
  const float picked = transform.z(to_float(row[word.index])) + word.fault;
  const Row found = reduce_row<kStatistics>(row, x.V, transform);
  if (threadIdx.x == 0) store_row<kStatistics>(n, x, true, picked, found, temperature, logps, statistics);
  write_gradient(row, row, x.V, word.index, 1 + word.fault, found.top, found.log_total, transform);
}

// The words that a block takes at a time.
constexpr int kPiece = 8192;

template <class T>
__global__ void __launch_bounds__(kThreads, 3)
    scale_kernel(T* x, int64_t parts, int64_t stride, int64_t length, const float* factor) {
  const float c = *factor;
  if (c == 1) return;
  const int64_t pieces = (length - 1) / kPiece + 1;
  for (int64_t i = blockIdx.x; i < parts * pieces; i += gridDim.x) {
    const int64_t begin = i % pieces * kPiece;
    T* words = x + i / pieces * stride + begin;
    map_row(words, words, int(min(int64_t(kPiece), length - begin)), [=](float word) { return word * c; });
  }
}

// Calls launch(z) with the functor z of the transform.
template <class Launch>
void with_transform(const Transform& t, Launch launch) {
  if (t.softcap != 0) {
    launch(Capped{float(t.scale / t.softcap), float(t.softcap / t.temperature)});
  } else {
    launch(Scaled{float(t.scale / t.temperature)});
  }
}

}  // namespace

cudaError_t logps_fwd(const Logits& x, const Targets& targets, const Transform& transform, float* logps, float* lse,
                      float* statistics, cudaStream_t stream) {
  if (x.N == 0) return cudaSuccess;
  return with_type(x.dtype, [&](auto word) {
    using T = decltype(word);
    with_transform(transform, [&](auto z) {
      using Z = decltype(z);
      const auto kernel = statistics ? logps_fwd_kernel<T, Z, true> : logps_fwd_kernel<T, Z, false>;
      const int threads = threads_for<T>(x.V, kThreads);
      kernel<<<x.N, threads, 0, stream>>>(x, targets, z, transform.temperature, logps, lse, statistics);
    });
  });
}

cudaError_t logps_bwd(const Logits& x, const Targets& targets, const float* lse, const float* coef,
                      const Transform& transform, void* out, int64_t stride_out, cudaStream_t stream) {
  if (x.N == 0) return cudaSuccess;
  return with_type(x.dtype, [&](auto word) {
    using T = decltype(word);
    with_transform(transform, [&](auto z) {
      const int threads = threads_for<T>(x.V, kThreads);
      logps_bwd_kernel<T><<<x.N, threads, 0, stream>>>(x, targets, z, lse, coef, static_cast<T*>(out), stride_out);
    });
  });
}

cudaError_t residual_(const Logits& x, const Targets& targets, const Transform& transform, float* logps,
                      float* statistics, int blocks_per_sm, cudaStream_t stream) {
  if (x.N == 0) return cudaSuccess;
  return with_type(x.dtype, [&](auto word) {
    using T = decltype(word);
    with_transform(transform, [&](auto z) {
      using Z = decltype(z);
      const bool two = blocks_per_sm == 2;
      const auto kernel = statistics ? two ? residual_kernel<T, Z, true, 2> : residual_kernel<T, Z, true, 1>
                          : two      ? residual_kernel<T, Z, false, 2>
                                     : residual_kernel<T, Z, false, 1>;
      const int threads = threads_for<T>(x.V, 2 * kResidualThreads / blocks_per_sm);
      kernel<<<x.N, threads, 0, stream>>>(x, targets, z, transform.temperature, logps, statistics);
    });
  });
}

cudaError_t scale_(void* x, Dtype dtype, int64_t parts, int64_t stride, int64_t length, const float* factor,
                   cudaStream_t stream) {
  if (parts == 0 || length == 0) return cudaSuccess;
  // These are enough blocks for 64 KB in flight per SM on the largest GPUs, and few to start where the factor is 1.
  const int blocks = std::min<int64_t>(1024, parts * ((length - 1) / kPiece + 1));
  return with_type(dtype, [&](auto word) {
    using T = decltype(word);
    scale_kernel<T><<<blocks, kThreads, 0, stream>>>(static_cast<T*>(x), parts, stride, length, factor);
  });
}

}  // namespace dpo_fast::cuda

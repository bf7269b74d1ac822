// The CUDA kernels as plain functions: raw pointers, sizes and a stream, no torch. Semantics: dpo_fast/backends/eager.py.
//
// Each enqueues its work and returns cudaGetLastError(). Strides are in words. Without rows nothing is launched.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../losses.h"

namespace dpo_fast::cuda {

enum class Dtype { f32, f16, bf16 };

// [N, V], entries of a row next to each other; V < 2^31.
struct Logits {
  void* data;
  int64_t stride;
  int64_t N;
  int V;
  Dtype dtype;
};

// [N], in [0, V) or ignore_index; another target reads nothing outside its row and makes the row NaN.
struct Targets {
  const int64_t* data;
  int64_t ignore_index;
};

// z = softcap * tanh(scale * x / softcap) / temperature; a softcap of 0 is none.
struct Transform {
  double scale, softcap, temperature;
};

// statistics: [4, N] in the order of eager.OUTPUTS, or null.
cudaError_t logps_fwd(const Logits& x, const Targets& targets, const Transform& transform, float* logps, float* lse,
                      float* statistics, cudaStream_t stream);

// out: [N, V] in the type of x; may be x.
cudaError_t logps_bwd(const Logits& x, const Targets& targets, const float* lse, const float* coef,
                      const Transform& transform, void* out, int64_t stride_out, cudaStream_t stream);

// blocks_per_sm: 2, or 1, which has half as many rows between their two reads at a time.
cudaError_t residual_(const Logits& x, const Targets& targets, const Transform& transform, float* logps,
                      float* statistics, int blocks_per_sm, cudaStream_t stream);

// `parts` pieces of memory, each of `length` words, are multiplied by *factor; nothing is read where it is 1.
cudaError_t scale_(void* x, Dtype dtype, int64_t parts, int64_t stride, int64_t length, const float* factor,
                   cudaStream_t stream);

// The pairs of the one launch: B > 0, N + B < 2^30.
struct Pairs {
  const int* cu_rows;      // [2B + 1]
  const float* ref_logps;  // [2B], or null
  float grad_scale;
  int B;
  LossOptions options;
};

// The 4 (3N + 3B + 1) bytes at `workspace` need not be zero. blocks_per_sm: 3, or 1.
cudaError_t dpo_fused(const Logits& x, const Targets& targets, const Pairs& pairs, float* losses, float* logps,
                      void* out, int64_t stride_out, void* workspace, int blocks_per_sm, cudaStream_t stream);

}  // namespace dpo_fast::cuda

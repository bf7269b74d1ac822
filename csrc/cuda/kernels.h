// The CUDA kernels as plain functions of raw pointers, sizes and a stream, without torch. dpo_fast/backends/eager.py
// defines what they compute.
//
// Each function enqueues its work and returns cudaGetLastError(). Strides are in words. Without rows nothing is launched.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../losses.h"

namespace dpo_fast::cuda {

enum class Dtype { f32, f16, bf16 };

// Logits [N, V]; the entries of a row are adjacent, and V < 2^30.
struct Logits {
  void* data;
  int64_t stride;
  int64_t N;
  int V;
  Dtype dtype;
};

// Targets [N] in [0, V) or ignore_index; another target reads nothing outside its row and makes the row NaN.
struct Targets {
  const int64_t* data;
  int64_t ignore_index;
};

// z = softcap * tanh(scale * x / softcap) / temperature; a softcap of 0 means that there is none.
struct Transform {
  double scale, softcap, temperature;
};

// `statistics` is [4, N] in the order of eager.OUTPUTS, or null.
cudaError_t logps_fwd(const Logits& x, const Targets& targets, const Transform& transform, float* logps, float* lse,
                      float* statistics, cudaStream_t stream);

// `out` is [N, V] in the type of x; it may be x.
cudaError_t logps_bwd(const Logits& x, const Targets& targets, const float* lse, const float* coef,
                      const Transform& transform, void* out, int64_t stride_out, cudaStream_t stream);

// `blocks_per_sm` is 2 or 1; with 1, half as many rows are between their two reads at a time.
cudaError_t residual_(const Logits& x, const Targets& targets, const Transform& transform, float* logps,
                      float* statistics, int blocks_per_sm, cudaStream_t stream);

// Multiplies `parts` pieces of memory, each of `length` words, by *factor; only the factor is read where it is 1.
cudaError_t scale_(void* x, Dtype dtype, int64_t parts, int64_t stride, int64_t length, const float* factor,
                   cudaStream_t stream);

// The pairs of `dpo_fused`: B > 0, N + B < 2^30.
struct Pairs {
  const int* cu_rows;      // [2B + 1]
  const float* ref_logps;  // [2B], or null
  float grad_scale;
  int B;
  LossOptions options;
};

// The 4 (3N + 3B + 1) bytes at `workspace` need not be zero. `blocks_per_sm` is 3 or 1.
cudaError_t dpo_fused(const Logits& x, const Targets& targets, const Pairs& pairs, float* losses, float* logps,
                      void* out, int64_t stride_out, void* workspace, int blocks_per_sm, cudaStream_t stream);

}  // namespace dpo_fast::cuda

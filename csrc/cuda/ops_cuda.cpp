// The ops on CUDA: outputs are allocated, tensors become pointers, and kernels.h does the rest on the current stream.

#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <limits>
#include <optional>
#include <tuple>

#include "kernels.h"

namespace dpo_fast {
namespace {

using at::Tensor;
using cuda::Dtype;
using cuda::Logits;
using cuda::Targets;
using cuda::Transform;

Dtype dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat: return Dtype::f32;
    case at::kHalf: return Dtype::f16;
    case at::kBFloat16: return Dtype::bf16;
    default: TORCH_CHECK(false, "logits are ", x.scalar_type(), ": float32, bfloat16 or float16");
  }
}

Logits logits_of(const Tensor& x) {
  TORCH_CHECK(x.dim() == 2 && (x.stride(1) == 1 || x.size(1) == 1), "rows of logits have gaps");
  TORCH_CHECK(x.size(1) < std::numeric_limits<int>::max() / 2, "too many words per row: ", x.size(1));
  TORCH_CHECK(x.size(0) <= std::numeric_limits<int>::max() / 2, "too many rows: ", x.size(0));
  return {x.data_ptr(), x.stride(0), x.size(0), int(x.size(1)), dtype_of(x)};
}

Targets targets_of(const Tensor& targets, const Tensor& logits, int64_t ignore_index) {
  TORCH_CHECK(targets.is_contiguous() && targets.numel() == logits.size(0), "one target per row");
  TORCH_CHECK(targets.device() == logits.device(), "targets are on ", targets.device());
  return {targets.const_data_ptr<int64_t>(), ignore_index};
}

Transform transform_of(double scale, std::optional<double> softcap, double temperature) {
  return {scale, softcap.value_or(0), temperature};
}

void check_out(const Tensor& out, const Tensor& logits) {
  TORCH_CHECK(out.sizes() == logits.sizes() && out.scalar_type() == logits.scalar_type(), "out is unlike logits");
  TORCH_CHECK(out.device() == logits.device() && (out.stride(1) == 1 || out.size(1) == 1), "rows of out have gaps");
}

Tensor empty(const Tensor& logits, at::IntArrayRef shape) {
  return at::empty(shape, logits.options().dtype(at::kFloat));
}

// x as contiguous float32 on the device of logits, as the kernels read it; x itself where it already is that.
Tensor floats(const Tensor& x, const Tensor& logits) { return x.to(logits.device(), at::kFloat).contiguous(); }

float* pointer_or_null(const Tensor& statistics) { return statistics.size(0) ? statistics.data_ptr<float>() : nullptr; }

std::tuple<Tensor, Tensor, Tensor> logps_fwd(const Tensor& logits, const Tensor& targets, int64_t ignore_index,
                                             double scale, std::optional<double> softcap, double temperature,
                                             bool statistics) {
  const c10::cuda::CUDAGuard guard(logits.device());
  const Logits x = logits_of(logits);
  Tensor logps = empty(logits, {x.N}), lse = empty(logits, {x.N}), stats = empty(logits, {statistics ? 4 : 0, x.N});
  C10_CUDA_CHECK(cuda::logps_fwd(x, targets_of(targets, logits, ignore_index),
                                 transform_of(scale, softcap, temperature), logps.data_ptr<float>(),
                                 lse.data_ptr<float>(), pointer_or_null(stats), c10::cuda::getCurrentCUDAStream()));
  return {logps, lse, stats};
}

void logps_bwd(const Tensor& logits, const Tensor& targets, const Tensor& lse, const Tensor& coef, int64_t ignore_index,
               double scale, std::optional<double> softcap, double temperature, const Tensor& out) {
  const c10::cuda::CUDAGuard guard(logits.device());
  check_out(out, logits);
  TORCH_CHECK(lse.numel() == logits.size(0) && coef.numel() == logits.size(0), "one lse and one coef per row");
  const Tensor lse_row = floats(lse, logits), coef_row = floats(coef, logits);
  C10_CUDA_CHECK(cuda::logps_bwd(logits_of(logits), targets_of(targets, logits, ignore_index),
                                 lse_row.const_data_ptr<float>(), coef_row.const_data_ptr<float>(),
                                 transform_of(scale, softcap, temperature), out.data_ptr(), out.stride(0),
                                 c10::cuda::getCurrentCUDAStream()));
}

std::tuple<Tensor, Tensor> residual_(const Tensor& logits, const Tensor& targets, int64_t ignore_index, double scale,
                                     std::optional<double> softcap, double temperature, bool statistics,
                                     int64_t blocks_per_sm) {
  TORCH_CHECK(blocks_per_sm == 2 || blocks_per_sm == 1, "blocks_per_sm is 2 or 1");
  const c10::cuda::CUDAGuard guard(logits.device());
  const Logits x = logits_of(logits);
  Tensor logps = empty(logits, {x.N}), stats = empty(logits, {statistics ? 4 : 0, x.N});
  C10_CUDA_CHECK(cuda::residual_(x, targets_of(targets, logits, ignore_index),
                                 transform_of(scale, softcap, temperature), logps.data_ptr<float>(),
                                 pointer_or_null(stats), int(blocks_per_sm), c10::cuda::getCurrentCUDAStream()));
  return {logps, stats};
}

std::tuple<Tensor, Tensor> dpo_fused(const Tensor& logits, const Tensor& targets, const Tensor& cu_rows,
                                     const std::optional<Tensor>& ref_logps, double grad_scale, int64_t loss,
                                     double beta, double label_smoothing, double tau, double gamma,
                                     int64_t ignore_index, const Tensor& out, int64_t blocks_per_sm) {
  TORCH_CHECK(blocks_per_sm == 3 || blocks_per_sm == 1, "blocks_per_sm is 3 or 1");
  const c10::cuda::CUDAGuard guard(logits.device());
  check_out(out, logits);
  const Logits x = logits_of(logits);
  const int64_t B = (cu_rows.numel() - 1) / 2;
  TORCH_CHECK(cu_rows.is_contiguous() && cu_rows.numel() == 2 * B + 1 && cu_rows.device() == logits.device(),
              "cu_rows is [2B + 1] on ", logits.device());
  TORCH_CHECK(!ref_logps || ref_logps->numel() == 2 * B, "2B ref_logps");
  TORCH_CHECK(x.N + B < int64_t(1) << 30, "too many rows in one launch: ", x.N);
  Tensor losses = empty(logits, {B}), logps = empty(logits, {2 * B});
  if (B == 0) return {losses, logps};
  const Tensor refs = ref_logps ? floats(*ref_logps, logits) : Tensor();
  const Tensor workspace = empty(logits, {3 * x.N + 3 * B + 1});
  const cuda::Pairs pairs{cu_rows.const_data_ptr<int>(),
                    ref_logps ? refs.const_data_ptr<float>() : nullptr,
                    float(grad_scale),
                    int(B),
                    {Loss(loss), float(beta), float(label_smoothing), float(tau), float(gamma)}};
  C10_CUDA_CHECK(cuda::dpo_fused(x, targets_of(targets, logits, ignore_index), pairs, losses.data_ptr<float>(),
                                 logps.data_ptr<float>(), out.data_ptr(), out.stride(0), workspace.data_ptr(),
                                 int(blocks_per_sm), c10::cuda::getCurrentCUDAStream()));
  return {losses, logps};
}

// A view [parts, length] of x with parts as long as its strides allow.
Tensor as_parts(const Tensor& x) {
  if (x.is_contiguous()) return x.view({1, -1});
  return x.select(0, 0).is_contiguous() ? x.flatten(1) : x.view({-1, x.size(-1)});
}

void scale_(const Tensor& x, const Tensor& factor) {
  const c10::cuda::CUDAGuard guard(x.device());
  if (x.numel() == 0) return;
  TORCH_CHECK(factor.numel() == 1, "one factor");
  const Tensor parts = as_parts(x), number = floats(factor, x);
  C10_CUDA_CHECK(cuda::scale_(x.data_ptr(), dtype_of(x), parts.size(0), parts.stride(0), parts.size(1),
                              number.const_data_ptr<float>(), c10::cuda::getCurrentCUDAStream()));
}

}  // namespace

TORCH_LIBRARY_IMPL(dpo_fast_csrc, CUDA, m) {
  m.impl("logps_fwd", logps_fwd);
  m.impl("logps_bwd", logps_bwd);
  m.impl("residual_", residual_);
  m.impl("dpo_fused", dpo_fused);
  m.impl("scale_", scale_);
}

}  // namespace dpo_fast

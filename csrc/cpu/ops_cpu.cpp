// The ops on a CPU: rows run in parallel, each on one thread, so that results do not depend on the number of threads.
//
//   logps_fwd   1 read of the scored rows                 residual_   1 read, 1 write (a row that fits the cache stays there)
//   logps_bwd   1 read, 1 write                           dpo_fused   2 reads, 1 write

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../losses.h"
#include "rows.h"

namespace dpo_fast {
namespace {

using at::Tensor;
using Rows = std::vector<int64_t>;

struct InstructionSet {
  const char* name;
  const RowKernels* rows;
};

const InstructionSet& chosen() {
  static const InstructionSet found = []() -> InstructionSet {
#if defined(__x86_64__)
    // This is torch's own choice, which the environment variable ATEN_CPU_CAPABILITY can lower.
    const std::string most = at::get_cpu_capability();
    if (most == "AVX512") return {"AVX512", rows_avx512()};
    if (most == "AVX2") return {"AVX2", rows_avx2()};
#endif
    return {"DEFAULT", rows_default()};
  }();
  return found;
}

const RowKernels& row_kernels(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat: return chosen().rows[0];
    case at::kBFloat16: return chosen().rows[1];
    case at::kHalf: return chosen().rows[2];
    default: TORCH_CHECK(false, "logits are ", dtype, ": float32, bfloat16 or float16");
  }
}

// Rows of logits and their targets: where the words are, and the kernels of their type.
struct Logits {
  Logits(const Tensor& x, const Tensor& target_ids)
      : data(static_cast<char*>(x.data_ptr())), N(x.size(0)), V(x.size(1)), dtype(x.scalar_type()),
        size(x.element_size()), stride(x.stride(0) * size), kernels(row_kernels(dtype)),
        targets(target_ids.const_data_ptr<int64_t>()) {
    TORCH_CHECK(x.dim() == 2 && (x.stride(1) == 1 || V == 1), "rows of logits have gaps");
    TORCH_CHECK(target_ids.is_contiguous() && target_ids.numel() == N, "one target per row");
  }

  char* row(int64_t n) const { return data + n * stride; }

  bool inside(int64_t n) const { return targets[n] >= 0 && targets[n] < V; }
  // The word of a row's target, or word 0 for a target outside the row, so that nothing outside it is touched.
  int64_t target(int64_t n) const { return inside(n) ? targets[n] : 0; }

  float at(int64_t n, int64_t v) const {
    const char* p = row(n) + v * size;
    switch (dtype) {
      case at::kFloat: return *reinterpret_cast<const float*>(p);
      case at::kBFloat16: return *reinterpret_cast<const at::BFloat16*>(p);
      default: return *reinterpret_cast<const at::Half*>(p);
    }
  }

  void set(int64_t n, int64_t v, float value) const {
    char* p = row(n) + v * size;
    switch (dtype) {
      case at::kFloat: *reinterpret_cast<float*>(p) = value; break;
      case at::kBFloat16: *reinterpret_cast<at::BFloat16*>(p) = value; break;
      default: *reinterpret_cast<at::Half*>(p) = value;
    }
  }

  char* data;
  int64_t N, V;
  at::ScalarType dtype;
  int64_t size, stride;
  const RowKernels& kernels;
  const int64_t* targets;
};

struct Softmax {
  Softmax(double scale, std::optional<double> softcap, double temperature)
      : transform{float(softcap ? scale / *softcap : scale / temperature),
                  float(softcap ? *softcap / temperature : 1.0), softcap.has_value()},
        slope(scale / temperature), temperature(temperature) {}

  // z - shift of a row's target, with the same bits as in the row's sums: tanh differs between libraries, so the row's
  // kernel computes it. It is NaN for a target outside the row.
  float at_target(const Logits& x, int64_t n, float shift) const {
    return x.inside(n) ? x.kernels.distance(x.row(n) + x.target(n) * x.size, transform, shift) : NAN;
  }

  // dz/dx over scale / temperature.
  float bend(float x) const {
    const float u = transform.capped ? std::tanh(transform.in * x) : 0.0f;
    return 1 - u * u;
  }

  Transform transform;
  float slope, temperature;
};

// The rows with a scored target and the ignored ones, apart, so that each kind is spread evenly over the threads.
std::pair<Rows, Rows> sorted_rows(const Logits& x, int64_t ignore_index) {
  Rows scored, ignored;
  for (int64_t n = 0; n < x.N; n++) (x.targets[n] == ignore_index ? ignored : scored).push_back(n);
  return {scored, ignored};
}

template <typename F>
void each(const Rows& rows, F f) {
  at::parallel_for(0, rows.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) f(rows[i]);
  });
}

// The log-prob of a row's target. It is NaN where the row holds NaN, +inf or only -inf, or the target is outside it.
float log_prob(const RowSums& sums, float below_top) {
  return std::isfinite(sums.top) ? float(below_top - std::log(double(sums.total))) : NAN;
}

void write_statistics(float* out, int64_t n, const RowSums& sums, const Logits& x, const Softmax& softmax) {
  const double total = sums.total, log_total = std::log(total);
  out[n] = log_total - sums.weighted / total;                        // entropy
  out[x.N + n] = double(sums.plain) / x.V * softmax.temperature;     // mean_logits
  out[2 * x.N + n] = std::isfinite(sums.top) && softmax.at_target(x, n, 0) >= sums.top;  // is_top1
  out[3 * x.N + n] = std::log(double(sums.squares)) - 2 * log_total; // log_sum_sq_probs
}

// out = factor * (onehot - softmax) * bend, where softmax = exp(z - shift) * weight and `rest` is 1 minus the softmax of
// the target; `factor` holds the slope.
void write_gradient(const Logits& x, const Logits& out, int64_t n, const Softmax& softmax, float shift, float weight,
                    float rest, float factor) {
  if (factor == 0) {
    std::memset(out.row(n), 0, out.V * out.size);
    return;
  }
  const int64_t target = x.target(n);
  const float at_target = factor * rest * softmax.bend(x.at(n, target));
  if (std::isfinite(shift) && !std::isnan(rest)) {
    x.kernels.gradient(x.row(n), out.row(n), x.V, softmax.transform, shift, -factor * weight);
    out.set(n, target, at_target);
  } else {
    for (int64_t v = 0; v < x.V; v++) out.set(n, v, NAN);
  }
}

void check_out(const Tensor& out, const Tensor& logits) {
  TORCH_CHECK(out.sizes() == logits.sizes() && out.scalar_type() == logits.scalar_type(), "out is unlike logits");
}

void zero(const Logits& out, const Rows& rows) {
  each(rows, [&](int64_t n) { std::memset(out.row(n), 0, out.V * out.size); });
}

std::tuple<Tensor, Tensor, Tensor> logps_fwd(const Tensor& logits, const Tensor& targets, int64_t ignore_index,
                                             double scale, std::optional<double> softcap, double temperature,
                                             bool statistics) {
  const Logits x(logits, targets);
  const Softmax softmax(scale, softcap, temperature);
  const auto options = logits.options().dtype(at::kFloat);
  Tensor logps = at::zeros({x.N}, options), lse = at::zeros({x.N}, options);
  Tensor stats = at::zeros({statistics ? 4 : 0, x.N}, options);
  float *logps_ptr = logps.data_ptr<float>(), *lse_ptr = lse.data_ptr<float>();
  float* stats_ptr = statistics ? stats.data_ptr<float>() : nullptr;
  each(sorted_rows(x, ignore_index).first, [&](int64_t n) {
    const RowSums sums = x.kernels.reduce(x.row(n), x.V, softmax.transform, statistics);
    logps_ptr[n] = log_prob(sums, softmax.at_target(x, n, sums.top));
    lse_ptr[n] = sums.top + std::log(sums.total);
    if (statistics) write_statistics(stats_ptr, n, sums, x, softmax);
  });
  return {logps, lse, stats};
}

void logps_bwd(const Tensor& logits, const Tensor& targets, const Tensor& lse, const Tensor& coef, int64_t ignore_index,
               double scale, std::optional<double> softcap, double temperature, const Tensor& out) {
  check_out(out, logits);
  const Logits x(logits, targets), g(out, targets);
  const Softmax softmax(scale, softcap, temperature);
  TORCH_CHECK(lse.numel() == x.N && coef.numel() == x.N, "one lse and one coef per row");
  const Tensor lse_row = lse.to(at::kFloat).contiguous(), coef_row = coef.to(at::kFloat).contiguous();
  const float *lse_ptr = lse_row.const_data_ptr<float>(), *coef_ptr = coef_row.const_data_ptr<float>();
  const auto [scored, ignored] = sorted_rows(x, ignore_index);
  each(scored, [&](int64_t n) {
    const float rest = -std::expm1(softmax.at_target(x, n, lse_ptr[n]));
    write_gradient(x, g, n, softmax, lse_ptr[n], 1, rest, coef_ptr[n] * softmax.slope);
  });
  zero(g, ignored);
}

std::tuple<Tensor, Tensor> residual_(const Tensor& logits, const Tensor& targets, int64_t ignore_index, double scale,
                                     std::optional<double> softcap, double temperature, bool statistics, int64_t) {
  const Logits x(logits, targets);
  const Softmax softmax(scale, softcap, temperature);
  const auto options = logits.options().dtype(at::kFloat);
  Tensor logps = at::zeros({x.N}, options), stats = at::zeros({statistics ? 4 : 0, x.N}, options);
  float* logps_ptr = logps.data_ptr<float>();
  float* stats_ptr = statistics ? stats.data_ptr<float>() : nullptr;
  const auto [scored, ignored] = sorted_rows(x, ignore_index);
  each(scored, [&](int64_t n) {
    const RowSums sums = x.kernels.reduce(x.row(n), x.V, softmax.transform, statistics);
    logps_ptr[n] = log_prob(sums, softmax.at_target(x, n, sums.top));
    if (statistics) write_statistics(stats_ptr, n, sums, x, softmax);
    write_gradient(x, x, n, softmax, sums.top, 1 / sums.total, -std::expm1(logps_ptr[n]), softmax.slope);
  });
  zero(x, ignored);
  return {logps, stats};
}

std::tuple<Tensor, Tensor> dpo_fused(const Tensor& logits, const Tensor& targets, const Tensor& cu_rows,
                                     const std::optional<Tensor>& ref_logps, double grad_scale, int64_t loss,
                                     double beta, double label_smoothing, double tau, double gamma,
                                     int64_t ignore_index, const Tensor& out, int64_t) {
  check_out(out, logits);
  const Logits x(logits, targets), g(out, targets);
  const Softmax softmax(1, std::nullopt, 1);
  const int64_t B = (cu_rows.numel() - 1) / 2;
  TORCH_CHECK(cu_rows.is_contiguous() && cu_rows.numel() == 2 * B + 1, "cu_rows is [2B + 1]");
  TORCH_CHECK(!ref_logps || ref_logps->numel() == 2 * B, "2B ref_logps");
  const auto options = logits.options().dtype(at::kFloat);
  Tensor losses = at::empty({B}, options), logps = at::empty({2 * B}, options);
  const Tensor refs = ref_logps ? ref_logps->to(at::kFloat).contiguous() : at::zeros({2 * B}, options);
  const int32_t* bounds = cu_rows.const_data_ptr<int32_t>();
  float *losses_ptr = losses.data_ptr<float>(), *logps_ptr = logps.data_ptr<float>();
  const float* refs_ptr = refs.const_data_ptr<float>();
  const LossOptions chosen{Loss(loss), float(beta), float(label_smoothing), float(tau), float(gamma)};

  std::vector<float> top(x.N), total(x.N), row_logps(x.N), coef(2 * B);
  auto [scored, ignored] = sorted_rows(x, ignore_index);
  each(scored, [&](int64_t n) {
    const RowSums sums = x.kernels.reduce(x.row(n), x.V, softmax.transform, false);
    top[n] = sums.top, total[n] = sums.total, row_logps[n] = log_prob(sums, softmax.at_target(x, n, sums.top));
  });

  std::vector<float> lengths(2 * B);
  for (int64_t s = 0; s < 2 * B; s++) {
    double sum = 0;
    int64_t length = 0;
    for (int64_t n = bounds[s]; n < bounds[s + 1]; n++) {
      if (x.targets[n] == ignore_index) continue;
      sum += row_logps[n];
      length++;
    }
    logps_ptr[s] = sum;
    lengths[s] = std::max<int64_t>(length, 1);
  }
  const float factor = grad_scale;
  for (int64_t i = 0; i < B; i++) {
    const int64_t w = i, l = B + i;
    const Pair pair{logps_ptr[w], logps_ptr[l], refs_ptr[w], refs_ptr[l], lengths[w], lengths[l]};
    const PairLoss found = pair_loss(pair, chosen);
    losses_ptr[i] = found.loss;
    coef[w] = found.gw * factor, coef[l] = found.gl * factor;
  }

  // The gradient goes from the last row to the first, since the rows read last are still in the cache.
  std::reverse(scored.begin(), scored.end());
  each(scored, [&](int64_t n) {
    const int64_t s = std::upper_bound(bounds, bounds + 2 * B + 1, n) - bounds - 1;
    write_gradient(x, g, n, softmax, top[n], 1 / total[n], -std::expm1(row_logps[n]), coef[s]);
  });
  zero(g, ignored);
  return {losses, logps};
}

void scale_(const Tensor& x, const Tensor& factor) {
  if (factor.item<double>() != 1.0) const_cast<Tensor&>(x).mul_(factor);
}

}  // namespace

const char* instruction_set() { return chosen().name; }

TORCH_LIBRARY_IMPL(dpo_fast_csrc, CPU, m) {
  m.impl("logps_fwd", logps_fwd);
  m.impl("logps_bwd", logps_bwd);
  m.impl("residual_", residual_);
  m.impl("dpo_fused", dpo_fused);
  m.impl("scale_", scale_);
}

}  // namespace dpo_fast

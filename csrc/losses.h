// The losses of one pair for the CPU and for CUDA: the losses of `FUSED` in dpo_fast/loss_table.py, with two derivatives.
//
// The formulas are those of loss_table.py, which names their papers. Everything is float32 and scalar: a pair costs few
// instructions beside its rows of logits. The file includes no torch header, since nvcc compiles it too.
#pragma once

#include <cmath>

#ifdef __CUDACC__
#define DPO_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define DPO_HOST_DEVICE inline
#endif

namespace dpo_fast {

// The order is that of kLossNames, by which Python finds a loss.
enum class Loss : int {
  sigmoid, sigmoid_norm, hinge, ipo, exo_pair, nca_pair, robust, bco_pair, sppo_hard, apo_zero, apo_down, discopop, simpo,
};

constexpr const char* kLossNames[] = {
    "sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "nca_pair", "robust",
    "bco_pair", "sppo_hard", "apo_zero", "apo_down", "discopop", "simpo",
};

struct LossOptions {
  Loss loss;
  float beta, smoothing, tau, gamma;  // beta, label smoothing, discopop_tau, simpo_gamma
};

// The inputs of a loss: summed log-probs of the chosen (w) and the rejected (l) sequence, the reference's, and lengths.
struct Pair {
  float pw, pl, rw, rl, nw, nl;
};

// The results: the loss, and its derivatives with respect to pw and pl.
struct PairLoss {
  float loss, gw, gl;
};

DPO_HOST_DEVICE float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

DPO_HOST_DEVICE float log_sigmoid(float x) { return fminf(x, 0.0f) - log1pf(expf(-fabsf(x))); }

// A loss of the margin x = b (dw - dl) alone, whose derivative is g.
DPO_HOST_DEVICE PairLoss of_margin(float loss, float b, float g) { return {loss, b * g, -b * g}; }

// Cross-entropy of the margin x against the label 1 - e, and its derivative.
DPO_HOST_DEVICE float smooth(float x, float e) { return -(1 - e) * log_sigmoid(x) - e * log_sigmoid(-x); }
DPO_HOST_DEVICE float smooth_slope(float x, float e) { return e * sigmoid(x) - (1 - e) * sigmoid(-x); }

DPO_HOST_DEVICE PairLoss discopop(float x, float b, float tau) {
  const float ls = log_sigmoid(x), up = sigmoid(x / tau), down = sigmoid(-x / tau);
  // m exp(-x) is computed as one exponential, which is flat past 80 as in loss_table.py.
  const float exponent = log_sigmoid(x / tau) - x, bump = expf(fminf(exponent, 80.0f));
  const float of_bump = exponent <= 80.0f ? bump * (down / tau - 1) : 0.0f;
  return of_margin(bump - down * ls, b, up * down * ls / tau - down * sigmoid(-x) + of_bump);
}

DPO_HOST_DEVICE PairLoss pair_loss(const Pair& p, const LossOptions& o) {
  const float b = o.beta, e = o.smoothing;
  const float dw = p.pw - p.rw, dl = p.pl - p.rl, x = b * (dw - dl), xw = b * dw, xl = b * dl;
  switch (o.loss) {
    case Loss::sigmoid:
      return of_margin(smooth(x, e), b, smooth_slope(x, e));
    case Loss::sigmoid_norm: {
      const float y = b * (dw / p.nw - dl / p.nl), g = -b * sigmoid(-y);
      return {-log_sigmoid(y), g / p.nw, -g / p.nl};
    }
    case Loss::hinge:
      // A NaN margin gives a NaN loss and the slope -1, as in PyTorch.
      return of_margin(1 - x <= 0 ? 0.0f : 1 - x, b, 1 - x <= 0 ? 0.0f : -1.0f);
    case Loss::ipo: {
      const float z = dw / p.nw - dl / p.nl - 0.5f / b;
      return {z * z, 2 * z / p.nw, -2 * z / p.nl};
    }
    case Loss::exo_pair: {
      const float up = sigmoid(x), down = sigmoid(-x), log_w = log1pf(-e), log_l = logf(e);
      const float loss = up * (log_sigmoid(x) - log_w) + down * (log_sigmoid(-x) - log_l);
      return of_margin(loss, b, up * down * (x - log_w + log_l));
    }
    case Loss::nca_pair: {
      const float loss = -log_sigmoid(xw) - 0.5f * log_sigmoid(-xw) - 0.5f * log_sigmoid(-xl);
      return {loss, b * (0.5f * sigmoid(xw) - sigmoid(-xw)), 0.5f * b * sigmoid(xl)};
    }
    case Loss::robust: {
      const float loss = (-(1 - e) * log_sigmoid(x) + e * log_sigmoid(-x)) / (1 - 2 * e);
      return of_margin(loss, b, -((1 - e) * sigmoid(-x) + e * sigmoid(x)) / (1 - 2 * e));
    }
    case Loss::bco_pair:
      return {-log_sigmoid(xw) - log_sigmoid(-xl), -b * sigmoid(-xw), b * sigmoid(xl)};
    case Loss::sppo_hard: {
      const float zw = dw - 0.5f / b, zl = dl + 0.5f / b;
      return {zw * zw + zl * zl, 2 * zw, 2 * zl};
    }
    case Loss::apo_zero:
      return {sigmoid(-xw) + sigmoid(xl), -b * sigmoid(xw) * sigmoid(-xw), b * sigmoid(xl) * sigmoid(-xl)};
    case Loss::apo_down: {
      const float gl = b * sigmoid(x) * sigmoid(-x);
      return {sigmoid(xw) + sigmoid(-x), b * sigmoid(xw) * sigmoid(-xw) - gl, gl};
    }
    case Loss::discopop:
      return discopop(x, b, o.tau);
    case Loss::simpo: {
      const float y = b * (p.pw / p.nw - p.pl / p.nl) - o.gamma, g = b * smooth_slope(y, e);
      return {smooth(y, e), g / p.nw, -g / p.nl};
    }
  }
  return {NAN, NAN, NAN};
}

}  // namespace dpo_fast

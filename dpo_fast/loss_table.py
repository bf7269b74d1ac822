"""The table of preference losses: a new loss is one row of `LOSSES`, with its formula on one line.

Formulas read `Terms`, [B] log-probs in nats in float32 or wider, and return one number per pair. A row also states what
its loss needs (a reference, lengths, options); loss_options.py checks that and losses.py applies the formulas. This file
imports PyTorch alone.
"""

import dataclasses
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# exp(80) = 5.5e34 leaves float32 room for a difference and a factor; exponents are clamped there.
MAX_EXPONENT = 80.0


@dataclasses.dataclass(frozen=True)
class Terms:
    """The inputs of a formula. Every tensor is [B] unless a comment says otherwise."""

    chosen_logps: Tensor  # summed log-probs under the policy
    rejected_logps: Tensor
    ref_chosen_logps: Tensor  # the same under the reference
    ref_rejected_logps: Tensor
    chosen_logratios: Tensor  # chosen_logps - ref_chosen_logps
    rejected_logratios: Tensor
    chosen_scores: Tensor  # f(chosen_logratios) of the f-divergence
    rejected_scores: Tensor
    chosen_lengths: Tensor | None  # scored tokens
    rejected_lengths: Tensor | None
    mean_chosen_length: Tensor | float | None  # a scalar
    beta: float
    label_smoothing: float | Tensor  # a tensor: one number per pair
    discopop_tau: float
    simpo_gamma: float

    @property
    def delta(self) -> Tensor:
        """Chosen score minus rejected score."""
        return self.chosen_scores - self.rejected_scores

    @property
    def mean_delta(self) -> Tensor:
        """Chosen score per token minus rejected score per token."""
        return self.chosen_scores / self.chosen_lengths - self.rejected_scores / self.rejected_lengths

    @property
    def paired_quantiles(self) -> Tensor:
        """Sorted policy margins minus sorted reference margins, by quantile."""
        policy = torch.sort(self.chosen_logps - self.rejected_logps).values
        return policy - torch.sort(self.ref_chosen_logps - self.ref_rejected_logps).values

    @property
    def unpaired_quantiles(self) -> Tensor:
        """Sorted chosen log-ratios minus sorted rejected log-ratios, by quantile."""
        return torch.sort(self.chosen_logratios).values - torch.sort(self.rejected_logratios).values

    @property
    def chosen_mean_logps(self) -> Tensor:
        """Mean log-prob per token of the chosen completions."""
        return self.chosen_logps / self.chosen_lengths

    @property
    def rejected_mean_logps(self) -> Tensor:
        """Mean log-prob per token of the rejected completions."""
        return self.rejected_logps / self.rejected_lengths

    @property
    def nll(self) -> Tensor:
        """The negative log-likelihood of each pair's chosen tokens; its mean over pairs is the mean over chosen tokens."""
        return -self.chosen_logps / self.mean_chosen_length


@dataclasses.dataclass(frozen=True)
class Loss:
    """A row of `LOSSES`."""

    formula: Callable[[Terms], Tensor]
    margin: bool = False  # it reads chosen_logps - rejected_logps alone, so its two derivatives are opposite numbers
    needs_reference: bool = True
    needs_lengths: tuple[str, ...] = ()  # the arguments that must be known
    over_batch: bool = False  # a pair's loss depends on the other pairs, so splitting a batch changes it
    token_mean: bool = False  # it is a mean over all chosen tokens, so pair_weights and ld_alpha are refused
    average_rewards: bool = False  # without a reference, rewards are beta * logp / length
    label_smoothing: str | None = None  # the allowed interval: "[0, 0.5)" holds 0 but not 0.5; None: no effect
    f_divergence: bool = False  # an f_divergence_type other than reverse_kl is allowed
    options: tuple[str, ...] = ()  # options that only this loss reads


_ls, _s = F.logsigmoid, torch.sigmoid
BOTH_LENGTHS = ("chosen_lengths", "rejected_lengths")
MEAN_LENGTH = ("mean_chosen_length",)
_UNIT = "[0, 1]"


def _smooth(x: Tensor, e: float | Tensor) -> Tensor:
    """Cross-entropy of the margin x against the label 1 - e."""
    return -(1 - e) * _ls(x) - e * _ls(-x)


def _nca(x: Tensor, y: Tensor) -> Tensor:
    return -_ls(x) - 0.5 * _ls(-x) - 0.5 * _ls(-y)


def _robust(x: Tensor, e: float | Tensor) -> Tensor:
    return (-(1 - e) * _ls(x) + e * _ls(-x)) / (1 - 2 * e)


def _exo(x: Tensor, e: float | Tensor) -> Tensor:
    """KL divergence of (s(x), s(-x)) from the smoothed label (1 - e, e)."""
    e = e if isinstance(e, Tensor) else torch.full((), e, dtype=torch.float64)
    return _s(x) * (_ls(x) - torch.log1p(-e)) + _s(-x) * (_ls(-x) - torch.log(e))


def _discopop(x: Tensor, tau: float) -> Tensor:
    """-(1 - m) ls(x) + m exp(-x) with m = s(x / tau); m exp(-x) is computed as one exponential, so 0 * inf cannot arise."""
    return -_s(-x / tau) * _ls(x) + torch.exp((_ls(x / tau) - x).clamp(max=MAX_EXPONENT))


def log_odds(avg: Tensor) -> Tensor:
    """log(p / (1 - p)) of p = exp(avg); p is held below 1, where the odds are infinite (an empty completion has p = 1)."""
    avg = avg.clamp(max=-torch.finfo(avg.dtype).eps)
    return avg - torch.log(-torch.expm1(avg))


LOSSES: dict[str, Loss] = {
    # DPO, arXiv 2305.18290 eq. 7; e > 0 gives conservative DPO, which assumes labels are flipped with probability e
    "sigmoid": Loss(
        lambda t: _smooth(t.beta * t.delta, t.label_smoothing), margin=True, label_smoothing=_UNIT, f_divergence=True
    ),
    # DPO on means over tokens, Tulu 3, arXiv 2411.15124
    "sigmoid_norm": Loss(lambda t: -_ls(t.beta * t.mean_delta), needs_lengths=BOTH_LENGTHS, f_divergence=True),
    # SLiC, arXiv 2305.10425, on log-ratios as in RSO, arXiv 2309.06657
    "hinge": Loss(lambda t: torch.relu(1 - t.beta * t.delta), margin=True, f_divergence=True),
    # IPO, arXiv 2310.12036 eq. 17 (beta is its tau) on means over tokens
    "ipo": Loss(lambda t: (t.mean_delta - 0.5 / t.beta) ** 2, needs_lengths=BOTH_LENGTHS, f_divergence=True),
    # EXO, arXiv 2402.00856 eq. 16 for two completions
    "exo_pair": Loss(
        lambda t: _exo(t.beta * t.delta, t.label_smoothing), margin=True, label_smoothing="(0, 1)", f_divergence=True
    ),
    # NCA, arXiv 2402.05369, for two completions
    "nca_pair": Loss(lambda t: _nca(t.beta * t.chosen_logratios, t.beta * t.rejected_logratios)),
    # robust DPO, arXiv 2403.00409: unbiased when labels are flipped with probability e
    "robust": Loss(
        lambda t: _robust(t.beta * t.delta, t.label_smoothing),
        margin=True,
        label_smoothing="[0, 0.5)",
        f_divergence=True,
    ),
    # BCO, arXiv 2404.04656, without the reward shift
    "bco_pair": Loss(lambda t: -_ls(t.beta * t.chosen_logratios) - _ls(-t.beta * t.rejected_logratios)),
    # SPPO, arXiv 2405.00675 eq. 4.7 with P = 1 for the chosen and 0 for the rejected
    "sppo_hard": Loss(lambda t: (t.chosen_logratios - 0.5 / t.beta) ** 2 + (t.rejected_logratios + 0.5 / t.beta) ** 2),
    # AOT, arXiv 2406.05882 section 3: quantiles over the batch, paired
    "aot": Loss(
        lambda t: _smooth(t.beta * t.paired_quantiles, t.label_smoothing),
        margin=True,
        over_batch=True,
        label_smoothing=_UNIT,
    ),
    # AOT, unpaired
    "aot_unpaired": Loss(
        lambda t: _smooth(t.beta * t.unpaired_quantiles, t.label_smoothing), over_batch=True, label_smoothing=_UNIT
    ),
    # APO, arXiv 2408.06266 eq. 7
    "apo_zero": Loss(lambda t: _s(-t.beta * t.chosen_logratios) + _s(t.beta * t.rejected_logratios)),
    # APO, eq. 8
    "apo_down": Loss(
        lambda t: _s(t.beta * t.chosen_logratios) + _s(-t.beta * (t.chosen_logratios - t.rejected_logratios))
    ),
    # DiscoPOP, arXiv 2406.08414 eq. 5
    "discopop": Loss(
        lambda t: _discopop(t.beta * t.delta, t.discopop_tau), margin=True, f_divergence=True, options=("discopop_tau",)
    ),
    # negative log-likelihood of the chosen tokens
    "sft": Loss(lambda t: t.nll, needs_reference=False, needs_lengths=MEAN_LENGTH, token_mean=True, f_divergence=True),
    # SimPO, arXiv 2405.14734 eq. 6
    "simpo": Loss(
        lambda t: _smooth(t.beta * (t.chosen_mean_logps - t.rejected_mean_logps) - t.simpo_gamma, t.label_smoothing),
        needs_reference=False,
        needs_lengths=BOTH_LENGTHS,
        average_rewards=True,
        label_smoothing=_UNIT,
        options=("simpo_gamma",),
    ),
    # ORPO, arXiv 2403.07691 eqs. 6 and 7 (beta is its lambda)
    "orpo": Loss(
        lambda t: t.nll - t.beta * _ls(log_odds(t.chosen_mean_logps) - log_odds(t.rejected_mean_logps)),
        needs_reference=False,
        needs_lengths=BOTH_LENGTHS + MEAN_LENGTH,
        token_mean=True,
        average_rewards=True,
    ),
}

# Losses that are a function of one pair alone: one launch can compute the losses and the gradient of a batch.
FUSED = tuple(name for name, row in LOSSES.items() if not row.over_batch and not row.token_mean)


def _alpha_score(d: Tensor, alpha: float) -> Tensor:
    if abs(alpha - 1) < 1e-6:
        return d
    return torch.expm1(((alpha - 1) * d).clamp(max=MAX_EXPONENT)) / (alpha - 1)


# f-DPO, arXiv 2309.16240: the derivative of f at the ratio exp(d), up to a constant; forward_kl is alpha = 0
F_DIVERGENCES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "reverse_kl": lambda d, alpha: d,
    "forward_kl": lambda d, alpha: _alpha_score(d, 0.0),
    "js_divergence": lambda d, alpha: math.log(2) + _ls(d),
    "alpha_divergence": _alpha_score,
}

"""The truth of the tests: the ops written as their formulas, on whole logits, differentiated by autograd.

Short enough to be believed, and it shares no function with what the product runs: the losses are written a second time, from
their papers (loss_table.py names them). Tests call it in float64. Arguments are those of the public ops, defaults too.
"""

import itertools
import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

# ---- Log-probs ----


def token_logps(
    logits: Tensor,  # [..., V]
    targets: Tensor,  # [...]
    *,
    ignore_index: int | None = -100,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    outputs: tuple[str, ...] = (),
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """`logits.log_softmax(-1).gather(-1, targets)` in the shape of targets, 0 where the target is ignored; statistics."""
    z = transform_logits(logits, logit_scale, softcap, temperature)
    ignore_index = -100 if ignore_index is None else ignore_index
    losses = F.cross_entropy(z.flatten(0, -2), targets.flatten(), ignore_index=ignore_index, reduction="none")
    logps = -losses.view(targets.shape)
    if not outputs:
        return logps
    stats = {name: STATISTICS[name](z.detach(), targets, temperature) for name in outputs}
    return logps, {name: x.masked_fill(targets == ignore_index, 0) for name, x in stats.items()}


def linear_token_logps(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None = None, **options
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """`token_logps` of [..., D] hidden states times a [V, D] head."""
    return token_logps(F.linear(hidden, weight, bias), targets, **options)


def transform_logits(
    logits: Tensor, logit_scale: float = 1.0, softcap: float | None = None, temperature: float = 1.0
) -> Tensor:
    """Scale, then soft-cap, then temperature, in float32 or wider."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32)) * logit_scale
    return (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature


# Statistics [...] of transformed logits z [..., V] and targets [...]; ignored targets are not masked here.
STATISTICS = {
    "entropy": lambda z, targets, temperature: torch.special.entr(z.softmax(-1)).sum(-1),
    "mean_logits": lambda z, targets, temperature: (z * temperature).mean(-1),
    "is_top1": lambda z, targets, temperature: z.gather(-1, targets.clamp(min=0)[..., None])[..., 0] >= z.amax(-1),
    "log_sum_sq_probs": lambda z, targets, temperature: z.softmax(-1).square().sum(-1).log(),
}


def scored_parts(logps: Tensor, targets: Tensor, cu_seqlens: Tensor | None, ignore_index: int) -> list[Tensor]:
    """The log-probs of each sequence's scored tokens, one tensor per sequence of [S, T], or of [N] with cu_seqlens."""
    rows = zip(logps, targets, strict=True)
    if cu_seqlens is not None:
        ends = cu_seqlens.tolist()
        rows = [(logps[a:b], targets[a:b]) for a, b in itertools.pairwise(ends)]
    return [x[t != ignore_index] for x, t in rows]


def sequence_logps(
    logits: Tensor,
    targets: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    average: bool = False,
    ignore_index: int = -100,
    outputs: tuple[str, ...] = (),
    **transform,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """Log-prob of each sequence [S], with `average` divided by its scored tokens."""
    found = token_logps(logits, targets, ignore_index=ignore_index, outputs=outputs, **transform)
    parts = scored_parts(found[0] if outputs else found, targets, cu_seqlens, ignore_index)
    summed = torch.stack([x.sum() / max(1, len(x)) if average else x.sum() for x in parts])
    return (summed, found[1]) if outputs else summed


def linear_sequence_logps(hidden: Tensor, weight: Tensor, targets: Tensor, *, bias=None, **options):
    """`sequence_logps` of [..., D] hidden states times a [V, D] head."""
    return sequence_logps(F.linear(hidden, weight, bias), targets, **options)


# ---- Losses ----


def preference_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    loss_type: str | list[str] = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float | Tensor = 0.0,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
    discopop_tau: float = 0.05,
    simpo_gamma: float = 0.5,
    loss_weights: list[float] | None = None,
    pair_weights: Tensor | None = None,
    mean_chosen_length: Tensor | float | None = None,
    sft_weight: float = 0.0,
    sft_mean: str = "tokens",
    average_log_prob: bool = False,
) -> dict[str, Tensor]:
    """The fields of a PreferenceOutput by name, of [B] log-probs in float32 or wider."""
    wide = torch.promote_types(chosen_logps.dtype, torch.float32)
    c, r = total_c, total_r = chosen_logps.to(wide), rejected_logps.to(wide)
    n_c, n_r = (1.0 if n is None else n.to(wide).clamp(min=1) for n in (chosen_lengths, rejected_lengths))
    if average_log_prob:
        c, r = total_c / n_c, total_r / n_r
    ref_c, ref_r = (0 * c if x is None else x.to(wide) for x in (ref_chosen_logps, ref_rejected_logps))
    mean_length = mean_chosen_length
    if mean_length is None and chosen_lengths is not None:
        mean_length = chosen_lengths.to(wide).sum().clamp(min=1) / len(c)
    score = DIVERGENCES[f_divergence_type]
    w, v = (score(x, f_alpha_divergence_coef) for x in (c - ref_c, r - ref_r))
    x = SimpleNamespace(
        margin=beta * (w - v),
        mean_margin=beta * (w / n_c - v / n_r),
        chosen=beta * (c - ref_c),
        rejected=beta * (r - ref_r),
        paired=beta * ((c - r).sort().values - (ref_c - ref_r).sort().values),
        unpaired=beta * ((c - ref_c).sort().values - (r - ref_r).sort().values),
        per_token=(total_c / n_c, total_r / n_r),
        nll=None if mean_length is None else -total_c / mean_length,
        beta=beta,
        e=torch.as_tensor(label_smoothing, dtype=wide, device=c.device),
        tau=discopop_tau,
        gamma=simpo_gamma,
    )
    names = [loss_type] if isinstance(loss_type, str) else loss_type
    weights = loss_weights or [1.0] * len(names)
    losses = sum(weight * FORMULAS[name](x) for name, weight in zip(names, weights, strict=True))
    if sft_weight:
        losses = losses + sft_weight * (x.nll if sft_mean == "tokens" else -x.per_token[0])
    if pair_weights is not None:
        losses = losses * pair_weights.to(wide)
    rewards = x.chosen, x.rejected
    if set(names) <= {"sft", "simpo", "orpo"} and set(names) != {"sft"}:
        rewards = tuple(beta * mean for mean in x.per_token)
    found = losses.mean(), losses, c, r, *(reward.detach() for reward in rewards)
    return dict(zip(FIELDS, found, strict=True))


FIELDS = ("loss", "losses", "chosen_logps", "rejected_logps", "chosen_rewards", "rejected_rewards")


def _log_p(x: Tensor) -> Tensor:
    """log of the probability that a logistic model with margin x gives to the label."""
    return F.logsigmoid(x)


def _cross_entropy(x: Tensor, e: Tensor) -> Tensor:
    """Binary cross-entropy of the margin x with the label 1 - e."""
    return F.binary_cross_entropy_with_logits(x, (1 - e).expand_as(x), reduction="none")


def _power(x: Tensor, alpha: float) -> Tensor:
    """(exp((alpha - 1) x) - 1) / (alpha - 1), which is x at alpha = 1. The product clamps exponents at 80 too."""
    power = alpha - 1
    return x if abs(power) < 1e-6 else torch.expm1((power * x).clamp(max=80)) / power


def _log_odds(mean: Tensor) -> Tensor:
    """log(p / (1 - p)) of p = exp(mean), which stays one unit in the last place below 1."""
    mean = mean.clamp(max=-torch.finfo(mean.dtype).eps)
    return mean - (-torch.expm1(mean)).log()


DIVERGENCES = {
    "reverse_kl": lambda x, alpha: x,
    "forward_kl": lambda x, alpha: _power(x, 0.0),
    "js_divergence": lambda x, alpha: math.log(2) + _log_p(x),
    "alpha_divergence": _power,
}
FORMULAS = {
    "sigmoid": lambda x: _cross_entropy(x.margin, x.e),
    "sigmoid_norm": lambda x: -_log_p(x.mean_margin),
    "hinge": lambda x: (1 - x.margin).clamp(min=0),
    "ipo": lambda x: ((x.mean_margin - 0.5) / x.beta) ** 2,
    "exo_pair": lambda x: (
        x.margin.sigmoid() * (_log_p(x.margin) - torch.log1p(-x.e))
        + (-x.margin).sigmoid() * (_log_p(-x.margin) - x.e.log())
    ),
    "nca_pair": lambda x: -_log_p(x.chosen) - (_log_p(-x.chosen) + _log_p(-x.rejected)) / 2,
    "robust": lambda x: ((1 - x.e) * -_log_p(x.margin) - x.e * -_log_p(-x.margin)) / (1 - 2 * x.e),
    "bco_pair": lambda x: -_log_p(x.chosen) - _log_p(-x.rejected),
    "sppo_hard": lambda x: ((x.chosen - 0.5) / x.beta) ** 2 + ((x.rejected + 0.5) / x.beta) ** 2,
    "aot": lambda x: _cross_entropy(x.paired, x.e),
    "aot_unpaired": lambda x: _cross_entropy(x.unpaired, x.e),
    "apo_zero": lambda x: (-x.chosen).sigmoid() + x.rejected.sigmoid(),
    "apo_down": lambda x: x.chosen.sigmoid() + (x.rejected - x.chosen).sigmoid(),
    "discopop": lambda x: (
        (-x.margin / x.tau).sigmoid() * -_log_p(x.margin) + (_log_p(x.margin / x.tau) - x.margin).clamp(max=80).exp()
    ),
    "sft": lambda x: x.nll,
    "simpo": lambda x: _cross_entropy(x.beta * (x.per_token[0] - x.per_token[1]) - x.gamma, x.e),
    "orpo": lambda x: x.nll - x.beta * _log_p(_log_odds(x.per_token[0]) - _log_odds(x.per_token[1])),
}


def dpo_loss(
    logits: Tensor,
    targets: Tensor,
    ref_logps: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
    ld_alpha: float | None = None,
    average_log_prob: bool = False,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    outputs: tuple[str, ...] = (),
    **loss,
) -> dict[str, Tensor]:
    """`preference_loss` of the log-probs of a batch of whole logits, sequence by sequence; statistics per token beside it."""
    transform = {"logit_scale": logit_scale, "softcap": softcap, "temperature": temperature}
    found = token_logps(logits, targets, ignore_index=ignore_index, outputs=outputs, **transform)
    logps, stats = found if outputs else (found, {})
    summed, lengths = _pair_sums(logps, targets, cu_seqlens, ignore_index, ld_alpha)
    given = dict(zip(("chosen_lengths", "rejected_lengths"), lengths.chunk(2), strict=True))
    references = (None, None) if ref_logps is None else ref_logps.chunk(2)
    return preference_loss(*summed.chunk(2), *references, average_log_prob=average_log_prob, **given, **loss) | stats


def _pair_sums(logps, targets, cu_seqlens, ignore_index, ld_alpha) -> tuple[Tensor, Tensor]:
    """[2B] sums of each sequence's log-probs, those past the shorter length of its pair times `ld_alpha`, and lengths."""
    parts = scored_parts(logps, targets, cu_seqlens, ignore_index)
    lengths = torch.tensor([len(x) for x in parts], device=logps.device)
    if ld_alpha is not None:
        shorter = lengths.view(2, -1).amin(0).repeat(2).tolist()
        parts = [torch.cat([x[:n], ld_alpha * x[n:]]) for x, n in zip(parts, shorter, strict=True)]
    return torch.stack([x.sum() for x in parts]), lengths


def linear_dpo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ref_logps: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    **options,
) -> dict[str, Tensor]:
    """`dpo_loss` of [..., D] hidden states times a [V, D] head; `ref_logps` may come of the reference's hidden states."""
    if ref_hidden is not None:
        shape = {k: options[k] for k in ("cu_seqlens", "ignore_index", "ld_alpha", "average_log_prob") if k in options}
        transform = {k: options[k] for k in ("logit_scale", "softcap", "temperature") if k in options}
        plain = dpo_loss(F.linear(ref_hidden, ref_weight, ref_bias), targets, **shape, **transform)
        ref_logps = torch.cat([plain["chosen_logps"], plain["rejected_logps"]]).detach()
    return dpo_loss(F.linear(hidden, weight, bias), targets, ref_logps, **options)

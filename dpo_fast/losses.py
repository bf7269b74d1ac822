"""Preference losses on sequence log-probs: one table, one formula a row, plain PyTorch.

Everything here works on [B] or [S] log-probs in nats, in float32 or wider, and never waits for the device. No logits,
no model, no kernels.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# exp(80) = 5.5e34 leaves float32 room for a difference and a factor; beyond it the exponential is flat.
MAX_EXPONENT = 80.0


@dataclasses.dataclass(frozen=True)
class PreferenceOutput:
    """What a preference loss returns; only `loss` and `losses` carry a gradient."""

    loss: Tensor  # scalar, the mean of losses
    losses: Tensor  # [B], times loss_weights and pair_weights; by quantile, not by pair, for the over_batch losses
    chosen_logps: Tensor  # [B], as given
    rejected_logps: Tensor  # [B]
    chosen_rewards: Tensor  # [B], beta * (logp - ref_logp)
    rejected_rewards: Tensor  # [B]


@dataclasses.dataclass(frozen=True)
class Terms:
    """What a formula reads: w is the chosen side, l the rejected one; every tensor is [B]."""

    pw: Tensor  # summed log-probs of the policy
    pl: Tensor
    rw: Tensor  # and of the reference
    rl: Tensor
    dw: Tensor  # log-ratios pw - rw
    dl: Tensor
    sw: Tensor  # scores f(dw) of the f-divergence
    sl: Tensor
    nw: Tensor | None  # lengths
    nl: Tensor | None
    mean_nw: Tensor | float | None  # scalar
    b: float  # beta
    e: float  # label smoothing
    tau: float  # DiscoPOP
    gamma: float  # SimPO

    d = property(lambda t: t.sw - t.sl)
    d_norm = property(lambda t: t.sw / t.nw - t.sl / t.nl)
    q = property(lambda t: torch.sort(t.pw - t.pl).values - torch.sort(t.rw - t.rl).values)
    q_unpaired = property(lambda t: torch.sort(t.dw).values - torch.sort(t.dl).values)
    aw = property(lambda t: t.pw / t.nw)
    al = property(lambda t: t.pl / t.nl)
    nll = property(lambda t: -t.pw / t.mean_nw)  # a pair's part of the mean over the chosen tokens


@dataclasses.dataclass(frozen=True)
class Loss:
    """A row of `LOSSES`."""

    formula: Callable[[Terms], Tensor]
    margin: bool = False  # reads chosen_logps - rejected_logps alone, so its two derivatives are opposite numbers
    needs_reference: bool = True
    needs_lengths: tuple[str, ...] = ()  # the arguments that must be known
    over_batch: bool = False  # a pair's loss depends on the other pairs: splitting a batch changes it
    token_mean: bool = False  # holds a mean over all chosen tokens: no pair_weights, no ld_alpha
    average_rewards: bool = False  # without a reference, rewards are beta * logp / length
    label_smoothing: str | None = None  # the interval allowed, "[0, 0.5)" holds 0 but not 0.5; None: no effect
    f_divergence: bool = False  # may stand beside another f_divergence_type than reverse_kl
    options: tuple[str, ...] = ()  # options that only this loss reads


_ls, _s = F.logsigmoid, torch.sigmoid
_BOTH = ("chosen_lengths", "rejected_lengths")
_MEAN = ("mean_chosen_length",)
_UNIT = "[0, 1]"


def _smooth(x: Tensor, e: float) -> Tensor:
    """Cross-entropy of the margin x against the label 1 - e."""
    return -(1 - e) * _ls(x) - e * _ls(-x)


def _robust(x: Tensor, e: float) -> Tensor:
    return (-(1 - e) * _ls(x) + e * _ls(-x)) / (1 - 2 * e)


def _exo(x: Tensor, e: float) -> Tensor:
    """KL divergence of (s(x), s(-x)) from the smoothed label (1 - e, e)."""
    return _s(x) * (_ls(x) - math.log1p(-e)) + _s(-x) * (_ls(-x) - math.log(e))


def _discopop(x: Tensor, tau: float) -> Tensor:
    """-(1 - m) ls(x) + m exp(-x) with m = s(x / tau); m exp(-x) is one exponential, so 0 * inf cannot arise."""
    return -_s(-x / tau) * _ls(x) + torch.exp((_ls(x / tau) - x).clamp(max=MAX_EXPONENT))


def _log_odds(avg: Tensor) -> Tensor:
    """log(p / (1 - p)) of p = exp(avg); p is held below 1, where the odds (and an empty completion's) are infinite."""
    avg = avg.clamp(max=-torch.finfo(avg.dtype).eps)
    return avg - torch.log(-torch.expm1(avg))


LOSSES: dict[str, Loss] = {
    # DPO, arXiv 2305.18290 eq. 7; e > 0 is its conservative form: labels are flipped with probability e
    "sigmoid": Loss(lambda t: _smooth(t.b * t.d, t.e), margin=True, label_smoothing=_UNIT, f_divergence=True),
    # DPO on means over tokens, Tulu 3, arXiv 2411.15124
    "sigmoid_norm": Loss(lambda t: -_ls(t.b * t.d_norm), needs_lengths=_BOTH, f_divergence=True),
    # SLiC, arXiv 2305.10425, on log-ratios as in RSO, arXiv 2309.06657
    "hinge": Loss(lambda t: torch.relu(1 - t.b * t.d), margin=True, f_divergence=True),
    # IPO, arXiv 2310.12036 eq. 17 (beta is its tau) on means over tokens
    "ipo": Loss(lambda t: (t.d_norm - 0.5 / t.b) ** 2, needs_lengths=_BOTH, f_divergence=True),
    # EXO, arXiv 2402.00856 eq. 16 for two completions
    "exo_pair": Loss(lambda t: _exo(t.b * t.d, t.e), margin=True, label_smoothing="(0, 1)", f_divergence=True),
    # NCA, arXiv 2402.05369, for two completions
    "nca_pair": Loss(lambda t: -_ls(t.b * t.dw) - 0.5 * _ls(-t.b * t.dw) - 0.5 * _ls(-t.b * t.dl)),
    # robust DPO, arXiv 2403.00409: unbiased when labels are flipped with probability e
    "robust": Loss(lambda t: _robust(t.b * t.d, t.e), margin=True, label_smoothing="[0, 0.5)", f_divergence=True),
    # BCO, arXiv 2404.04656, without the reward shift
    "bco_pair": Loss(lambda t: -_ls(t.b * t.dw) - _ls(-t.b * t.dl)),
    # SPPO, arXiv 2405.00675 eq. 4.7 with P = 1 for the chosen and 0 for the rejected
    "sppo_hard": Loss(lambda t: (t.dw - 0.5 / t.b) ** 2 + (t.dl + 0.5 / t.b) ** 2),
    # AOT, arXiv 2406.05882 section 3: quantiles over the batch, paired
    "aot": Loss(lambda t: _smooth(t.b * t.q, t.e), margin=True, over_batch=True, label_smoothing=_UNIT),
    # AOT, unpaired
    "aot_unpaired": Loss(lambda t: _smooth(t.b * t.q_unpaired, t.e), over_batch=True, label_smoothing=_UNIT),
    # APO, arXiv 2408.06266 eq. 7
    "apo_zero": Loss(lambda t: _s(-t.b * t.dw) + _s(t.b * t.dl)),
    # APO, eq. 8
    "apo_down": Loss(lambda t: _s(t.b * t.dw) + _s(-t.b * (t.dw - t.dl))),
    # DiscoPOP, arXiv 2406.08414 eq. 5
    "discopop": Loss(lambda t: _discopop(t.b * t.d, t.tau), margin=True, f_divergence=True, options=("discopop_tau",)),
    # negative log-likelihood of the chosen tokens
    "sft": Loss(lambda t: t.nll, needs_reference=False, needs_lengths=_MEAN, token_mean=True, f_divergence=True),
    # SimPO, arXiv 2405.14734 eq. 6
    "simpo": Loss(
        lambda t: _smooth(t.b * (t.aw - t.al) - t.gamma, t.e),
        needs_reference=False,
        needs_lengths=_BOTH,
        average_rewards=True,
        label_smoothing=_UNIT,
        options=("simpo_gamma",),
    ),
    # ORPO, arXiv 2403.07691 eqs. 6 and 7 (beta is its lambda)
    "orpo": Loss(
        lambda t: t.nll - t.b * _ls(_log_odds(t.aw) - _log_odds(t.al)),
        needs_reference=False,
        needs_lengths=_BOTH + _MEAN,
        token_mean=True,
        average_rewards=True,
    ),
}


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


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


def _require_in(interval: str, name: str, value: float, why: str = "") -> None:
    low, high = (float(end) for end in interval[1:-1].split(","))
    inside = low < value < high or (value == low and interval[0] == "[") or (value == high and interval[-1] == "]")
    _require(inside, f"{name} is {value}: give a number in {interval}{why}")


def _weighted(loss_type: str | Sequence[str], loss_weights: Sequence[float] | None = None) -> list[tuple[str, float]]:
    names = [loss_type] if isinstance(loss_type, str) else list(loss_type)
    known = bool(names) and all(name in LOSSES for name in names)
    _require(known, f"loss_type is {loss_type!r}: give one or more of {', '.join(LOSSES)}")
    weights = [1.0] * len(names) if loss_weights is None else [float(weight) for weight in loss_weights]
    fit = len(weights) == len(names) and all(math.isfinite(weight) for weight in weights)
    _require(fit, f"loss_weights is {loss_weights}: give one finite number for each of the losses {names}")
    return list(zip(names, weights, strict=True))


def reference_free(loss_type: str | Sequence[str]) -> bool:
    """True when no loss in `loss_type` (a name or a list of names) takes a reference. ValueError for unknown names."""
    return not any(LOSSES[name].needs_reference for name, _ in _weighted(loss_type))


def margin_only(loss_type: str | Sequence[str], f_divergence_type: str = "reverse_kl") -> bool:
    """True when dL/dchosen_logps = -dL/drejected_logps for each pair, whatever the data: every loss is a margin loss.

    Other divergences bend the log-ratio of each side by itself. `pair_weights` are one number a pair. `ld_alpha` leaves
    the tokens up to the shorter length alone, so a token that both sides begin with weighs the same in both.
    """
    return f_divergence_type == "reverse_kl" and all(LOSSES[name].margin for name, _ in _weighted(loss_type))


def validate_loss_options(
    loss_type: str | Sequence[str] = "sigmoid",
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
    discopop_tau: float = 0.05,
    simpo_gamma: float = 0.5,
    loss_weights: Sequence[float] | None = None,
    pair_weights: bool = False,
    ld_alpha: float | None = None,
) -> list[tuple[str, float]]:
    """Check the options of `preference_loss` without any data; returns the losses as (name, weight).

    `pair_weights` says whether pair weights will be given (WPO), `ld_alpha` what `sum_logps` will be given. Among
    several losses an option must have an effect on at least one, a divergence must be allowed for all.

    Raises ValueError, naming the argument, for a value out of range and for an option without effect.
    """
    losses = _weighted(loss_type, loss_weights)
    rows = {name: LOSSES[name] for name, _ in losses}
    names = list(rows)
    _require_in("(0, inf)", "beta", beta)
    _require_in("(0, inf)", "discopop_tau", discopop_tau)
    _require_in("[0, inf)", "simpo_gamma", simpo_gamma)
    _require_in("(-inf, inf)", "f_alpha_divergence_coef", f_alpha_divergence_coef)
    if ld_alpha is not None:
        _require_in("[0, 1]", "ld_alpha", ld_alpha)
    for name, row in rows.items():
        if row.label_smoothing is not None:
            _require_in(row.label_smoothing, "label_smoothing", label_smoothing, f" for loss_type {name!r}")
    known = f_divergence_type in F_DIVERGENCES
    _require(known, f"f_divergence_type is {f_divergence_type!r}: give one of {', '.join(F_DIVERGENCES)}")

    smooths = any(row.label_smoothing for row in rows.values())
    alpha = f_divergence_type == "alpha_divergence"
    for option, value, default, has_effect in (
        ("label_smoothing", label_smoothing, 0.0, smooths),
        ("discopop_tau", discopop_tau, 0.05, any("discopop_tau" in row.options for row in rows.values())),
        ("simpo_gamma", simpo_gamma, 0.5, any("simpo_gamma" in row.options for row in rows.values())),
        ("f_alpha_divergence_coef", f_alpha_divergence_coef, 0.5, alpha),
    ):
        without = f"loss_type {names} and f_divergence_type {f_divergence_type!r}: leave it at {default}"
        _require(value == default or has_effect, f"{option} is {value} but has no effect with {without}")
    diverges = not reference_free(names) and all(row.f_divergence for row in rows.values())
    allowed = ", ".join(name for name, row in LOSSES.items() if row.f_divergence and row.needs_reference)
    _require(
        diverges or f_divergence_type == "reverse_kl",
        f"f_divergence_type is {f_divergence_type!r} with loss_type {names}: leave it at 'reverse_kl' or use only "
        f"{allowed}, with or without sft",
    )
    whole = [name for name, row in rows.items() if row.over_batch or row.token_mean]
    _require(not (pair_weights and whole), f"pair_weights cannot weigh {whole}, which is no sum over pairs: drop one")
    tokens = [name for name, row in rows.items() if row.token_mean]
    _require(ld_alpha is None or not tokens, f"ld_alpha is {ld_alpha} but {tokens} counts all tokens alike: drop one")
    return losses


def preference_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    loss_type: str | Sequence[str] = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
    discopop_tau: float = 0.05,
    simpo_gamma: float = 0.5,
    loss_weights: Sequence[float] | None = None,
    pair_weights: Tensor | None = None,
    mean_chosen_length: Tensor | float | None = None,
    validate: bool = True,
) -> PreferenceOutput:
    """The preference objective on summed log-probs. With the default options (DPO, arXiv 2305.18290 eq. 7) it equals

        delta = (chosen_logps - ref_chosen_logps) - (rejected_logps - ref_rejected_logps)
        loss = -F.logsigmoid(beta * delta).mean()

    Args:
        chosen_logps, rejected_logps: [B], log-probs summed over the completion, in nats, any floating dtype.
        ref_chosen_logps, ref_rejected_logps: [B], the reference's. Both None: they count as zero (a uniform
            reference). Refused where no loss takes a reference (simpo, orpo, sft).
        loss_type: a row of `LOSSES`, or several, which are added up with `loss_weights` (default 1 each).
        label_smoothing: honoured by sigmoid too (conservative DPO), which TRL leaves out since 0.29.
        chosen_lengths, rejected_lengths: [B] completion tokens; needed by sigmoid_norm, ipo, simpo and orpo, the
            chosen ones by sft. A length of zero divides as one.
        f_divergence_type, f_alpha_divergence_coef: the score of a log-ratio, `F_DIVERGENCES`. Exponents are clamped
            at 80: beyond, forward_kl and alpha_divergence are flat instead of infinite.
        pair_weights: [B], multiply each pair's loss (WPO: `wpo_weights`).
        mean_chosen_length: sft and orpo take -chosen_logps / mean_chosen_length as the negative log-likelihood of a
            pair. The default, chosen_lengths.float().mean(), makes their mean over pairs the mean over the chosen
            completion tokens (TRL's orpo counts the prompt's too). Whoever splits a batch passes the mean of the whole
            batch (> 0, a number or a 0-d tensor): then the parts' losses, weighted by their pairs, add up to the whole.
        validate: False skips `validate_loss_options`, for options that were checked before.

    Returns:
        `PreferenceOutput`, float32 or wider. Rewards are beta * (logp - ref_logp) whatever the divergence; for simpo
        and orpo (alone or with sft) beta * logp / length, as in TRL.

    Raises:
        ValueError: a shape other than [B], one reference without the other, a missing length, an option out of range
            or without effect.
    """
    for name, value in (
        ("chosen_logps", chosen_logps),
        ("rejected_logps", rejected_logps),
        ("ref_chosen_logps", ref_chosen_logps),
        ("ref_rejected_logps", ref_rejected_logps),
        ("chosen_lengths", chosen_lengths),
        ("rejected_lengths", rejected_lengths),
        ("pair_weights", pair_weights),
    ):
        fits = value is None or (value.shape == chosen_logps.shape and value.ndim == 1 and value.numel() > 0)
        _require(fits, f"{name} is no [B] tensor of B >= 1 pairs like chosen_logps: give one value a pair")
    losses = _weighted(loss_type, loss_weights)
    if validate:
        validate_loss_options(
            loss_type,
            beta=beta,
            label_smoothing=label_smoothing,
            f_divergence_type=f_divergence_type,
            f_alpha_divergence_coef=f_alpha_divergence_coef,
            discopop_tau=discopop_tau,
            simpo_gamma=simpo_gamma,
            loss_weights=loss_weights,
            pair_weights=pair_weights is not None,
        )
    both = (ref_chosen_logps is None) == (ref_rejected_logps is None)
    _require(both, "of ref_chosen_logps and ref_rejected_logps one is None: give both or neither")
    useless = ref_chosen_logps is not None and reference_free(loss_type)
    _require(not useless, f"loss_type {loss_type!r} takes no ref_chosen_logps and ref_rejected_logps: leave them out")
    dtype = torch.promote_types(torch.promote_types(chosen_logps.dtype, rejected_logps.dtype), torch.float32)
    if isinstance(mean_chosen_length, int | float):
        _require_in("(0, inf)", "mean_chosen_length", mean_chosen_length)
    if mean_chosen_length is None and chosen_lengths is not None:
        mean_chosen_length = chosen_lengths.to(dtype).sum().clamp(min=1) / chosen_lengths.numel()
    known = dict(zip(_BOTH + _MEAN, (chosen_lengths, rejected_lengths, mean_chosen_length), strict=True))
    for name, _ in losses:
        missing = [argument for argument in LOSSES[name].needs_lengths if known[argument] is None]
        hint = "give [B] completion tokens (mean_chosen_length follows from chosen_lengths)"
        _require(not missing, f"loss_type {name!r} needs {', '.join(missing)}: {hint}")

    pw, pl = chosen_logps.to(dtype), rejected_logps.to(dtype)
    rw = torch.zeros_like(pw) if ref_chosen_logps is None else ref_chosen_logps.to(dtype)
    rl = torch.zeros_like(pl) if ref_rejected_logps is None else ref_rejected_logps.to(dtype)
    dw, dl = pw - rw, pl - rl
    sw, sl = (F_DIVERGENCES[f_divergence_type](d, f_alpha_divergence_coef) for d in (dw, dl))
    nw, nl = (None if n is None else n.to(dtype).clamp(min=1) for n in (chosen_lengths, rejected_lengths))
    constants = (mean_chosen_length, beta, label_smoothing, discopop_tau, simpo_gamma)
    terms = Terms(pw, pl, rw, rl, dw, dl, sw, sl, nw, nl, *constants)
    per_pair = sum(weight * LOSSES[name].formula(terms) for name, weight in losses)
    if pair_weights is not None:
        per_pair = per_pair * pair_weights.to(dtype)
    averaged = reference_free(loss_type) and any(LOSSES[name].average_rewards for name, _ in losses)
    rewards = (beta * score.detach() for score in ((terms.aw, terms.al) if averaged else (dw, dl)))
    return PreferenceOutput(per_pair.mean(), per_pair, pw.detach(), pl.detach(), *rewards)


def sum_logps(
    token_logps: Tensor,
    lengths: Tensor,
    *,
    partner_lengths: Tensor | None = None,
    ld_alpha: float | None = None,
    average: bool = False,
) -> Tensor:
    """Log-probs of sequences from those of their tokens: `token_logps.sum(1)`, and `/ lengths` to average.

    Args:
        token_logps: [S, C] in nats, completion tokens first, zeros after the last one. Summed in float32 or wider.
        lengths: [S] completion tokens. Zero gives 0, averaged or not.
        partner_lengths: [S] lengths of the other completion of each pair, used with `ld_alpha`.
        ld_alpha: in [0, 1], the weight of the tokens past min(length, partner_length) (LD-DPO, arXiv 2409.06411);
            the same for policy and reference.

    Returns:
        [S]. Raises ValueError for an `ld_alpha` out of range or without `partner_lengths`.
    """
    logps = token_logps.to(torch.promote_types(token_logps.dtype, torch.float32))
    if ld_alpha is not None:
        _require_in("[0, 1]", "ld_alpha", ld_alpha)
        _require(partner_lengths is not None, "partner_lengths is None but ld_alpha needs it: give the lengths [S]")
        shared = torch.minimum(lengths, partner_lengths)
        logps = torch.where(
            torch.arange(logps.shape[1], device=logps.device) < shared[:, None], logps, ld_alpha * logps
        )
    summed = logps.sum(1)
    return summed / lengths.clamp(min=1) if average else summed


def wpo_weights(token_logps: Tensor, log_sum_sq_probs: Tensor, lengths: Tensor) -> Tensor:
    """How much each pair is the policy's own (WPO, arXiv 2406.11827 eq. 2), the `pair_weights` of `preference_loss`:

        mean = (token_logps - log_sum_sq_probs).sum(1) / lengths
        weights = mean.exp().chunk(2)[0] * mean.exp().chunk(2)[1]

    Args:
        token_logps: [2B, C] in nats, the B chosen rows first; what lies past a row's length is not used.
        log_sum_sq_probs: [2B, C], log of the sum over the vocabulary of the squared probabilities.
        lengths: [2B] completion tokens; an empty completion's mean is 0.

    Returns:
        [B], detached, float32 or wider.
    """
    aligned = token_logps.detach() - log_sum_sq_probs.detach()
    past = torch.arange(aligned.shape[1], device=aligned.device) >= lengths[:, None]
    mean_w, mean_l = sum_logps(aligned.masked_fill(past, 0), lengths, average=True).chunk(2)
    return torch.exp(mean_w + mean_l)

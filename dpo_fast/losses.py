"""The preference objective on sequence log-probs, and its gradient.

The formulas are in loss_table.py, the options in loss_options.py. Everything here works on [B] or [2B] log-probs in nats,
in float32 or wider, and does not wait for a GPU. It knows no logits, no model and no kernels.
"""

import contextlib
import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from .loss_options import LossOptions, check_label_smoothing, require, require_in
from .loss_table import BOTH_LENGTHS, F_DIVERGENCES, MEAN_LENGTH, Terms

__all__ = [
    "LossOptions",
    "PreferenceOutput",
    "check_label_smoothing",
    "loss_and_coefficients",
    "objective",
    "preference_loss",
    "require",
    "require_in",
]


@dataclasses.dataclass(frozen=True)
class PreferenceOutput:
    """The result of a preference loss. The rewards are detached; each function says which other fields carry a gradient."""

    loss: Tensor  # a scalar, the mean of losses
    losses: Tensor  # [B], loss_weights and pair_weights included; over_batch losses list quantiles instead of pairs
    chosen_logps: Tensor  # [B], the log-probs that the losses read
    rejected_logps: Tensor  # [B]
    chosen_rewards: Tensor  # [B], beta * (logp - ref_logp)
    rejected_rewards: Tensor  # [B]


def preference_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    loss_type: str | Sequence[str] = LossOptions.loss_type,
    beta: float = LossOptions.beta,
    label_smoothing: float | Tensor = LossOptions.label_smoothing,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    f_divergence_type: str = LossOptions.f_divergence_type,
    f_alpha_divergence_coef: float = LossOptions.f_alpha_divergence_coef,
    discopop_tau: float = LossOptions.discopop_tau,
    simpo_gamma: float = LossOptions.simpo_gamma,
    loss_weights: Sequence[float] | None = LossOptions.loss_weights,
    pair_weights: Tensor | None = None,
    mean_chosen_length: Tensor | float | None = None,
    sft_weight: float = LossOptions.sft_weight,
    sft_mean: str = LossOptions.sft_mean,
) -> PreferenceOutput:
    """The preference objective on summed log-probs. With the default options it is DPO (arXiv 2305.18290 eq. 7):

        delta = (chosen_logps - ref_chosen_logps) - (rejected_logps - ref_rejected_logps)
        loss = -F.logsigmoid(beta * delta).mean()

    Args:
        chosen_logps, rejected_logps: [B], log-probs summed over the completion, in nats, any floating dtype.
        ref_chosen_logps, ref_rejected_logps: [B], the reference's. If both are None they count as zero (a uniform
            reference). They are refused where no loss takes a reference (simpo, orpo, sft).
        loss_type: a row of `LOSSES`, or several, whose losses are added up with `loss_weights` (default 1 each).
        label_smoothing: the chance that a label is wrong: a number, or [B] with one per pair (soft labels; not for aot
            and aot_unpaired). sigmoid honours it too (conservative DPO), unlike TRL since 0.29.
        chosen_lengths, rejected_lengths: [B] completion tokens. sigmoid_norm, ipo, simpo and orpo need both, sft needs
            the chosen ones. A length of zero divides as one.
        f_divergence_type, f_alpha_divergence_coef: the score of a log-ratio, `F_DIVERGENCES`. Exponents are clamped
            at 80, past which forward_kl and alpha_divergence are flat instead of infinite.
        pair_weights: [B] factors of each pair's loss (WPO: `wpo_weights`).
        mean_chosen_length: sft and orpo take -chosen_logps / mean_chosen_length as the negative log-likelihood of a
            pair. The default, chosen_lengths.float().mean(), makes their mean over pairs the mean over the chosen
            completion tokens (TRL's orpo counts the prompt's too). A caller that splits a batch passes the mean of the
            whole batch (> 0, a number or a 0-d tensor); the parts' losses, weighted by their pairs, then add up to
            the whole.
        sft_weight: the factor of an added negative log-likelihood of the chosen completions (RPO, arXiv 2404.19733).
            With `sft_mean` "tokens" it is the mean over the chosen tokens of the batch, with "pairs" the mean over
            pairs of each pair's mean. It needs `chosen_lengths`.

    Returns:
        `PreferenceOutput`, float32 or wider; all but the rewards carry a gradient. Rewards are beta * (logp - ref_logp)
        whatever the divergence; for simpo and orpo (alone or with sft) they are beta * logp / length, as in TRL.

    Raises:
        ValueError: a shape other than [B], one reference without the other, a missing length, an option out of range
            or without effect. The values of a `label_smoothing` on a GPU are not checked, since that would wait for it.
    """
    soft = label_smoothing if isinstance(label_smoothing, Tensor) else None
    options = LossOptions(
        loss_type,
        beta,
        label_smoothing if soft is None else LossOptions.label_smoothing,
        f_divergence_type,
        f_alpha_divergence_coef,
        discopop_tau,
        simpo_gamma,
        loss_weights,
        sft_weight,
        sft_mean,
    ).check(pair_weights=pair_weights is not None, soft_labels=soft is not None)
    tensors = {
        "chosen_logps": chosen_logps,
        "rejected_logps": rejected_logps,
        "ref_chosen_logps": ref_chosen_logps,
        "ref_rejected_logps": ref_rejected_logps,
        "chosen_lengths": chosen_lengths,
        "rejected_lengths": rejected_lengths,
        "pair_weights": pair_weights,
        "label_smoothing": soft,
    }
    for name, value in tensors.items():
        if value is not None and (value.shape != chosen_logps.shape or value.ndim != 1 or value.numel() == 0):
            raise ValueError(f"{name} is no [B] tensor of B >= 1 pairs like chosen_logps: give one value per pair")
    both = (ref_chosen_logps is None) == (ref_rejected_logps is None)
    require(both, lambda: "of ref_chosen_logps and ref_rejected_logps one is None: give both or neither")
    useless = ref_chosen_logps is not None and options.reference_free
    require(
        not useless,
        lambda: f"loss_type {loss_type!r} takes no ref_chosen_logps and ref_rejected_logps: leave them out",
    )
    # Reading a value would break a compiled graph.
    if soft is not None and not soft.is_cuda and not torch.compiler.is_compiling():
        check_label_smoothing(soft, options)
    if isinstance(mean_chosen_length, int | float):
        require_in("(0, inf)", "mean_chosen_length", mean_chosen_length)
    return objective(options, **tensors, mean_chosen_length=mean_chosen_length)


def objective(
    options: LossOptions,
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    pair_weights: Tensor | None = None,
    label_smoothing: Tensor | None = None,
    mean_chosen_length: Tensor | float | None = None,
) -> PreferenceOutput:
    """`preference_loss` for options that were checked before (`LossOptions.check`). Raises ValueError for missing lengths.

    `label_smoothing` [B], if given, replaces `options.label_smoothing`. With `average_log_prob` the losses read log-probs
    per token: chosen_logps and rejected_logps are divided here, the reference's must be divided already.
    """
    dtype = torch.promote_types(torch.promote_types(chosen_logps.dtype, rejected_logps.dtype), torch.float32)
    if mean_chosen_length is None and chosen_lengths is not None:
        mean_chosen_length = chosen_lengths.to(dtype).sum().clamp(min=1) / chosen_lengths.numel()
    known = dict(zip(BOTH_LENGTHS + MEAN_LENGTH, (chosen_lengths, rejected_lengths, mean_chosen_length), strict=True))
    needed = {f"loss_type {name!r}": row.needs_lengths for name, row in zip(options.names, options.rows, strict=True)}
    if options.sft_weight != 0:
        needed["sft_weight"] = MEAN_LENGTH if options.sft_mean == "tokens" else BOTH_LENGTHS[:1]
    for who, arguments in needed.items():
        missing = [argument for argument in arguments if known[argument] is None]
        if missing:
            hint = "give [B] completion tokens (mean_chosen_length follows from chosen_lengths)"
            raise ValueError(f"{who} needs {', '.join(missing)}: {hint}")

    lengths = [None if n is None else n.to(dtype).clamp(min=1) for n in (chosen_lengths, rejected_lengths)]
    chosen, rejected = summed = chosen_logps.to(dtype), rejected_logps.to(dtype)
    if options.average_log_prob:
        chosen, rejected = (logps / n for logps, n in zip(summed, lengths, strict=True))
    ref_chosen = torch.zeros_like(chosen) if ref_chosen_logps is None else ref_chosen_logps.to(dtype)
    ref_rejected = torch.zeros_like(rejected) if ref_rejected_logps is None else ref_rejected_logps.to(dtype)
    logratios = chosen - ref_chosen, rejected - ref_rejected
    divergence = F_DIVERGENCES[options.f_divergence_type]
    scores = (divergence(logratio, options.f_alpha_divergence_coef) for logratio in logratios)
    terms = Terms(
        *(chosen, rejected, ref_chosen, ref_rejected, *logratios, *scores, *lengths, mean_chosen_length),
        beta=options.beta,
        label_smoothing=options.label_smoothing if label_smoothing is None else label_smoothing.to(dtype),
        discopop_tau=options.discopop_tau,
        simpo_gamma=options.simpo_gamma,
    )
    losses = sum(weight * row.formula(terms) for row, weight in zip(options.rows, options.weights, strict=True))
    if options.sft_weight != 0:
        per_token = mean_chosen_length if options.sft_mean == "tokens" else lengths[0]
        losses = losses - options.sft_weight * summed[0] / per_token
    if pair_weights is not None:
        losses = losses * pair_weights.to(dtype)
    rewarded = (terms.chosen_mean_logps, terms.rejected_mean_logps) if options.average_rewards else logratios
    rewards = (options.beta * value.detach() for value in rewarded)
    return PreferenceOutput(losses.mean(), losses, chosen, rejected, *rewards)


def loss_and_coefficients(
    options: LossOptions,
    logps: Tensor,
    lengths: Tensor,
    ref_logps: Tensor | None,
    pair_weights: Tensor | None = None,
    label_smoothing: Tensor | None = None,
    mean_chosen_length: Tensor | float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`objective` of [2B] summed log-probs: its loss, losses [B], coefficients `d loss / d logps` [2B], and the log-probs it read."""
    references = (None, None) if ref_logps is None else ref_logps.chunk(2)
    chosen, rejected = lengths.chunk(2)
    with autograd_inside_op():
        leaf = logps.detach().requires_grad_()
        out = objective(
            options,
            *leaf.chunk(2),
            *references,
            chosen_lengths=chosen,
            rejected_lengths=rejected,
            pair_weights=pair_weights,
            label_smoothing=label_smoothing,
            mean_chosen_length=mean_chosen_length,
        )
        (coefficients,) = torch.autograd.grad(out.loss, leaf)
    found = torch.cat([out.chosen_logps, out.rejected_logps]).detach()
    return out.loss.detach(), out.losses.detach(), coefficients, found


@contextlib.contextmanager
def autograd_inside_op():
    """Switch autograd on again inside an op, where the dispatcher switches it off and torch.func cannot run under a mode."""
    include, exclude = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    for name in ("AutogradFunctionality", "AutogradOther", "ADInplaceOrView"):
        exclude = exclude.remove(getattr(torch._C.DispatchKey, name))
    with torch._C._ForceDispatchKeyGuard(include, exclude), torch.enable_grad():
        yield

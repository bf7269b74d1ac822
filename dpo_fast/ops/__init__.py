"""The public ops: token log-probs and preference losses, from logits or from hidden states and the output layer.

    token_logps         logits in, a log-prob a token out
    sequence_logps      logits in, a log-prob a sequence out
    dpo_loss            logits in, loss and gradient in one pass
    linear_token_logps  hidden states in, a log-prob a token out; the [N, V] logits never exist
    linear_dpo_loss     hidden states in, loss and gradients in one pass

What is here: signatures, checks of shapes, and which op runs. The ops are torch.library ops (logits_ops.py, head.py)
that work under torch.compile(fullgraph=True); the rows are computed by a back end (backends/).

Every op takes `backend` (None: the fastest that is there) and `debug` (True: values are checked on a GPU too, which
waits for the device). On the CPU values are always checked. Rows whose target is `ignore_index` count nothing and their
gradient is 0. Padded batches of pairs hold 2B sequences, the B chosen first, then the B rejected in the same order;
packed ones are flat rows with `cu_seqlens`, int32 [2B + 1] from 0 to N, on the device of the rows or on the CPU.
"""

import dataclasses

import torch
from torch import Tensor

from ..backends.sequences import scored_lengths
from ..losses import LossOptions, PreferenceOutput, objective, require
from . import arguments, head
from . import logits as logits_ops
from .pairs import pack_loss
from .rows import row_period
from .tiles import WORKSPACE_BYTES
from .torch_library import unstacked, with_gradients

__all__ = [
    "WORKSPACE_BYTES",
    "dpo_loss",
    "linear_dpo_loss",
    "linear_token_logps",
    "sequence_logps",
    "token_logps",
]


def token_logps(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    outputs: tuple[str, ...] = (),
    backend: str | None = None,
    debug: bool = False,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """Log-prob of each target: `logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]`, 0 where ignored.

    logits [N, V] or [S, T, V], of any strides (a slice such as `logits[:, :-1]` is not copied), targets [N] or [S, T]
    int64. The logits are multiplied by `logit_scale`, soft-capped (`softcap * tanh(x / softcap)`) and divided by
    `temperature`, in that order. Returns the shape of targets in float32 (float64 for float64 logits), in nats; with
    `outputs`, also a dict of the named statistics, which carry no gradient: `entropy` (nats), `mean_logits` (over the
    vocabulary, before the temperature), `is_top1`, `log_sum_sq_probs`; 0 where ignored.

    Memory: the gradient, in the type and shape of logits, exists only once backward has run.
    Raises ValueError for shapes, types and devices that do not fit, and for a target outside [0, V).
    """
    arguments.check_logits(logits, targets)
    arguments.check_transform(logit_scale, softcap, temperature, outputs)
    options = ignore_index, float(logit_scale), softcap, float(temperature), ",".join(outputs), backend or "", debug
    logps, _, stats = logits_ops.token_logps(logits, targets, *options)
    return (logps, unstacked(stats, outputs)) if outputs else logps


def sequence_logps(
    logits: Tensor,
    targets: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    average: bool = False,
    ignore_index: int = -100,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    backend: str | None = None,
    debug: bool = False,
) -> Tensor:
    """Log-prob of each sequence: `token_logps(logits, targets).sum(-1)`, with `average` divided by its scored tokens.

    Padded logits [S, T, V] with targets [S, T], or packed [N, V] with [N] and `cu_seqlens` [S + 1]. Returns [S]; a
    sequence without a scored token has 0. The rest as in `token_logps`.
    """
    arguments.check_sequences(logits, "logits", cu_seqlens)
    transform = {"temperature": temperature, "softcap": softcap, "logit_scale": logit_scale}
    logps = token_logps(logits, targets, ignore_index=ignore_index, backend=backend, debug=debug, **transform)
    summed = _summed(logps, cu_seqlens, debug)
    return summed / _lengths(targets, cu_seqlens, ignore_index).clamp(min=1) if average else summed


def dpo_loss(
    logits: Tensor,
    targets: Tensor,
    ref_logps: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    loss_type: str | list[str] = LossOptions.loss_type,
    beta: float = LossOptions.beta,
    label_smoothing: float = LossOptions.label_smoothing,
    pair_weights: Tensor | None = None,
    mean_chosen_length: Tensor | float | None = None,
    ignore_index: int = -100,
    inplace: bool = False,
    backend: str | None = None,
    debug: bool = False,
    **options,
) -> PreferenceOutput:
    """The preference loss of a batch of logits and its gradient, in one pass over the logits. It equals

        logps = sequence_logps(logits, targets, cu_seqlens=cu_seqlens)
        preference_loss(*logps.chunk(2), *ref_logps.chunk(2), loss_type=loss_type, ...)

    Args:
        logits, targets: padded [2B, T, V] and [2B, T], or packed [N, V] and [N] with `cu_seqlens` [2B + 1].
        ref_logps: [2B], log-probs of the sequences under the reference; None: they count as zero.
        inplace: the gradient overwrites logits, which saves their size in memory; nothing else may need their values
            afterwards. Without a gradient to take (under no_grad) they stay as they are.
        loss_type, beta, label_smoothing, pair_weights, mean_chosen_length and the options f_divergence_type,
            f_alpha_divergence_coef, discopop_tau, simpo_gamma and loss_weights: as in `preference_loss`. Lengths are
            counted in targets.

    Only `loss` carries a gradient. It is computed in the forward pass (float16 without inplace: in backward, where the
    loss scale is known) and backward multiplies it in place: backward can run once.

    Raises ValueError for shapes, types, devices and options that do not fit.
    """
    arguments.check_logits(logits, targets)
    count = arguments.check_sequences(logits, "logits", cu_seqlens, pairs=True)
    options = _loss_options(loss_type, beta, label_smoothing, options)
    _check_pairs(options, ref_logps, pair_weights, mean_chosen_length, count, logits.device)
    ref_logps, pair_weights = _detached(ref_logps, pair_weights)
    batch = targets, cu_seqlens, ignore_index
    needs = torch.is_grad_enabled() and logits.requires_grad
    if inplace:
        fits = logits.stride(-1) == 1 and (logits.ndim == 2 or row_period(logits) == logits.shape[1])
        # Rows of an expanded tensor are one row.
        fits &= all(
            n <= 1 or step >= logits.shape[-1] for n, step in zip(logits.shape, logits.stride()[:-1], strict=False)
        )
        require(
            fits,
            f"inplace=True needs logits whose rows follow each other, got strides {logits.stride()}: use inplace=False",
        )
    if not needs or (logits.dtype == torch.float16 and not inplace):
        logps = sequence_logps(
            logits, targets, cu_seqlens=cu_seqlens, ignore_index=ignore_index, backend=backend, debug=debug
        )
        return _from_logps(logps, batch, ref_logps, pair_weights, mean_chosen_length, options)
    values = logits.detach()
    given = cu_seqlens, ref_logps, pair_weights, _as_tensor(mean_chosen_length, logits)
    settings = *pack_loss(options), ignore_index, backend or "", debug
    if inplace:
        loss, losses, logps = logits_ops.dpo_loss_(values, targets, *given, *settings)
        gradient = values
    else:
        loss, losses, logps, gradient = logits_ops.dpo_loss(values, targets, *given, *settings)
    loss = with_gradients(loss, [logits], [gradient], backend or "")
    return _output(loss, losses, logps, batch, ref_logps, options)


def linear_token_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    outputs: tuple[str, ...] = (),
    grad_rows: int | None = None,
    workspace_bytes: int = WORKSPACE_BYTES,
    backend: str | None = None,
    debug: bool = False,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """Log-prob of each target under a linear head: `F.linear(hidden, weight, bias).log_softmax(-1)[arange(N), targets]`.

    hidden [N, D], weight [V, D], targets [N] int64 (none ignored), bias [V]. `logit_scale`, `softcap`, `temperature`,
    `outputs` and what comes back are those of `token_logps`. `workspace_bytes` bounds what is kept for backward when
    the head is trained; past it logits are computed again. Only the first `grad_rows` rows (default: all) take part in
    the backward pass. Under autocast the head runs in autocast's type, as `nn.Linear` does.
    Raises ValueError for shapes that do not fit, an unknown output, a target outside [0, V), or `grad_rows` outside
    [0, N].
    """
    arguments.check_head(hidden, weight, bias)
    arguments.check_targets_like(targets, hidden, "hidden")
    arguments.check_transform(logit_scale, softcap, temperature, outputs)
    fits = grad_rows is None or 0 <= grad_rows <= len(targets)
    require(fits, f"grad_rows is {grad_rows}: give a number of rows in [0, {len(targets)}]")
    hidden, weight = _head_types(hidden, weight)
    trained = weight.requires_grad or (bias is not None and bias.requires_grad)
    keep = "residual" if trained else "dh" if hidden.requires_grad else ""
    transform = float(logit_scale), softcap, float(temperature)

    def score(hidden, targets, keep):
        settings = ",".join(outputs), keep, workspace_bytes, backend or "", debug
        return head.linear_token_logps(hidden, weight, targets, bias, *transform, *settings)[:2]

    if not torch.is_grad_enabled() or grad_rows is None or grad_rows == len(targets):
        logps, stats = score(hidden, targets, keep if torch.is_grad_enabled() else "")
    else:
        first = score(hidden[:grad_rows], targets[:grad_rows], keep)
        with torch.no_grad():
            rest = score(hidden[grad_rows:], targets[grad_rows:], "")
        logps, stats = (torch.cat(parts, -1) for parts in zip(first, rest, strict=True))
    return (logps, unstacked(stats, outputs)) if outputs else logps


def linear_dpo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ref_logps: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    loss_type: str | list[str] = LossOptions.loss_type,
    beta: float = LossOptions.beta,
    label_smoothing: float = LossOptions.label_smoothing,
    pair_weights: Tensor | None = None,
    mean_chosen_length: Tensor | float | None = None,
    ignore_index: int = -100,
    workspace_bytes: int = WORKSPACE_BYTES,
    backend: str | None = None,
    debug: bool = False,
    **options,
) -> PreferenceOutput:
    """`dpo_loss(F.linear(hidden, weight, bias), targets, ...)` that never holds the logits, with all its gradients.

    Args:
        hidden, targets: padded [2B, T, D] and [2B, T], or packed [N, D] and [N] with `cu_seqlens` [2B + 1]. On a GPU
            rows with an ignored target cost what the others cost: leave them out.
        weight, bias: [V, D] and [V]. Frozen: two GEMMs, any length. Trained: three where whole pairs fit
            `workspace_bytes`; a pair that does not fit has some of its logits computed again, and so have the rows past
            it where `cu_seqlens` is on a GPU (give it on the CPU: to read it would be a wait).
        logit_scale, softcap: as in `token_logps`. The rest as in `dpo_loss`.

    Only `loss` carries a gradient, computed in the forward pass; backward multiplies it in place and can run once. In
    float16, and for losses over the whole batch (aot, aot_unpaired), the gradient is that of `linear_token_logps`.

    Raises ValueError for shapes, types, devices and options that do not fit.
    """
    arguments.check_head(hidden, weight, bias, (2, 3))
    arguments.check_targets_like(targets, hidden, "hidden")
    count = arguments.check_sequences(hidden, "hidden", cu_seqlens, pairs=True)
    arguments.check_transform(logit_scale, softcap, 1.0)
    options = _loss_options(loss_type, beta, label_smoothing, options)
    _check_pairs(options, ref_logps, pair_weights, mean_chosen_length, count, hidden.device)
    ref_logps, pair_weights = _detached(ref_logps, pair_weights)
    batch = targets, cu_seqlens, ignore_index
    hidden, weight = _head_types(hidden, weight)
    needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    rows, flat, bounds = hidden, targets, cu_seqlens
    if cu_seqlens is None:
        rows, flat = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
        bounds = torch.arange(count + 1, dtype=torch.int32) * hidden.shape[1]
    if options.over_batch or not any(needs) or hidden.dtype == torch.float16:
        scored = flat != ignore_index
        transform = {"bias": bias, "logit_scale": logit_scale, "softcap": softcap, "workspace_bytes": workspace_bytes}
        safe = flat.masked_fill(~scored, 0)
        logps = linear_token_logps(rows, weight, safe, backend=backend, debug=debug, **transform)
        logps = torch.where(scored, logps, 0).view(targets.shape)
        logps = _summed(logps, cu_seqlens, debug)
        return _from_logps(logps, batch, ref_logps, pair_weights, mean_chosen_length, options)
    values = (None if x is None else x.detach() for x in (rows, weight, flat, bias))
    given = bounds, ref_logps, pair_weights, _as_tensor(mean_chosen_length, hidden)
    settings = *pack_loss(options), ignore_index, needs, workspace_bytes, backend or "", debug
    loss, losses, logps, *gradients = head.linear_dpo_loss(*values, *given, float(logit_scale), softcap, *settings)
    inputs = [x for x, need in zip((rows, weight, bias), needs, strict=True) if need]
    gradients = [x for x, need in zip(gradients, needs, strict=True) if need]
    loss = with_gradients(loss, inputs, gradients, backend or "")
    return _output(loss, losses, logps, batch, ref_logps, options)


# ---- What the ops share ----


def _loss_options(loss_type, beta: float, label_smoothing: float, others: dict) -> LossOptions:
    try:
        return LossOptions(loss_type, beta, label_smoothing, **others)
    except TypeError:
        known = [field.name for field in dataclasses.fields(LossOptions)]
        raise TypeError(
            f"{[n for n in others if n not in known]} are no options of a loss: {', '.join(known)}"
        ) from None


def _check_pairs(options: LossOptions, ref_logps, pair_weights, mean_chosen_length, count: int, device) -> None:
    options.check(pair_weights=pair_weights is not None)
    arguments.check_per_sequence("ref_logps", ref_logps, count, device)
    arguments.check_per_sequence("pair_weights", pair_weights, count // 2, device)
    number = mean_chosen_length is None or isinstance(mean_chosen_length, Tensor) or mean_chosen_length > 0
    require(number, f"mean_chosen_length is {mean_chosen_length}: give a number above 0")
    useless = ref_logps is not None and options.reference_free
    require(not useless, f"loss_type {options.loss_type!r} takes no ref_logps: leave them out")


def _detached(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.detach() for x in tensors]


def _as_tensor(number: Tensor | float | None, like: Tensor) -> Tensor | None:
    if number is None or isinstance(number, Tensor):
        return number
    return torch.full((), number, dtype=torch.float64, device=like.device)


def _head_types(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        return hidden.to(dtype), weight.to(dtype)
    same = hidden.dtype == weight.dtype
    require(same, f"hidden is {hidden.dtype} and weight is {weight.dtype}: cast one of them")
    return hidden, weight


def _summed(logps: Tensor, cu_seqlens: Tensor | None, debug: bool) -> Tensor:
    """Token log-probs [S, T] or [N] -> [S]."""
    return logps.sum(-1) if cu_seqlens is None else logits_ops.sequence_sums(logps, cu_seqlens, debug)


def _lengths(targets: Tensor, cu_seqlens: Tensor | None, ignore_index: int) -> Tensor:
    """Scored tokens of each sequence [S]."""
    cu_rows = None if cu_seqlens is None else cu_seqlens.to(targets.device, non_blocking=True)
    return scored_lengths(targets, ignore_index, cu_rows)


def _from_logps(logps, batch, ref_logps, pair_weights, mean_chosen_length, options) -> PreferenceOutput:
    """The loss of [2B] log-probs by way of autograd; only `loss` keeps its gradient, as elsewhere."""
    chosen, rejected = _lengths(*batch).chunk(2)
    lengths = {"chosen_lengths": chosen, "rejected_lengths": rejected, "mean_chosen_length": mean_chosen_length}
    references = (None, None) if ref_logps is None else ref_logps.chunk(2)
    out = objective(options, *logps.chunk(2), *references, pair_weights=pair_weights, **lengths)
    rest = out.chosen_logps, out.rejected_logps, out.chosen_rewards, out.rejected_rewards
    return PreferenceOutput(out.loss, out.losses.detach(), *rest)


def _output(loss, losses, logps, batch, ref_logps, options) -> PreferenceOutput:
    """Rewards as in `preference_loss`: beta * (logp - ref_logp), or beta * logp / length."""
    rewards = logps if ref_logps is None else logps - ref_logps.to(logps.dtype)
    if options.average_rewards:
        rewards = logps / _lengths(*batch).clamp(min=1)
    return PreferenceOutput(loss, losses, *logps.chunk(2), *(options.beta * rewards).chunk(2))

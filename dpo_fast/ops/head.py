"""The ops that hold the output layer, as torch.library ops. tiles.py says how they avoid the logits.

`_linear_token_logps` computes log-probs in forward and gradients in backward, when the coefficients are known.
`_linear_dpo_loss` computes both in forward, one group of whole pairs after the other, each as large as the workspace allows.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends import resolve
from ..backends.eager import rows_within, wide_dtype
from ..losses import check_label_smoothing
from .arguments import check_bounds, check_targets
from .pairs import PairBatch, unpack_loss
from .scored import in_place, scored_rows, whole_rows
from .tiles import GradientSums, OutputLayer, gradients, score, workspace_rows
from .torch_library import library_op, once_differentiable, split_names, unpack_numbers

# ---- Log-probs ----


@library_op("linear_token_logps")
def _linear_token_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    numbers: Tensor,
    ignore_index: int | None,
    outputs: str,
    keep: str,
    workspace_bytes: int,
    backend: str,
    debug: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probs [N], statistics [K, N], and what backward needs: `keep` is "dh" (a frozen head), "residual" or "".

    The kept tensors hold the computed rows first; nothing is written past those.
    """
    check_targets(targets, weight.shape[0], ignore_index, debug)
    layer, n = _output_layer(hidden, weight, bias, unpack_numbers(numbers), backend), hidden.shape[0]
    residual, dh = _kept(hidden, weight, keep, workspace_bytes)
    hidden, targets, *where = scored_rows(hidden, targets, ignore_index)
    live = hidden.shape[0]
    kept = residual[:live] if keep == "residual" else residual
    logps, stats = score(layer, hidden, targets, split_names(outputs), kept, dh[:live] if keep == "dh" else None)
    return in_place(logps, *where, n), in_place(stats, *where, n), residual, dh


def _kept(hidden: Tensor, weight: Tensor, keep: str, workspace_bytes: int) -> tuple[Tensor, Tensor]:
    n = hidden.shape[0]
    rows = rows_within(n, workspace_rows(weight, workspace_bytes)) if keep == "residual" else 0
    return hidden.new_empty(rows, weight.shape[0]), hidden.new_empty(n if keep == "dh" else 0, hidden.shape[1])


@_linear_token_logps.register_fake
def _(hidden, weight, targets, bias, numbers, ignore_index, outputs, keep, workspace_bytes, backend, debug):
    wide, n = wide_dtype(hidden.dtype), hidden.shape[0]
    stats = hidden.new_empty(len(split_names(outputs)), n, dtype=wide)
    return hidden.new_empty(n, dtype=wide), stats, *_kept(hidden, weight, keep, workspace_bytes)


def _output_layer(hidden, weight, bias, transform, backend) -> OutputLayer:
    names = dict(zip(("scale", "softcap", "temperature"), transform, strict=True))
    return OutputLayer(weight, bias, names, resolve(backend, hidden.device, hidden.dtype))


@library_op("linear_token_logps_backward")
def linear_token_logps_backward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    grad: Tensor,
    residual: Tensor,
    dh: Tensor,
    numbers: Tensor,
    ignore_index: int | None,
    needs: Sequence[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias where `needs` says so."""
    # The graph may be kept for another backward pass, and `residual` with it.
    return _gradients(
        hidden, weight, targets, bias, grad, residual, dh, numbers, ignore_index, needs, backend, spend=False
    )


def _gradients(hidden, weight, targets, bias, grad, residual, dh, numbers, ignore_index, needs, backend, spend):
    """As the op above; `spend`: `residual` may be overwritten."""
    n = hidden.shape[0]
    hidden, targets, rows, scored = scored_rows(hidden, targets, ignore_index)
    if scored is not None:
        grad = grad.masked_fill(~scored, 0)
    coef = (grad if rows is None else grad[rows])[:, None]
    if len(dh):
        found = torch.mul(dh[: len(coef)], coef, out=torch.empty_like(dh[: len(coef)]))
        return whole_rows(found, rows, n), hidden.new_empty(0), hidden.new_empty(0)
    residual = residual[: len(coef)]
    layer = _output_layer(hidden, weight, bias, unpack_numbers(numbers), backend)
    out = torch.empty_like(hidden, memory_format=torch.contiguous_format) if needs[0] else None
    several = residual.shape[0] < hidden.shape[0]
    # A peak below 1 would enlarge the coefficients that are divided by it, and so the sums that float16 has to hold.
    peak = coef.abs().amax().clamp(min=1.0) if hidden.dtype == torch.float16 and len(coef) else None
    sums = GradientSums(weight if needs[1] else None, bias if needs[2] else None, several, peak)
    gradients(layer, hidden, targets, coef, residual, out, sums, spend)
    return hidden.new_empty(0) if out is None else whole_rows(out, rows, n), *sums.results(hidden)


def _fake_gradients(hidden, weight, bias, needs):
    return tuple(
        like.new_empty(like.shape) if need else hidden.new_empty(0)
        for like, need in zip((hidden, weight, bias), needs, strict=True)
    )


@linear_token_logps_backward.register_fake
def _(hidden, weight, targets, bias, grad, residual, dh, numbers, ignore_index, needs, backend):
    return _fake_gradients(hidden, weight, bias, needs)


def _save(ctx, inputs, output):
    hidden, weight, targets, bias, numbers, ignore_index, _, _, _, backend, _ = inputs
    _, stats, residual, dh = output
    ctx.options = ignore_index, backend
    ctx.save_for_backward(hidden, weight, targets, bias, residual, dh, numbers)
    ctx.mark_non_differentiable(stats, residual, dh)
    ctx.set_materialize_grads(False)


@once_differentiable
def _backward(ctx, grad, *_):
    needs = [ctx.needs_input_grad[k] for k in (0, 1, 3)]
    if grad is None:
        return (None,) * 11
    hidden, weight, targets, bias, residual, dh, numbers = ctx.saved_tensors
    ignore_index, backend = ctx.options
    if getattr(ctx, "spent", False):
        residual = residual[:0]
    given = hidden, weight, targets, bias, grad, residual, dh, numbers, ignore_index, needs, backend
    if type(residual) is Tensor and 0 < len(residual) < len(hidden):
        # Rows past those kept are computed in the memory of those kept. A second backward pass computes all of them again.
        ctx.spent = True
        off = torch.autocast(hidden.device.type, enabled=False)
        with torch.no_grad(), off, torch.autograd._unsafe_preserve_version_counter(residual):
            found = _gradients(*given, spend=True)
    else:  # a graph is being made of it, or all rows are kept
        found = linear_token_logps_backward(*given)
    dh, dw, db = (x if need else None for x, need in zip(found, needs, strict=True))
    return dh, dw, None, db, *(None,) * 7


_linear_token_logps.register_autograd(_backward, setup_context=_save)


# ---- Loss and gradients ----


@library_op("linear_dpo_loss")
def _linear_dpo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor,
    ref_logps: Tensor | None,
    pair_weights: Tensor | None,
    label_smoothing: Tensor | None,
    mean_chosen_length: Tensor | None,
    numbers: Tensor,
    names: str,
    choices: str,
    ignore_index: int,
    outputs: str,
    needs: Sequence[bool],
    workspace_bytes: int,
    backend: str,
    debug: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, losses [B], log-probs [2B], statistics [K, N], and the gradients of hidden, weight and bias where `needs` says so.

    hidden [N, D] and targets [N] are packed. A pair's loss must not depend on other pairs beyond `mean_chosen_length`.
    """
    check_targets(targets, weight.shape[0], ignore_index, debug)
    check_bounds(cu_seqlens, hidden.shape[0], debug)
    (transform, ld_alpha, options), n = unpack_loss(numbers, names, choices), hidden.shape[0]
    if label_smoothing is not None and (debug or not label_smoothing.is_cuda):
        check_label_smoothing(label_smoothing, options)
    layer = _output_layer(hidden, weight, bias, transform, backend)
    given = targets
    hidden, targets, rows, scored = scored_rows(hidden, targets, ignore_index)
    if rows is None:
        targets = given
    else:
        cu_seqlens = torch.nn.functional.pad((given != ignore_index).cumsum(0), (1, 0))[cu_seqlens.long()]
        cu_seqlens = cu_seqlens.to(torch.int32)
    bounds = None if cu_seqlens.is_cuda else cu_seqlens.tolist()
    cu_rows = cu_seqlens.to(hidden.device, non_blocking=True)
    per_pair = ref_logps, pair_weights, label_smoothing, mean_chosen_length
    batch = PairBatch(options, targets, cu_rows, bounds, ignore_index, *per_pair, ld_alpha)

    dh = torch.empty_like(hidden, memory_format=torch.contiguous_format) if needs[0] else None
    wanted = split_names(outputs)
    if any(needs[1:]):
        groups = batch.groups(workspace_rows(weight, workspace_bytes))
        several = len(groups) > 1 or groups[0][2] < hidden.shape[0]
        sums = GradientSums(weight if needs[1] else None, bias if needs[2] else None, several)
        workspace = hidden.new_empty(max(kept for _, _, kept in groups), weight.shape[0])
        stats = hidden.new_empty(len(wanted), hidden.shape[0], dtype=wide_dtype(hidden.dtype))
        found = [_group(layer, hidden, batch, group, workspace, dh, sums, wanted, stats) for group in groups]
        losses, chosen, rejected = (torch.cat(parts) for parts in zip(*found, strict=True))
        logps = torch.cat([chosen, rejected])
    else:
        sums = GradientSums(None, None, False)
        token_logps, stats = score(layer, hidden, batch.safe, wanted, hidden.new_empty(0, weight.shape[0]), dh)
        losses, logps, coef = batch.losses(token_logps, 0, batch.count)
        if dh is not None:
            dh.mul_(coef)
    dh = hidden.new_empty(0) if dh is None else whole_rows(dh, rows, n)
    return losses.mean(), losses, logps, in_place(stats, rows, scored, n), dh, *sums.results(hidden)


@_linear_dpo_loss.register_fake
def _(
    hidden, weight, targets, bias, cu_seqlens, ref_logps, pair_weights, label_smoothing, mean_chosen_length,
    numbers, names, choices, ignore_index, outputs, needs, *_,
):  # fmt: skip
    wide, count = wide_dtype(hidden.dtype), cu_seqlens.shape[0] - 1
    losses = (hidden.new_empty(shape, dtype=wide) for shape in ((), (count // 2,), (count,)))
    stats = hidden.new_empty(len(split_names(outputs)), hidden.shape[0], dtype=wide)
    return *losses, stats, *_fake_gradients(hidden, weight, bias, needs)


def _group(
    layer: OutputLayer,
    hidden: Tensor,
    batch: PairBatch,
    group,
    workspace: Tensor,
    dh: Tensor | None,
    sums: GradientSums,
    outputs: tuple[str, ...],
    stats: Tensor,  # [K, N]
):
    """Losses, chosen and rejected log-probs of pairs [i, j); adds their gradients to `dh` and `sums`, statistics to `stats`."""
    i, j, kept = group
    parts = batch.slices(i, j)
    whole = len(parts) == 1
    h = hidden if whole else torch.cat([hidden[part] for part in parts])
    targets = batch.safe if whole else torch.cat([batch.safe[part] for part in parts])
    residual = workspace[:kept]
    token_logps, found = score(layer, h, targets, outputs, residual)
    losses, logps, coef = batch.losses(token_logps, i, j)
    own = dh if whole or dh is None else torch.empty_like(h)
    gradients(layer, h, targets, coef, residual, own, sums, spend=True)
    start = 0
    for part in parts:
        end = start + part.stop - part.start
        stats[:, part] = found[:, start:end]
        if own is not dh:
            dh[part] = own[start:end]
        start = end
    return losses, logps[: j - i], logps[j - i :]

"""The ops that hold the output layer, as torch.library ops. How the logits are avoided is in tiles.py.

`linear_token_logps` scores in forward and takes its gradients in backward, when the coefficients are known.
`linear_dpo_loss` does both in forward, one group of whole pairs after the other, each as large as the workspace allows.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends import resolve
from ..backends.eager import rows_within, wide_dtype
from .arguments import check_bounds, check_targets
from .pairs import PairBatch, unpack_loss
from .tiles import GradientSums, OutputLayer, gradients, score, workspace_rows
from .torch_library import library_op, split_names

# ---- Log-probs ----


@library_op("linear_token_logps")
def linear_token_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    temperature: float,
    outputs: str,
    keep: str,
    workspace_bytes: int,
    backend: str,
    debug: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probs [N], statistics [K, N], and what backward needs: `keep` is "dh" (a frozen head), "residual" or ""."""
    check_targets(targets, weight.shape[0], None, debug)
    layer = _output_layer(hidden, weight, bias, scale, softcap, temperature, backend)
    residual, dh = _kept(hidden, weight, keep, workspace_bytes)
    logps, stats = score(
        layer, hidden, targets.contiguous(), split_names(outputs), residual, dh if keep == "dh" else None
    )
    return logps, stats, residual, dh


def _kept(hidden: Tensor, weight: Tensor, keep: str, workspace_bytes: int) -> tuple[Tensor, Tensor]:
    n = hidden.shape[0]
    rows = rows_within(n, workspace_rows(weight, workspace_bytes)) if keep == "residual" else 0
    return hidden.new_empty(rows, weight.shape[0]), hidden.new_empty(n if keep == "dh" else 0, hidden.shape[1])


@linear_token_logps.register_fake
def _(hidden, weight, targets, bias, scale, softcap, temperature, outputs, keep, workspace_bytes, backend, debug):
    wide, n = wide_dtype(hidden.dtype), hidden.shape[0]
    stats = hidden.new_empty(len(split_names(outputs)), n, dtype=wide)
    return hidden.new_empty(n, dtype=wide), stats, *_kept(hidden, weight, keep, workspace_bytes)


def _output_layer(hidden, weight, bias, scale, softcap, temperature, backend) -> OutputLayer:
    transform = {"scale": scale, "softcap": softcap, "temperature": temperature}
    return OutputLayer(weight, bias, transform, resolve(backend, hidden.device, hidden.dtype))


@library_op("linear_token_logps_backward")
def linear_token_logps_backward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    grad: Tensor,
    residual: Tensor,
    dh: Tensor,
    scale: float,
    softcap: float | None,
    temperature: float,
    needs: Sequence[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias where `needs` says so."""
    coef = grad[:, None]
    if len(dh):
        return torch.mul(dh, coef, out=torch.empty_like(dh)), hidden.new_empty(0), hidden.new_empty(0)
    layer = _output_layer(hidden, weight, bias, scale, softcap, temperature, backend)
    out = torch.empty_like(hidden, memory_format=torch.contiguous_format) if needs[0] else hidden.new_empty(0)
    several = residual.shape[0] < hidden.shape[0]
    # Not below 1: the sum without it must not be larger than with it.
    peak = coef.abs().amax().clamp(min=1.0) if hidden.dtype == torch.float16 and len(coef) else None
    sums = GradientSums(weight if needs[1] else None, bias if needs[2] else None, several, peak)
    # The graph may be kept for another backward pass, and `residual` with it.
    gradients(layer, hidden, targets.contiguous(), coef, residual, out if needs[0] else None, sums, spend=False)
    return out, *sums.results(hidden)


def _fake_gradients(hidden, weight, bias, needs):
    return tuple(
        like.new_empty(like.shape) if need else hidden.new_empty(0)
        for like, need in zip((hidden, weight, bias), needs, strict=True)
    )


@linear_token_logps_backward.register_fake
def _(hidden, weight, targets, bias, grad, residual, dh, scale, softcap, temperature, needs, backend):
    return _fake_gradients(hidden, weight, bias, needs)


def _save(ctx, inputs, output):
    hidden, weight, targets, bias, scale, softcap, temperature, _, _, _, backend, _ = inputs
    _, stats, residual, dh = output
    ctx.options = (scale, softcap, temperature), backend
    ctx.save_for_backward(hidden, weight, targets, bias, residual, dh)
    ctx.mark_non_differentiable(stats, residual, dh)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, *_):
    needs = [ctx.needs_input_grad[k] for k in (0, 1, 3)]
    if grad is None:
        return (None,) * 12
    hidden, weight, targets, bias, residual, dh = ctx.saved_tensors
    transform, backend = ctx.options
    found = linear_token_logps_backward(hidden, weight, targets, bias, grad, residual, dh, *transform, needs, backend)
    dh, dw, db = (x if need else None for x, need in zip(found, needs, strict=True))
    return dh, dw, None, db, *(None,) * 8


linear_token_logps.register_autograd(_backward, setup_context=_save)


# ---- Loss and gradients ----


@library_op("linear_dpo_loss")
def linear_dpo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor,
    ref_logps: Tensor | None,
    pair_weights: Tensor | None,
    mean_chosen_length: Tensor | None,
    scale: float,
    softcap: float | None,
    names: str,
    divergence: str,
    numbers: Sequence[float],
    ignore_index: int,
    needs: Sequence[bool],
    workspace_bytes: int,
    backend: str,
    debug: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, losses [B], summed log-probs [2B], and the gradients of hidden, weight and bias where `needs` says so.

    hidden [N, D] and targets [N] packed. Losses whose pairs do not depend on each other beyond `mean_chosen_length`.
    """
    check_targets(targets, weight.shape[0], ignore_index, debug)
    check_bounds(cu_seqlens, hidden.shape[0], debug)
    layer = _output_layer(hidden, weight, bias, scale, softcap, 1.0, backend)
    rows, bounds = None, None
    if not hidden.is_cuda and targets.numel():
        # On a CPU a look is free: rows without a target drop out before the first product.
        scored = targets != ignore_index
        if not scored.all():
            rows = scored.nonzero()[:, 0]
            cu_seqlens = torch.nn.functional.pad(scored.cumsum(0), (1, 0))[cu_seqlens.long()].to(torch.int32)
            hidden, targets = hidden[rows], targets[rows]
    if not cu_seqlens.is_cuda:
        bounds = cu_seqlens.tolist()
    cu_rows = cu_seqlens.to(hidden.device, non_blocking=True)
    options = unpack_loss(names, divergence, numbers)
    batch = PairBatch(options, targets, cu_rows, bounds, ignore_index, ref_logps, pair_weights, mean_chosen_length)

    dh = torch.empty_like(hidden, memory_format=torch.contiguous_format) if needs[0] else None
    if any(needs[1:]):
        groups = batch.groups(workspace_rows(weight, workspace_bytes))
        several = len(groups) > 1 or groups[0][2] < hidden.shape[0]
        sums = GradientSums(weight if needs[1] else None, bias if needs[2] else None, several)
        workspace = hidden.new_empty(max(kept for _, _, kept in groups), weight.shape[0])
        found = [_group(layer, hidden, batch, group, workspace, dh, sums) for group in groups]
        losses, chosen, rejected = (torch.cat(parts) for parts in zip(*found, strict=True))
        logps = torch.cat([chosen, rejected])
    else:
        sums = GradientSums(None, None, False)
        token_logps, _ = score(layer, hidden, batch.safe, (), hidden.new_empty(0, weight.shape[0]), dh)
        losses, logps, coef = batch.losses(token_logps, 0, batch.count)
        if dh is not None:
            dh.mul_(coef)
    if dh is None:
        dh = hidden.new_empty(0)
    elif rows is not None:
        dh = hidden.new_zeros(len(scored), hidden.shape[1]).index_copy_(0, rows, dh)
    return losses.mean(), losses, logps, dh, *sums.results(hidden)


@linear_dpo_loss.register_fake
def _(
    hidden, weight, targets, bias, cu_seqlens, ref_logps, pair_weights, mean_chosen_length, scale, softcap,
    names, divergence, numbers, ignore_index, needs, workspace_bytes, backend, debug,
):  # fmt: skip
    wide, count = wide_dtype(hidden.dtype), len(cu_seqlens) - 1
    losses = (hidden.new_empty(shape, dtype=wide) for shape in ((), (count // 2,), (count,)))
    return *losses, *_fake_gradients(hidden, weight, bias, needs)


def _group(
    layer: OutputLayer,
    hidden: Tensor,
    batch: PairBatch,
    group,
    workspace: Tensor,
    dh: Tensor | None,
    sums: GradientSums,
):
    """Losses, chosen and rejected log-probs of pairs [i, j); their gradients go to `dh` and `sums`."""
    i, j, kept = group
    parts = batch.slices(i, j)
    whole = len(parts) == 1
    h = hidden if whole else torch.cat([hidden[part] for part in parts])
    targets = batch.safe if whole else torch.cat([batch.safe[part] for part in parts])
    residual = workspace[:kept]
    token_logps, _ = score(layer, h, targets, (), residual)
    losses, logps, coef = batch.losses(token_logps, i, j)
    own = dh if whole or dh is None else torch.empty_like(h)
    gradients(layer, h, targets, coef, residual, own, sums, spend=True)
    if own is not dh:
        start = 0
        for part in parts:
            size = part.stop - part.start
            dh[part] = own[start : start + size]
            start += size
    return losses, logps[: j - i], logps[j - i :]

"""The ops on logits that exist already, as torch.library ops: schema, fake implementation, autograd.

Only values are checked here. The public functions, their documentation and the other checks are in on_logits.py.
"""

import torch
from torch import Tensor

from ..backends import eager, resolve
from ..backends.eager import wide_dtype
from ..backends.sequences import segment_ids, segment_sum
from ..losses import check_label_smoothing
from .arguments import check_bounds, check_targets
from .pairs import unpack_loss
from .rows import empty_rows, flat_rows, row_period, unflatten, uniform_bounds
from .torch_library import library_op, once_differentiable, split_names, stacked, unpack_numbers

# ---- Log-probs ----


def _transform(numbers: Tensor) -> dict[str, float | None]:
    """What `pack_numbers` packed of the transform of the logits, as the launchers name it."""
    return dict(zip(("scale", "softcap", "temperature"), unpack_numbers(numbers), strict=True))


@library_op("token_logps")
def _token_logps(
    logits: Tensor,
    targets: Tensor,
    numbers: Tensor,
    ignore_index: int,
    outputs: str,
    backend: str,
    debug: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs, log-sum-exp and [K, ...] statistics in the shape of targets."""
    check_targets(targets, logits.shape[-1], ignore_index, debug)
    rows, flat = flat_rows(logits, targets, ignore_index)
    logps, lse, stats = resolve(backend, logits.device, logits.dtype).logps_fwd(
        rows, flat, ignore_index=ignore_index, outputs=split_names(outputs), **_transform(numbers)
    )
    return unflatten(logps, logits), unflatten(lse, logits), unflatten(stacked(stats, logps), logits)


@_token_logps.register_fake
def _(logits, targets, numbers, ignore_index, outputs, backend, debug):
    wide = wide_dtype(logits.dtype)
    shape = targets.shape
    stats = logits.new_empty(len(split_names(outputs)), *shape, dtype=wide)
    return logits.new_empty(shape, dtype=wide), logits.new_empty(shape, dtype=wide), stats


@library_op("token_logps_backward")
def token_logps_backward(
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    grad: Tensor,
    numbers: Tensor,
    ignore_index: int,
    backend: str,
) -> Tensor:
    """The gradient of logits, in their shape, from the log-sum-exp and the gradient of the log-probs."""
    rows, flat = flat_rows(logits, targets, ignore_index)
    launch = resolve(backend, logits.device, logits.dtype)
    out, shaped = empty_rows(logits, launch.new_empty)
    launch.logps_bwd(
        rows,
        flat,
        *(_flat_like(x.to(lse.dtype), logits) for x in (lse, grad)),
        ignore_index=ignore_index,
        out=out,
        **_transform(numbers),
    )
    return shaped


@token_logps_backward.register_fake
def _(logits, targets, lse, grad, numbers, ignore_index, backend):
    return empty_rows(logits)[1]


def _flat_like(x: Tensor, logits: Tensor) -> Tensor:
    """[S, T] -> [N] in the order of `flat_rows`, with zeros between sequences."""
    if logits.ndim == 2:
        return x.contiguous()
    sequences, length, _ = logits.shape
    period = row_period(logits) or length
    padded = torch.nn.functional.pad(x, (0, period - length)).reshape(-1)
    return padded[: max(0, (sequences - 1) * period + length)]


def _save(ctx, inputs, output):
    logits, targets, numbers, ignore_index, _, backend, _ = inputs
    _, lse, stats = output
    ctx.options = ignore_index, backend
    ctx.save_for_backward(logits, targets, lse, numbers)
    ctx.mark_non_differentiable(lse, stats)
    ctx.set_materialize_grads(False)


@once_differentiable
def _backward(ctx, grad, *_):
    none = (None,) * 6
    if grad is None or not ctx.needs_input_grad[0]:
        return None, *none
    logits, targets, lse, numbers = ctx.saved_tensors
    return token_logps_backward(logits, targets, lse, grad, numbers, *ctx.options), *none


_token_logps.register_autograd(_backward, setup_context=_save)


@library_op("sequence_sums")
def sequence_sums(values: Tensor, cu_seqlens: Tensor, debug: bool) -> Tensor:
    """`segment_sum` with a gradient and checked bounds: [N], [S + 1] -> [S]."""
    check_bounds(cu_seqlens, len(values), debug)
    return segment_sum(values, cu_seqlens.to(values.device, non_blocking=True))


@sequence_sums.register_fake
def _(values, cu_seqlens, debug):
    return values.new_empty(cu_seqlens.shape[0] - 1)


def _save_bounds(ctx, inputs, output):
    ctx.rows = inputs[0].shape[0]
    ctx.save_for_backward(inputs[1])


def _spread(ctx, grad):
    (cu_seqlens,) = ctx.saved_tensors
    return grad[segment_ids(cu_seqlens.to(grad.device, non_blocking=True), ctx.rows)], None, None


sequence_sums.register_autograd(_spread, setup_context=_save_bounds)


# ---- Loss and gradient ----


def _dpo(logits, targets, cu_seqlens, per_pair, loss, ignore_index, backend, debug, rows, out):
    """Loss, losses [B] and log-probs [2B]; writes the gradient of the loss to `out`."""
    (transform, ld_alpha, options), (ref_logps, pair_weights, label_smoothing, mean_chosen_length) = loss, per_pair
    if label_smoothing is not None and (debug or not label_smoothing.is_cuda):
        check_label_smoothing(label_smoothing, options)
    cu_rows, launch = _bounds(logits, cu_seqlens, debug), resolve(backend, logits.device, logits.dtype)
    pairs = (len(cu_rows) - 1) // 2
    common = {"ignore_index": ignore_index, "out": out}
    if ref_logps is not None:
        ref_logps = ref_logps.contiguous()
    plain = transform == [1.0, None, 1.0] and pair_weights is None and label_smoothing is None and ld_alpha is None
    if options.one_launch and plain:
        losses, logps, _ = launch.dpo_fused(
            rows,
            targets,
            cu_rows,
            ref_logps,
            1 / pairs,
            loss_type=options.names[0],
            beta=options.beta,
            label_smoothing=options.label_smoothing,
            discopop_tau=options.discopop_tau,
            simpo_gamma=options.simpo_gamma,
            **common,
        )
        return losses.mean(), losses, logps
    scale, softcap, temperature = transform
    return eager.dpo_two_launches(
        (launch.logps_fwd, launch.logps_bwd),
        rows,
        targets,
        cu_rows,
        ref_logps,
        1 / pairs,
        options=options,
        pair_weights=pair_weights,
        label_smoothing=label_smoothing,
        mean_chosen_length=mean_chosen_length,
        ld_alpha=ld_alpha,
        scale=scale,
        softcap=softcap,
        temperature=temperature,
        **common,
    )


def _bounds(logits: Tensor, cu_seqlens: Tensor | None, debug: bool) -> Tensor:
    if cu_seqlens is None:
        return uniform_bounds(logits)
    check_bounds(cu_seqlens, logits.shape[0], debug)
    return cu_seqlens.to(logits.device, non_blocking=True).contiguous()


@library_op("dpo_loss")
def _dpo_loss(
    logits: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor | None,
    ref_logps: Tensor | None,
    pair_weights: Tensor | None,
    label_smoothing: Tensor | None,
    mean_chosen_length: Tensor | None,
    numbers: Tensor,
    names: str,
    choices: str,
    ignore_index: int,
    backend: str,
    debug: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, losses [B], log-probs [2B], and the gradient of the loss in the shape of logits."""
    check_targets(targets, logits.shape[-1], ignore_index, debug)
    rows, flat = flat_rows(logits, targets, ignore_index)
    out, shaped = empty_rows(logits, resolve(backend, logits.device, logits.dtype).new_empty)
    per_pair = ref_logps, pair_weights, label_smoothing, mean_chosen_length
    how = unpack_loss(numbers, names, choices), ignore_index, backend, debug
    return *_dpo(logits, flat, cu_seqlens, per_pair, *how, rows, out), shaped


def _fake_losses(logits, cu_seqlens):
    wide, count = wide_dtype(logits.dtype), logits.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return tuple(logits.new_empty(shape, dtype=wide) for shape in ((), (count // 2,), (count,)))


@_dpo_loss.register_fake
def _(logits, targets, cu_seqlens, *_):
    return *_fake_losses(logits, cu_seqlens), empty_rows(logits)[1]


@library_op("dpo_loss_", mutates=("logits",))
def dpo_loss_(
    logits: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor | None,
    ref_logps: Tensor | None,
    pair_weights: Tensor | None,
    label_smoothing: Tensor | None,
    mean_chosen_length: Tensor | None,
    numbers: Tensor,
    names: str,
    choices: str,
    ignore_index: int,
    backend: str,
    debug: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `dpo_loss`; the gradient overwrites logits."""
    check_targets(targets, logits.shape[-1], ignore_index, debug)
    rows, flat = flat_rows(logits, targets, ignore_index)
    assert rows.data_ptr() == logits.data_ptr()
    per_pair = ref_logps, pair_weights, label_smoothing, mean_chosen_length
    how = unpack_loss(numbers, names, choices), ignore_index, backend, debug
    return _dpo(logits, flat, cu_seqlens, per_pair, *how, rows, rows)


@dpo_loss_.register_fake
def _(logits, targets, cu_seqlens, *_):
    return _fake_losses(logits, cu_seqlens)

"""The public ops on hidden states and an output layer: signatures, checks, and which library op (head.py) runs."""

import torch
import torch.distributed as dist
from torch import Tensor

from ..losses import LossOptions, PreferenceOutput, require
from . import arguments
from . import head as library
from .pair_inputs import (
    output_of_token_logps,
    output_with_gradients,
    pair_inputs,
    sequence_lengths,
    sum_sequences,
    with_reference,
)
from .tiles import WORKSPACE_BYTES
from .torch_library import pack_numbers, unstacked
from .vocab_parallel import local_head, vocab_parallel_token_logps


def linear_token_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int | None = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    outputs: tuple[str, ...] = (),
    grad_rows: int | None = None,
    workspace_bytes: int = WORKSPACE_BYTES,
    process_group: "dist.ProcessGroup | None" = None,
    vocab_size: int | None = None,
    backend: str | None = None,
    debug: bool = False,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """The log-prob of each target under a linear head, 0 where ignored:

        F.linear(hidden, weight, bias).log_softmax(-1).gather(-1, targets[..., None])[..., 0]

    hidden is [N, D] or [S, T, D], weight [V, D], targets [N] or [S, T] int64, bias [V]. `logit_scale`, `softcap`,
    `temperature`, `outputs` and the results are those of `token_logps`. Rows with an ignored target drop out on the
    CPU; on a GPU, where counting them would wait for the device, they cost as much as the others. `ignore_index=None`
    says that there are none. `workspace_bytes` bounds the residual that is kept for backward when the head is trained;
    the logits of the rows past it are computed again. Only the first `grad_rows` of the N (or S * T) rows (default: all)
    take part in the backward pass. Under autocast the head runs in autocast's type, as `nn.Linear` does. A frozen head
    may be a DTensor.

    With `process_group` the vocabulary is cut over its ranks, as `torch.chunk(weight, p)` cuts it: `weight` and `bias` are
    this rank's rows [V / p, D] and [V / p], hidden and targets (words of the whole vocabulary) are the same on every rank,
    and so are the log-probs and the gradient of hidden. `vocab_size` is V where p does not divide it. A DTensor weight
    that is sharded on its rows over a mesh called "tp" needs neither.

    Raises ValueError for shapes that do not fit, an unknown output, a target outside [0, V), or `grad_rows` outside
    [0, N].
    """
    hidden, weight, bias, shard = local_head(hidden, weight, bias, process_group, vocab_size)
    arguments.check_head(hidden, weight, bias)
    arguments.check_targets_like(targets, hidden, "hidden")
    arguments.check_transform(logit_scale, softcap, temperature, outputs)
    n = targets.numel()
    fits = grad_rows is None or 0 <= grad_rows <= n
    require(fits, lambda: f"grad_rows is {grad_rows}: give a number of rows in [0, {n}]")
    hidden, weight = _head_types(hidden, weight)
    trained = weight.requires_grad or (bias is not None and bias.requires_grad)
    keep = "residual" if trained else "dh" if hidden.requires_grad else ""
    keep = keep if torch.is_grad_enabled() else ""
    settings = pack_numbers(logit_scale, softcap, temperature), ignore_index, ",".join(outputs)
    limits = workspace_bytes, backend or "", debug

    def score(hidden, targets, keep):
        if shard is not None:
            transform = {"scale": float(logit_scale), "softcap": softcap, "temperature": float(temperature)}
            head = hidden, weight, targets, bias, shard, transform
            return vocab_parallel_token_logps(*head, ignore_index, tuple(outputs), *limits)
        return library._linear_token_logps(hidden, weight, targets, bias, *settings, keep, *limits)[:2]

    rows, flat = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    if not keep or grad_rows is None or grad_rows == n:
        logps, stats = score(rows, flat, keep)
    else:
        first = score(rows[:grad_rows], flat[:grad_rows], keep)
        with torch.no_grad():
            rest = score(rows[grad_rows:], flat[grad_rows:], "")
        logps, stats = (torch.cat(parts, -1) for parts in zip(first, rest, strict=True))
    logps = logps.view(targets.shape)
    return (logps, _unstacked(stats, outputs, targets)) if outputs else logps


def linear_sequence_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    bias: Tensor | None = None,
    average: bool = False,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    outputs: tuple[str, ...] = (),
    workspace_bytes: int = WORKSPACE_BYTES,
    process_group: "dist.ProcessGroup | None" = None,
    vocab_size: int | None = None,
    backend: str | None = None,
    debug: bool = False,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """The log-prob of each sequence under a linear head: `sequence_logps(F.linear(hidden, weight, bias), targets, ...)`.

    hidden is padded [S, T, D] with targets [S, T], or packed [N, D] with [N] and `cu_seqlens` [S + 1]. Returns [S], with
    `average` divided by the number of scored tokens (0 for a sequence without one); with `outputs`, also a dict of the
    named statistics per token, in the shape of targets. The other arguments are those of `linear_token_logps`.
    """
    arguments.check_sequences(hidden, "hidden", cu_seqlens)
    found = linear_token_logps(
        hidden,
        weight,
        targets,
        bias=bias,
        ignore_index=ignore_index,
        logit_scale=logit_scale,
        softcap=softcap,
        temperature=temperature,
        outputs=outputs,
        workspace_bytes=workspace_bytes,
        process_group=process_group,
        vocab_size=vocab_size,
        backend=backend,
        debug=debug,
    )
    logps, stats = found if outputs else (found, None)
    summed = sum_sequences(logps, cu_seqlens, debug)
    if average:
        summed = summed / sequence_lengths(targets, cu_seqlens, ignore_index).clamp(min=1)
    return (summed, stats) if outputs else summed


def linear_dpo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ref_logps: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    bias: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    loss_type: str | list[str] = LossOptions.loss_type,
    beta: float = LossOptions.beta,
    label_smoothing: float | Tensor = LossOptions.label_smoothing,
    pair_weights: Tensor | None = None,
    mean_chosen_length: Tensor | float | None = None,
    ld_alpha: float | None = None,
    ignore_index: int = -100,
    outputs: tuple[str, ...] = (),
    workspace_bytes: int = WORKSPACE_BYTES,
    process_group: "dist.ProcessGroup | None" = None,
    vocab_size: int | None = None,
    backend: str | None = None,
    debug: bool = False,
    **options,
) -> PreferenceOutput | tuple[PreferenceOutput, dict[str, Tensor]]:
    """`dpo_loss(F.linear(hidden, weight, bias), targets, ...)` that never holds the logits, with all its gradients.

    Args:
        hidden, targets: padded [2B, T, D] and [2B, T], or packed [N, D] and [N] with `cu_seqlens` [2B + 1]. On a GPU
            rows with an ignored target cost as much as the others: leave them out.
        weight, bias: [V, D] and [V]. A frozen head takes two GEMMs, whatever the length. A trained one takes three
            where whole pairs fit `workspace_bytes`. A pair that does not fit has some of its logits computed again, and
            so do all rows past the workspace where `cu_seqlens` is on a GPU: give it on the CPU, since reading it would
            wait for the device.
        ref_hidden, ref_weight, ref_bias: the reference's hidden states [..., D'], of the same rows as hidden, and its
            head, instead of `ref_logps`; they get no gradient.
        process_group, vocab_size: as in `linear_token_logps`, with the heads of policy and reference cut alike. Backward
            is that of `linear_token_logps` then.
        logit_scale, softcap, temperature, outputs: as in `token_logps`. With `outputs` the function returns a tuple: the
            `PreferenceOutput` and a dict of statistics per token in the shape of targets.

    The other arguments are those of `dpo_loss`. Only `loss` carries a gradient, which is computed in the forward pass;
    backward multiplies it in place and can run once. In float16, and for losses over the whole batch (aot,
    aot_unpaired), backward is that of `linear_token_logps`.

    Raises ValueError for shapes, types, devices and options that do not fit.
    """
    hidden, weight, bias, shard = local_head(hidden, weight, bias, process_group, vocab_size)
    arguments.check_head(hidden, weight, bias)
    arguments.check_targets_like(targets, hidden, "hidden")
    count = arguments.check_sequences(hidden, "hidden", cu_seqlens, pairs=True)
    arguments.check_transform(logit_scale, softcap, temperature, outputs)
    if shard is None:
        ref_hidden, ref_weight, ref_bias = _local(ref_hidden, ref_weight, ref_bias, "ref_")
    _check_reference(hidden, ref_logps, ref_hidden, ref_weight, ref_bias)
    batch, transform = (targets, cu_seqlens, ignore_index), (logit_scale, softcap, temperature)
    limits = {"workspace_bytes": workspace_bytes, "backend": backend, "debug": debug}
    common = dict(zip(("logit_scale", "softcap", "temperature"), transform, strict=True)) | limits
    cut = {} if shard is None else {"process_group": shard.group, "vocab_size": shard.words}

    inputs = pair_inputs(
        hidden,
        count,
        batch,
        loss_type=loss_type,
        beta=beta,
        label_smoothing=label_smoothing,
        ref_logps=ref_logps,
        pair_weights=pair_weights,
        mean_chosen_length=mean_chosen_length,
        ld_alpha=ld_alpha,
        others=options,
    )
    if ref_hidden is not None:
        require(
            not inputs.options.reference_free,
            lambda: f"loss_type {inputs.options.loss_type!r} takes no ref_hidden: leave it out",
        )
        with torch.no_grad():
            found = linear_token_logps(
                ref_hidden, ref_weight, targets, bias=ref_bias, ignore_index=ignore_index, **common, **cut
            )
            inputs = with_reference(inputs, found, debug)
    hidden, weight = _head_types(hidden, weight)
    needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    if shard is not None or inputs.options.over_batch or not any(needs) or hidden.dtype == torch.float16:
        found = linear_token_logps(
            hidden, weight, targets, bias=bias, ignore_index=ignore_index, outputs=outputs, **common, **cut
        )
        logps, stats = found if outputs else (found, None)
        out = output_of_token_logps(inputs, logps, debug)
        return (out, stats) if outputs else out
    rows, flat, bounds = hidden, targets, cu_seqlens
    if cu_seqlens is None:
        rows, flat = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
        bounds = torch.arange(count + 1, dtype=torch.int32, device="cpu") * hidden.shape[1]
    values = (None if x is None else x.detach() for x in (rows, weight, flat, bias))
    settings = *inputs.tensors, *inputs.loss(transform), ",".join(outputs), needs
    *found, stats, dh, dw, db = library._linear_dpo_loss(
        *values, bounds, *settings, workspace_bytes, backend or "", debug
    )
    leaves, gradients = zip(
        *((x, g) for x, g, need in zip((rows, weight, bias), (dh, dw, db), needs, strict=True) if need), strict=True
    )
    out = output_with_gradients(inputs, found, list(leaves), list(gradients), backend or "")
    return (out, _unstacked(stats, outputs, targets)) if outputs else out


def _local(
    hidden: Tensor | None, weight: Tensor | None, bias: Tensor | None, of: str = ""
) -> tuple[Tensor | None, ...]:
    names = {"hidden": hidden, "weight": weight, "bias": bias}
    return tuple(arguments.local(of + name, x) for name, x in names.items())


def _check_reference(hidden, ref_logps, ref_hidden, ref_weight, ref_bias) -> None:
    if ref_hidden is None:
        alone = ref_weight is None and ref_bias is None
        require(alone, lambda: "ref_weight and ref_bias have no effect without ref_hidden: give it too")
        return
    require(ref_logps is None, lambda: "ref_logps and ref_hidden are both given: give one of them")
    require(ref_weight is not None, lambda: "ref_hidden is given without ref_weight: give the reference's head")
    require(
        ref_hidden.shape[:-1] == hidden.shape[:-1],
        lambda: f"ref_hidden must have the rows of hidden, {list(hidden.shape[:-1])}, got {list(ref_hidden.shape)}",
    )


def _head_types(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        return hidden.to(dtype), weight.to(dtype)
    same = hidden.dtype == weight.dtype
    require(same, lambda: f"hidden is {hidden.dtype} and weight is {weight.dtype}: cast one of them")
    return hidden, weight


def _unstacked(stats: Tensor, outputs: tuple[str, ...], targets: Tensor) -> dict[str, Tensor]:
    """Statistics [K, N] by name, each in the shape of targets."""
    return {name: x.view(targets.shape) for name, x in unstacked(stats, outputs).items()}

"""The public ops on logits that exist already: signatures, checks, and which library op (logits.py) runs."""

import torch
from torch import Tensor

from ..losses import LossOptions, PreferenceOutput, require
from . import arguments
from . import logits as library
from .pair_inputs import output_of_token_logps, output_with_gradients, pair_inputs, sequence_lengths, sum_sequences
from .rows import row_period
from .torch_library import pack_numbers, unstacked


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
    """The log-prob of each target: `logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]`, 0 where ignored.

    logits are [N, V] or [S, T, V] of any strides (a slice such as `logits[:, :-1]` is not copied), targets [N] or [S, T]
    int64. The logits are multiplied by `logit_scale`, soft-capped (`softcap * tanh(x / softcap)`) and divided by
    `temperature`, in that order. Returns nats in the shape of targets, in float32 (float64 for float64 logits). With
    `outputs`, also returns a dict of the named statistics, which carry no gradient and are 0 where ignored: `entropy`
    (nats), `mean_logits` (over the vocabulary, before the temperature), `is_top1`, `log_sum_sq_probs`.

    Memory: the gradient, in the type and shape of logits, exists only once backward has run.
    Raises ValueError for shapes, types and devices that do not fit, and for a target outside [0, V).
    """
    logits = arguments.local("logits", logits)
    arguments.check_logits(logits, targets)
    arguments.check_transform(logit_scale, softcap, temperature, outputs)
    numbers = pack_numbers(logit_scale, softcap, temperature)
    options = numbers, ignore_index, ",".join(outputs), backend or "", debug
    logps, _, stats = library._token_logps(logits, targets, *options)
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
    """The log-prob of each sequence: `token_logps(logits, targets).sum(-1)`, with `average` divided by its scored tokens.

    logits are padded [S, T, V] with targets [S, T], or packed [N, V] with [N] and `cu_seqlens` [S + 1]. Returns [S]; a
    sequence without a scored token has 0. The other arguments are those of `token_logps`.
    """
    arguments.check_sequences(logits, "logits", cu_seqlens)
    transform = {"temperature": temperature, "softcap": softcap, "logit_scale": logit_scale}
    logps = token_logps(logits, targets, ignore_index=ignore_index, backend=backend, debug=debug, **transform)
    summed = sum_sequences(logps, cu_seqlens, debug)
    return summed / sequence_lengths(targets, cu_seqlens, ignore_index).clamp(min=1) if average else summed


def dpo_loss(
    logits: Tensor,
    targets: Tensor,
    ref_logps: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
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
    inplace: bool = False,
    backend: str | None = None,
    debug: bool = False,
    **options,
) -> PreferenceOutput:
    """The preference loss of a batch of logits and its gradient, in one pass over the logits. It equals

        logps = sequence_logps(logits, targets, cu_seqlens=cu_seqlens, average=average_log_prob)
        preference_loss(*logps.chunk(2), *ref_logps.chunk(2), loss_type=loss_type, ...)

    Args:
        logits, targets: padded [2B, T, V] and [2B, T], or packed [N, V] and [N] with `cu_seqlens` [2B + 1].
        ref_logps: [2B], log-probs of the sequences under the reference, computed in the same way. If None, they count
            as zero.
        logit_scale, softcap, temperature: as in `token_logps`.
        inplace: the gradient overwrites logits, which saves their size in memory; nothing else may need their values
            afterwards. Where no gradient is taken (under no_grad) logits stay as they are.
        loss_type, beta, label_smoothing (a number or [B]), pair_weights, mean_chosen_length and the options
            f_divergence_type, f_alpha_divergence_coef, discopop_tau, simpo_gamma, loss_weights, sft_weight and sft_mean:
            as in `preference_loss`. Lengths are counted in targets.
        average_log_prob: True divides each sequence's log-prob by its scored tokens, for losses that do not divide
            themselves (the sft term keeps its own mean).
        ld_alpha: in [0, 1], the weight of tokens past the shorter length of a pair (LD-DPO, arXiv 2409.06411);
            `ref_logps` must be computed with the same weight.

    Only `loss` carries a gradient. It is computed in the forward pass, and backward multiplies it in place, so backward
    can run once; backward through losses, chosen_logps or rejected_logps is an error. float16 without inplace is the
    exception: there autograd differentiates in backward, where the loss scale is known, and every output is exact.

    One launch computes a loss of `loss_table.FUSED` alone. With a transform of the logits, pair_weights, a label_smoothing
    per pair, ld_alpha, a divergence, sft_weight or average_log_prob there are two launches, which move as many bytes.

    Raises ValueError for shapes, types, devices and options that do not fit.
    """
    logits = arguments.local("logits", logits)
    arguments.check_logits(logits, targets)
    arguments.check_transform(logit_scale, softcap, temperature)
    count = arguments.check_sequences(logits, "logits", cu_seqlens, pairs=True)
    inputs = pair_inputs(
        logits,
        count,
        (targets, cu_seqlens, ignore_index),
        loss_type=loss_type,
        beta=beta,
        label_smoothing=label_smoothing,
        ref_logps=ref_logps,
        pair_weights=pair_weights,
        mean_chosen_length=mean_chosen_length,
        ld_alpha=ld_alpha,
        others=options,
    )
    if inplace:
        _check_inplace(logits)
    transform = logit_scale, softcap, temperature
    needs = torch.is_grad_enabled() and logits.requires_grad
    if not needs or (logits.dtype == torch.float16 and not inplace):
        scale, cap, heat = transform
        logps = token_logps(
            logits,
            targets,
            logit_scale=scale,
            softcap=cap,
            temperature=heat,
            ignore_index=ignore_index,
            backend=backend,
            debug=debug,
        )
        return output_of_token_logps(inputs, logps, debug)
    values = logits.detach()
    given = *inputs.tensors, *inputs.loss(transform), backend or "", debug
    if inplace:
        found, gradient = library.dpo_loss_(values, targets, cu_seqlens, *given), values
    else:
        *found, gradient = library._dpo_loss(values, targets, cu_seqlens, *given)
    return output_with_gradients(inputs, found, [logits], [gradient], backend or "")


def _check_inplace(logits: Tensor) -> None:
    fits = logits.stride(-1) == 1 and (logits.ndim == 2 or row_period(logits) == logits.shape[1])
    # All rows of an expanded tensor are the same memory.
    fits &= all(n <= 1 or step >= logits.shape[-1] for n, step in zip(logits.shape, logits.stride()[:-1], strict=False))
    require(
        fits,
        lambda: (
            f"inplace=True needs logits whose rows follow each other, got strides {logits.stride()}. Of a slice such "
            "as logits[:, :-1], give the whole: dpo_loss(logits, F.pad(labels[:, 1:], (0, 1), value=ignore_index), "
            "inplace=True) scores the same tokens. Or use inplace=False"
        ),
    )

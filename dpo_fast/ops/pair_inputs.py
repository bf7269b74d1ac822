"""What dpo_loss and linear_dpo_loss share: the checks of their inputs per pair, and their results."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends.sequences import past_shorter_weights, scored_lengths
from ..losses import LossOptions, PreferenceOutput, check_label_smoothing, objective, require
from . import arguments
from .logits import sequence_sums
from .pairs import pack_loss
from .torch_library import with_gradients

_OPTIONS = tuple(field.name for field in dataclasses.fields(LossOptions))


@dataclasses.dataclass
class PairInputs:
    """All inputs of the loss of a batch of pairs except its log-probs; tensors are detached."""

    options: LossOptions
    ref_logps: Tensor | None  # [2B]
    pair_weights: Tensor | None  # [B]
    label_smoothing: Tensor | None  # [B]; None: the number in `options`
    mean_chosen_length: Tensor | None  # scalar
    ld_alpha: float | None
    targets: Tensor  # [2B, T], or [N] with cu_seqlens
    cu_seqlens: Tensor | None  # [2B + 1]
    ignore_index: int

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The tensors that the library ops take, in their order."""
        return self.ref_logps, self.pair_weights, self.label_smoothing, self.mean_chosen_length

    def loss(self, transform: tuple[float, float | None, float]) -> tuple:
        """What the library ops take after `tensors`; `transform` is scale, soft-cap and temperature of the logits."""
        return *pack_loss(transform, self.ld_alpha, self.options), self.ignore_index

    @property
    def lengths(self) -> Tensor:
        """The number of scored tokens of each sequence [2B]."""
        return sequence_lengths(self.targets, self.cu_seqlens, self.ignore_index)


def pair_inputs(
    rows: Tensor,
    count: int,
    batch: tuple[Tensor, Tensor | None, int],
    *,
    loss_type: str | Sequence[str],
    beta: float,
    label_smoothing: float | Tensor,
    ref_logps: Tensor | None,
    pair_weights: Tensor | None,
    mean_chosen_length: Tensor | float | None,
    ld_alpha: float | None,
    others: dict,
) -> PairInputs:
    """Check and gather the inputs of the loss of `count` sequences; `batch` is targets, cu_seqlens, ignore_index."""
    soft = label_smoothing if isinstance(label_smoothing, Tensor) else None
    unknown = [name for name in others if name not in _OPTIONS]
    if unknown:
        raise TypeError(f"{unknown} are no options of a loss: {', '.join(_OPTIONS)}")
    smoothing = LossOptions.label_smoothing if soft is not None else label_smoothing
    options = LossOptions(loss_type, beta, smoothing, **others)
    options.check(pair_weights=pair_weights is not None, ld_alpha=ld_alpha, soft_labels=soft is not None)
    arguments.check_per_sequence("ref_logps", ref_logps, count, rows.device)
    arguments.check_per_sequence("pair_weights", pair_weights, count // 2, rows.device)
    arguments.check_per_sequence("label_smoothing", soft, count // 2, rows.device)
    if isinstance(mean_chosen_length, int | float):
        require(mean_chosen_length > 0, lambda: f"mean_chosen_length is {mean_chosen_length}: give a number above 0")
        # Not torch.full, which torch.compile would compile again for each value.
        mean_chosen_length = torch.ones((), dtype=torch.float64, device=rows.device) * mean_chosen_length
    useless = ref_logps is not None and options.reference_free
    require(not useless, lambda: f"loss_type {options.loss_type!r} takes no ref_logps: leave them out")
    tensors = (None if x is None else x.detach() for x in (ref_logps, pair_weights, soft))
    return PairInputs(options, *tensors, mean_chosen_length, ld_alpha, *batch)


def sum_sequences(token_logps: Tensor, cu_seqlens: Tensor | None, debug: bool) -> Tensor:
    """Token log-probs [S, T], or [N] with cu_seqlens, -> [S], summed in float64 as in the losses."""
    if cu_seqlens is None:
        return token_logps.sum(-1, dtype=torch.float64).to(token_logps.dtype)
    return sequence_sums(token_logps, cu_seqlens, debug)


def sequence_lengths(targets: Tensor, cu_seqlens: Tensor | None, ignore_index: int) -> Tensor:
    """The number of scored tokens of each sequence [S]."""
    cu_rows = None if cu_seqlens is None else cu_seqlens.to(targets.device, non_blocking=True)
    return scored_lengths(targets, ignore_index, cu_rows)


def _ld_weights(inputs: PairInputs) -> Tensor:
    """The weight that `ld_alpha` gives to each token, in the shape of targets."""
    targets, cu_rows = inputs.targets, inputs.cu_seqlens
    if cu_rows is None:
        cu_rows = torch.arange(targets.shape[0] + 1, device=targets.device) * targets.shape[1]
    scored = targets.reshape(-1) != inputs.ignore_index
    weights = past_shorter_weights(scored, cu_rows.to(targets.device, non_blocking=True), inputs.ld_alpha)
    return weights.view(targets.shape)


def weighted_sums(inputs: PairInputs, token_logps: Tensor, debug: bool) -> Tensor:
    """Token log-probs [2B, T] or [N] -> [2B], summed with the weights of `ld_alpha`."""
    if inputs.ld_alpha is not None:
        token_logps = token_logps * _ld_weights(inputs).to(token_logps.dtype)
    return sum_sequences(token_logps, inputs.cu_seqlens, debug)


def with_reference(inputs: PairInputs, token_logps: Tensor, debug: bool) -> PairInputs:
    """`inputs` with the reference's token log-probs summed (or averaged) as the policy's are."""
    ref_logps = weighted_sums(inputs, token_logps, debug)
    if inputs.options.average_log_prob:
        ref_logps = ref_logps / inputs.lengths.clamp(min=1)
    return dataclasses.replace(inputs, ref_logps=ref_logps)


def output_of_token_logps(inputs: PairInputs, token_logps: Tensor, debug: bool) -> PreferenceOutput:
    """The loss of [2B, T] or [N] token log-probs, differentiated by autograd."""
    soft = inputs.label_smoothing
    # Reading a value would break a compiled graph.
    if soft is not None and (debug or not soft.is_cuda) and not torch.compiler.is_compiling():
        check_label_smoothing(soft, inputs.options)
    logps = weighted_sums(inputs, token_logps, debug)
    chosen, rejected = inputs.lengths.chunk(2)
    references = (None, None) if inputs.ref_logps is None else inputs.ref_logps.chunk(2)
    return objective(
        inputs.options,
        *logps.chunk(2),
        *references,
        chosen_lengths=chosen,
        rejected_lengths=rejected,
        pair_weights=inputs.pair_weights,
        label_smoothing=inputs.label_smoothing,
        mean_chosen_length=inputs.mean_chosen_length,
    )


def output_with_gradients(
    inputs: PairInputs,
    found: tuple[Tensor, Tensor, Tensor],
    leaves: list[Tensor],
    gradients: list[Tensor],
    backend: str,
) -> PreferenceOutput:
    """The output of an op that computed loss, losses [B], log-probs [2B] (`found`) and the gradients of `leaves` in one pass.

    Rewards are as in `preference_loss`: beta * (logp - ref_logp), or beta * logp / length.
    """
    loss, losses, logps = with_gradients(*found, leaves, gradients, backend)
    options, ref_logps = inputs.options, inputs.ref_logps
    rewards = logps.detach() if ref_logps is None else logps.detach() - ref_logps.to(logps.dtype)
    if options.average_rewards:
        rewards = logps.detach() / inputs.lengths.clamp(min=1)
    return PreferenceOutput(loss, losses, *logps.chunk(2), *(options.beta * rewards).chunk(2))

"""A batch of pairs inside an op: its loss options as an op's schema can hold them, and its rows in groups of whole pairs.

Nothing here waits for the device.
"""

import torch
from torch import Tensor

from ..backends.eager import rows_within, whole_steps
from ..backends.sequences import past_shorter_weights, scored_lengths, segment_ids, segment_sum
from ..losses import LossOptions, loss_and_coefficients
from .torch_library import pack_numbers, unpack_numbers

_NUMBERS = ("beta", "label_smoothing", "f_alpha_divergence_coef", "discopop_tau", "simpo_gamma", "sft_weight")
_CHOICES = ("f_divergence_type", "sft_mean")


def pack_loss(transform: tuple, ld_alpha: float | None, options: LossOptions) -> tuple[Tensor, str, str]:
    """The options as what the schema of an op can hold: a tensor of the numbers, and strings."""
    numbers = [getattr(options, name) for name in _NUMBERS] + options.weights
    choices = [getattr(options, name) for name in _CHOICES] + ["average"] * options.average_log_prob
    return pack_numbers(*transform, ld_alpha, *numbers), ",".join(options.names), ",".join(choices)


def unpack_loss(numbers: Tensor, names: str, choices: str) -> tuple[list, float | None, LossOptions]:
    """What `pack_loss` packed."""
    scale, softcap, temperature, ld_alpha, *others = unpack_numbers(numbers)
    count = len(_NUMBERS)
    values = dict(zip(_NUMBERS, others[:count], strict=True))
    *chosen, average = [*choices.split(","), ""][: len(_CHOICES) + 1]
    values |= dict(zip(_CHOICES, chosen, strict=True))
    options = LossOptions(
        names.split(","), loss_weights=others[count:], average_log_prob=average == "average", **values
    )
    return [scale, softcap, temperature], ld_alpha, options


class PairBatch:
    """A batch of pairs without its hidden states: which rows belong to which pair, and the inputs of a pair's loss."""

    def __init__(
        self,
        options: LossOptions,
        targets: Tensor,  # [N]
        cu_rows: Tensor,  # [2B + 1]
        bounds: list[int] | None,  # cu_rows as numbers; None where they are on a GPU
        ignore_index: int,
        ref_logps: Tensor | None,  # [2B]
        pair_weights: Tensor | None,  # [B]
        label_smoothing: Tensor | None,  # [B]
        mean_chosen_length: Tensor | None,  # scalar
        ld_alpha: float | None,
    ):
        self.options = options
        self.count = (len(cu_rows) - 1) // 2
        self.cu_rows, self.bounds = cu_rows, bounds
        self.scored = targets != ignore_index
        self.safe = targets.masked_fill(~self.scored, 0)
        self.lengths = scored_lengths(targets, ignore_index, cu_rows)
        self.ref_logps, self.pair_weights, self.label_smoothing = ref_logps, pair_weights, label_smoothing
        self.weights = None if ld_alpha is None else past_shorter_weights(self.scored, cu_rows, ld_alpha)
        if mean_chosen_length is None:
            # The mean of the whole batch, since each group sees only its part.
            mean_chosen_length = self.lengths[: self.count].sum().clamp(min=1) / self.count
        self.mean_chosen_length = mean_chosen_length

    def groups(self, limit: int) -> list[tuple[int, int, int]]:
        """Runs of pairs [i, j) whose rows fit the workspace of `limit` rows, and how many rows of each run are kept there.

        A pair that does not fit is a run of its own. Where the bounds are on a GPU the whole batch is one run, since
        reading them would wait for the device.
        """
        n, count = len(self.safe), self.count
        if n <= limit or self.bounds is None:
            return [(0, count, rows_within(n, limit))]
        fits = whole_steps(limit) or limit
        b = self.bounds
        rows = [b[i + 1] - b[i] + b[count + i + 1] - b[count + i] for i in range(count)]
        found, start, total = [], 0, 0
        for i, size in enumerate(rows):
            if i > start and total + size > fits:
                found.append((start, i, rows_within(total, fits)))
                start, total = i, 0
            total += size
        return [*found, (start, count, rows_within(total, fits))]

    def slices(self, i: int, j: int) -> list[slice]:
        """The rows of pairs [i, j)."""
        if (i, j) == (0, self.count):
            return [slice(0, len(self.safe))]
        b, count = self.bounds, self.count
        return [slice(b[i], b[j]), slice(b[count + i], b[count + j])]

    def losses(self, token_logps: Tensor, i: int, j: int) -> tuple[Tensor, Tensor, Tensor]:
        """Pairs [i, j), from the log-probs of their rows: losses, log-probs [2 (j - i)] and coefficients of the rows [n, 1]."""
        count = self.count
        chosen, rejected = self.cu_rows[i : j + 1], self.cu_rows[count + i : count + j + 1]
        split = chosen[-1] - chosen[0]
        local = torch.cat([chosen - chosen[0], (rejected - rejected[0] + split)[1:]])
        weights = self.scored.to(token_logps.dtype) if self.weights is None else self.scored * self.weights
        weights = torch.cat([weights[part] for part in self.slices(i, j)]).to(token_logps.dtype)
        # A row that is not scored may hold NaN.
        summed = segment_sum(torch.where(weights != 0, token_logps * weights, 0), local)
        both = [
            None if x is None else torch.cat([x[i:j], x[count + i : count + j]]) for x in (self.ref_logps, self.lengths)
        ]
        per_pair = (None if x is None else x[i:j] for x in (self.pair_weights, self.label_smoothing))
        references, lengths = both
        _, losses, coef, logps = loss_and_coefficients(
            self.options, summed, lengths, references, *per_pair, self.mean_chosen_length
        )
        coef = (coef * ((j - i) / count))[segment_ids(local, len(token_logps))]
        return losses, logps, torch.where(weights != 0, coef * weights, 0)[:, None]

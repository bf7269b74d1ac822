"""Padded logits [S, T, V] seen as rows [N, V] of one stride, without a copy where the strides allow it, and the way back.

Nothing here waits for the device.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def row_period(logits: Tensor) -> int:
    """Rows from one sequence of [S, T, V] to the next when all are seen as [N, V] of one stride; 0 where they cannot be.

    The period is T where sequences follow each other, and larger for a slice such as `logits[:, :-1]`, whose view
    includes the rows between sequences.
    """
    sequences, length, words = logits.shape
    between, row, word = logits.stride()
    if word != 1 and words > 1:
        return 0
    if sequences <= 1 or length <= 1:
        return length
    return between // row if row >= words and between % row == 0 and between // row >= length else 0


def flat_rows(logits: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """[S, T, V], [S, T] -> [N, V], [N], without a copy where the strides allow that; rows between sequences are ignored.

    [N, V] and [N] pass through. Sequence s begins at row s * period with `period = row_period(logits) or T`.
    """
    if logits.ndim == 2:
        return logits if logits.stride(1) == 1 or logits.shape[1] == 1 else logits.contiguous(), targets.contiguous()
    period = row_period(logits)
    if not period:
        logits, period = logits.contiguous(), logits.shape[1]
    (sequences, length, words), n = logits.shape, _row_count(logits, period)
    stride = logits.stride(1) if length > 1 else logits.stride(0)
    rows = logits.as_strided((n, words), (stride, 1))
    if period == length:
        # Reshaping a slice of one column makes no copy and leaves gaps.
        return rows, targets.reshape(-1).contiguous()
    padded = targets.new_full((sequences, period), ignore_index)
    padded[:, :length] = targets
    return rows, padded.view(-1)[:n]


def empty_rows(logits: Tensor, new_empty: Callable = Tensor.new_empty) -> tuple[Tensor, Tensor]:
    """Uninitialised memory for a gradient: [N, V] with the rows of `flat_rows`, and the same in the shape of logits."""
    if logits.ndim == 2:
        rows = new_empty(logits, *logits.shape)
        return rows, rows
    period = row_period(logits) or logits.shape[1]
    memory = new_empty(logits, logits.shape[0], period, logits.shape[2])
    return memory.view(-1, logits.shape[2])[: _row_count(logits, period)], memory[:, : logits.shape[1]]


def unflatten(x: Tensor, logits: Tensor) -> Tensor:
    """[..., N] in the order of `flat_rows` -> [..., S, T]; results of logits [N, V] stay [..., N]."""
    if logits.ndim == 2:
        return x
    sequences, length, _ = logits.shape
    period = row_period(logits) or length
    x = torch.nn.functional.pad(x, (0, sequences * period - x.shape[-1]))
    return x.view(*x.shape[:-1], sequences, period)[..., :length].contiguous()


def uniform_bounds(logits: Tensor) -> Tensor:
    """`cu_rows` [S + 1] of padded [S, T, V] logits."""
    sequences, length, _ = logits.shape
    period = row_period(logits) or length
    bounds = torch.arange(sequences + 1, dtype=torch.int32, device=logits.device) * period
    return bounds.clamp(max=_row_count(logits, period))


def _row_count(logits: Tensor, period: int) -> int:
    sequences, length, _ = logits.shape
    return (sequences - 1) * period + length if sequences and length else 0

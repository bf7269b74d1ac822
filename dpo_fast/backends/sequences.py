"""Sums over the rows of each sequence, and the way back from a sequence to its rows.

The rows of sequence s are `cu_rows[s]:cu_rows[s + 1]`. Nothing here waits for the device, and every sum has a fixed order.
"""

import torch
from torch import Tensor


def segment_sum(values: Tensor, cu_rows: Tensor) -> Tensor:
    """[N], [S + 1] -> [S]: `values[cu_rows[s]:cu_rows[s + 1]].sum()`, added up in float64 and returned in the type of values."""
    total = torch.segment_reduce(values.double(), "sum", offsets=cu_rows.long(), initial=0, unsafe=True)
    return total.to(values.dtype)


def segment_ids(cu_rows: Tensor, n: int) -> Tensor:
    """[S + 1] -> [N]: the sequence of each row."""
    rows = torch.arange(n, dtype=cu_rows.dtype, device=cu_rows.device)
    return torch.searchsorted(cu_rows, rows, right=True) - 1


def past_shorter_weights(scored: Tensor, cu_rows: Tensor, ld_alpha: float) -> Tensor:
    """[N] bool, [2B + 1] -> [N] float64: 1 up to the shorter length of the pair, `ld_alpha` past it (LD-DPO, arXiv 2409.06411)."""
    count = torch.nn.functional.pad(scored.cumsum(0), (1, 0))
    starts = count[cu_rows.long()]
    chosen, rejected = starts.diff().chunk(2)
    shared = torch.minimum(chosen, rejected).repeat(2)
    sequence = segment_ids(cu_rows, scored.shape[0])
    position = count[:-1] - starts[sequence]
    past = torch.full_like(position, ld_alpha, dtype=torch.float64)
    return past.masked_fill_(position < shared[sequence], 1.0)


def scored_lengths(targets: Tensor, ignore_index: int, cu_rows: Tensor | None = None) -> Tensor:
    """Scored tokens of each sequence, int32: [S, T] -> [S], or [N] with `cu_rows` [S + 1] -> [S]."""
    scored = targets != ignore_index
    if cu_rows is None:
        return scored.sum(-1, dtype=torch.int32)
    return segment_sum(scored.to(torch.float64), cu_rows).to(torch.int32)

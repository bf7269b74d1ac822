"""Which rows of a batch a head computes: those with a scored token, where reading the targets waits for no GPU.

`scored_rows` takes them out; `in_place` puts log-probs and statistics back, `whole_rows` gradients.
"""

from torch import Tensor


def drops_rows(x: Tensor) -> bool:
    """True where reading the targets waits for no GPU: rows without a scored token drop out before the first product."""
    return not x.is_cuda


def scored_rows(hidden: Tensor, targets: Tensor, ignore_index: int | None):
    """Hidden states and targets to compute with; their row numbers [n] where some dropped out, else the mask [N] where needed.

    A row that stays although its target is ignored gets the first word as target and zeros as hidden states, since its
    own may be NaN; its results are masked later.
    """
    targets = targets.contiguous()
    if ignore_index is None:
        return hidden, targets, None, None
    scored = targets != ignore_index
    if not drops_rows(hidden):
        return hidden.masked_fill(~scored[:, None], 0), targets.masked_fill(~scored, 0), None, scored
    if scored.all():
        return hidden, targets, None, None
    rows = scored.nonzero()[:, 0]
    return hidden[rows], targets[rows], rows, None


def in_place(x: Tensor, rows: Tensor | None, scored: Tensor | None, n: int) -> Tensor:
    """[..., n'] of the computed rows -> [..., n], with 0 for rows without a scored token."""
    if rows is not None:
        return x.new_zeros(*x.shape[:-1], n).index_copy_(-1, rows, x)
    return x if scored is None else x.masked_fill_(~scored, 0)


def whole_rows(dh: Tensor, rows: Tensor | None, n: int) -> Tensor:
    """[n', D] gradients of the computed rows -> [n, D], with zeros for the others."""
    return dh if rows is None else dh.new_zeros(n, dh.shape[1]).index_copy_(0, rows, dh)

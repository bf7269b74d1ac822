"""`linear_cross_entropy` with the signature of Cut Cross Entropy; it is exact and leaves out no small gradient.

from dpo_fast.integrations.cross_entropy import linear_cross_entropy     # instead of cut_cross_entropy's
"""

from torch import Tensor

from ..losses import require
from ..ops import linear_token_logps

_FILTERS = (None, "high", "auto")


def linear_cross_entropy(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    ignore_index: int = -100,
    softcap: float | None = None,
    reduction: str = "mean",
    shift: bool | int = False,
    filter_eps: float | str | None = "high",
    impl: str = "dpo_fast",
    *,
    bias: Tensor | None = None,
    return_lse: bool = False,
    accum_e_fp32: bool = True,
    accum_c_fp32: bool = True,
    filter_e_grad: bool = False,
    filter_c_grad: bool = False,
    vocab_parallel_options: object = None,
) -> Tensor:
    """`F.cross_entropy(softcap * tanh(e @ c.T / softcap), targets)` without the logits.

    Args:
        e: hidden states [..., D]. c: head [V, D]. targets: [...] int64, `ignore_index` where none is scored.
        reduction: "mean" over the scored targets, "sum", or "none" (the shape of targets, 0 where ignored).
        shift: True (or a number of tokens) scores `targets[..., shift:]` by `e[..., :-shift, :]`.
        filter_eps, impl, accum_*, filter_*: accepted for the signature's sake, without effect; gradients are always exact.

    Positions are those of the package 25.1.1; what its main branch added goes by name.
    Returns float32 or wider. Raises ValueError for shapes that do not fit, an unknown reduction, and what is not
    computed: return_lse and vocab_parallel_options.
    """
    require(
        isinstance(ignore_index, int),
        lambda: "the fourth argument is ignore_index, as in cut-cross-entropy 25.1.1: give bias by name",
    )
    require(not return_lse, lambda: "return_lse is not supported: leave it out")
    require(vocab_parallel_options is None, lambda: "vocab_parallel_options is not supported: give the whole c")
    require(reduction in ("mean", "sum", "none"), lambda: f"reduction is {reduction!r}: give 'mean', 'sum' or 'none'")
    known = filter_eps in _FILTERS or isinstance(filter_eps, float)
    require(known, lambda: f"filter_eps is {filter_eps!r}: give a number, 'high', 'auto' or None")
    if shift:
        e, targets = e[..., : -int(shift), :], targets[..., int(shift) :]
    require(e.shape[:-1] == targets.shape, lambda: f"targets must be {list(e.shape[:-1])}, got {list(targets.shape)}")
    rows, flat = e.reshape(-1, e.shape[-1]), targets.reshape(-1)
    nll = -linear_token_logps(rows, c, flat, bias=bias, softcap=softcap, ignore_index=ignore_index)
    if reduction == "none":
        return nll.view(targets.shape)
    return nll.sum() if reduction == "sum" else nll.sum() / (flat != ignore_index).sum()

"""The output layer in chunks of rows: never more than a tile of the [N, V] logits exists. It takes these matrix products.

The gradient of a log-prob with respect to its logits is the residual `onehot - softmax`, times one coefficient per row that
the loss decides later. A factor per row commutes with both matrix products of the backward pass, so the products can start
before it is known:

    frozen head      2 GEMMs: logits, then dH = (onehot - softmax) W, unscaled until the coefficients are there
    trained head     3 GEMMs: logits, then dH and dW from the residual, which is kept in a bounded workspace
                     4 GEMMs for the rows past the workspace: their logits are computed again

`score` does everything before the coefficients, `gradients` everything after. Autograd and the ops are in head.py.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import Backend
from ..backends.eager import chunks, row_blocks, tile_rows, whole_steps, wide_dtype

# Bytes of the residual that a trained head keeps between its forward and backward pass, by default.
WORKSPACE_BYTES = 1 << 30


class OutputLayer(NamedTuple):
    """The output layer, the transform of its logits, and the back end that computes its rows."""

    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    transform: dict  # scale, softcap, temperature
    launch: Backend

    def tile(self, n: int, workspace: Tensor | None) -> Tensor:
        """Memory [rows, V] for the logits of n rows, one chunk at a time: the workspace where it has at least a tile's rows."""
        rows = tile_rows(len(self.weight), self.weight.dtype, self.weight.device.type)
        if workspace is not None and len(workspace) >= rows:
            return workspace[: whole_steps(len(workspace))]
        return self.weight.new_empty(min(n, rows), len(self.weight))

    def logits(self, hidden: Tensor, out: Tensor) -> Tensor:
        """The logits [n, V] of hidden states [n, D] before the transform, written to `out`."""
        if self.bias is None:
            return torch.mm(hidden, self.weight.t(), out=out)
        return torch.addmm(self.bias.to(hidden.dtype), hidden, self.weight.t(), out=out)


def score(
    layer: OutputLayer,
    hidden: Tensor,  # [N, D]
    targets: Tensor,  # [N]; -100 is ignored: log-prob, statistics and gradient are 0
    outputs: tuple[str, ...],
    residual: Tensor,  # [kept, V]: receives d logps / d logits of the first `kept` rows
    dh: Tensor | None = None,  # [N, D]: receives d logps / d hidden
) -> tuple[Tensor, Tensor]:
    """Log-probs [N] and statistics [K, N]. The rows past the kept ones go first, through the memory of `residual`."""
    n, kept = len(hidden), len(residual)
    wide = wide_dtype(hidden.dtype)
    logps, stats = hidden.new_empty(n, dtype=wide), hidden.new_empty(len(outputs), n, dtype=wide)
    memory = layer.tile(n - kept, residual)
    parts = [(a + kept, b + kept) for a, b in chunks(n - kept, max(1, len(memory)))]
    for a, b in [*parts, (0, kept)] if kept else parts:
        tile = layer.logits(hidden[a:b], residual if b <= kept else memory[: b - a])
        if b <= kept or dh is not None:
            logps[a:b], found = layer.launch.residual_(tile, targets[a:b], outputs=outputs, **layer.transform)
        else:
            logps[a:b], _, found = layer.launch.logps_fwd(tile, targets[a:b], outputs=outputs, **layer.transform)
        for k, name in enumerate(outputs):
            stats[k, a:b] = found[name]
        if dh is not None:
            torch.mm(tile, layer.weight, out=dh[a:b])
    return logps, stats


class GradientSums:
    """Gradients of weight and bias, added up over chunks: in float32 where there are several.

    `peak`, the largest coefficient where that is above 1, is divided out of the products and multiplied back into their
    sum: a loss scale times a hidden state may overflow float16.
    """

    def __init__(self, weight: Tensor | None, bias: Tensor | None, several: bool, peak: Tensor | None = None):
        self.of_weight, self.of_bias, self.several, self.peak = weight, bias, several, peak
        self.weight = self.bias = None

    def add(self, residual: Tensor, coef: Tensor, hidden: Tensor) -> None:
        """Add the part of rows with `residual` [n, V], coefficients [n, 1] and hidden states [n, D]."""
        coef = coef if self.peak is None else coef / self.peak
        if self.of_weight is not None:
            scaled = torch.mul(hidden, coef, out=torch.empty_like(hidden))
            if self.several:
                self.weight = add_product(self.weight, residual.t(), scaled)
            else:
                self.weight = torch.mm(residual.t(), scaled)
        if self.of_bias is not None:
            self.bias = add_column_sums(self.bias, residual, coef)

    def results(self, empty: Tensor) -> tuple[Tensor, Tensor]:
        """Both gradients in the types of weight and bias: empty where one is not wanted, zeros where no row was added."""
        bias = None if self.bias is None else self.bias.sum(1)
        pairs = ((self.of_weight, self.weight), (self.of_bias, bias))
        found = []
        for like, total in pairs:
            if self.peak is not None and total is not None:
                total.mul_(self.peak)
            if like is None:
                found.append(empty.new_empty(0))
            else:
                found.append(torch.zeros_like(like) if total is None else total.to(like.dtype))
        return found[0], found[1]


def add_column_sums(total: Tensor | None, residual: Tensor, coef: Tensor) -> Tensor:
    """`total + residual.t() @ coef` in float32 or wider, as columns [V, k] whose sum over k it is."""
    if residual.is_cuda or residual.dtype == coef.dtype:
        return add_product(total, residual.t(), as_columns(coef, residual.dtype))
    # A half-precision product on a CPU would round each sum; the float32 copies of a few rows stay in its cache.
    for a, b in row_blocks(0, len(residual), residual):
        part = (residual[a:b] * coef[a:b]).sum(0)[:, None]
        total = part if total is None else total.add_(part)
    return total


def as_columns(coef: Tensor, dtype: torch.dtype) -> Tensor:
    """Coefficients [n, 1] as columns of `dtype` that add up to them, to twice its digits; rows of 16 bytes suit a GPU."""
    if coef.dtype == dtype:
        return coef
    columns = coef.new_zeros(len(coef), 8, dtype=dtype)
    columns[:, :1] = coef
    columns[:, 1:2] = coef - columns[:, :1]
    return columns


def add_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """`total + a @ b` in float32 or wider, in place: a sum in half precision would lose small products and bias training.

    On a CPU torch has no half-precision product with a float32 result, so each product is rounded once before it is added.
    """
    wide = wide_dtype(a.dtype)
    if a.dtype == wide:
        return torch.mm(a, b) if total is None else total.addmm_(a, b)
    if a.is_cuda:
        if total is None:
            return torch.mm(a, b, out_dtype=wide)
        return torch.addmm(total, a, b, out_dtype=wide, out=total)
    if total is None:
        total = a.new_zeros(a.shape[0], b.shape[1], dtype=wide)
    # Slices that stay in the cache are 4 times as fast as the whole product and its sum.
    for start in range(0, len(total), 2048):
        total[start : start + 2048].add_(torch.mm(a[start : start + 2048], b))
    return total


def gradients(
    layer: OutputLayer,
    hidden: Tensor,  # [N, D]
    targets: Tensor,  # [N]
    coef: Tensor,  # [N, 1], wide
    residual: Tensor,  # [kept, V], from `score`
    dh: Tensor | None,  # [N, D]: receives the gradient of hidden
    sums: GradientSums,  # receives those of weight and bias
    spend: bool,  # whether `residual` may be overwritten
) -> None:
    """Add up the gradients of all rows; the logits of rows past the kept ones are computed again, a tile at a time."""
    n, kept = len(hidden), len(residual)
    memory = layer.tile(n - kept, residual if spend else None)
    rest = [(a + kept, b + kept) for a, b in chunks(n - kept, max(1, len(memory)))]
    # The kept rows are one chunk: their product is accumulated inside one GEMM and rounded once.
    for a, b in ([(0, kept)] if kept else []) + rest:
        if b <= kept:
            g = residual
        else:
            g = layer.logits(hidden[a:b], memory[: b - a])
            layer.launch.residual_(g, targets[a:b], outputs=(), **layer.transform)
        if dh is not None:
            torch.mm(g, layer.weight, out=dh[a:b]).mul_(coef[a:b])
        sums.add(g, coef[a:b], hidden[a:b])


def workspace_rows(weight: Tensor, workspace_bytes: int) -> int:
    """How many rows [V] of the type of `weight` fit into `workspace_bytes`."""
    return workspace_bytes // (len(weight) * weight.element_size())

"""The output layer in chunks: never more than a tile of the [N, V] logits, and which matrix products that takes.

The gradient of a log-prob with respect to its logits is `onehot - softmax`, times one number a row that the loss decides
later. A row scale commutes with both matrix products of the backward pass, so the products can start before it is known:

    frozen head      2 GEMMs: logits, then dH = (onehot - softmax) W, unscaled until the coefficients are there
    trainable head   3 GEMMs: logits, dH and dW from `onehot - softmax` kept in a bounded workspace
                     4 GEMMs for the rows past the workspace: their logits are computed again

`score` is everything before the coefficients, `gradients` everything after. No autograd, no ops: head_ops.py has both.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import Backend
from ..backends.eager import chunks, row_blocks, wide_dtype

# Of `d logps / d logits` kept between the forward and backward pass of a trained head.
WORKSPACE_BYTES = 1 << 30


class OutputLayer(NamedTuple):
    """The output layer, what follows it, and who computes its rows."""

    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    transform: dict  # scale, softcap, temperature
    launch: Backend

    def chunks(self, n: int, boundary: int = 0) -> list[tuple[int, int]]:
        return chunks(n, self.weight.shape[0], self.weight.dtype, self.weight.device.type, boundary)

    def logits(self, hidden: Tensor, out: Tensor) -> Tensor:
        if self.bias is None:
            return torch.mm(hidden, self.weight.t(), out=out)
        return torch.addmm(self.bias.to(hidden.dtype), hidden, self.weight.t(), out=out)


def score(
    layer: OutputLayer,
    hidden: Tensor,  # [N, D]
    targets: Tensor,  # [N], none ignored
    outputs: tuple[str, ...],
    residual: Tensor,  # [kept, V]: of so many rows, d logps / d logits is kept here
    dh: Tensor | None = None,  # [N, D]: receives d logps / d hidden
) -> tuple[Tensor, Tensor]:
    """Log-probs [N] and statistics [K, N]."""
    (n, kept), v = (hidden.shape[0], residual.shape[0]), layer.weight.shape[0]
    wide = wide_dtype(hidden.dtype)
    logps, stats = hidden.new_empty(n, dtype=wide), hidden.new_empty(len(outputs), n, dtype=wide)
    parts = layer.chunks(n, kept)
    spare = hidden.new_empty(max((b - a for a, b in parts if b > kept), default=0), v)
    for a, b in parts:
        tile = layer.logits(hidden[a:b], residual[a:b] if b <= kept else spare[: b - a])
        if b <= kept or dh is not None:
            logps[a:b], found = layer.launch.residual_(tile, targets[a:b], outputs=outputs, **layer.transform)
        else:
            logps[a:b], _, found = layer.launch.logps_fwd(
                tile, targets[a:b], ignore_index=-1, outputs=outputs, **layer.transform
            )
        for k, name in enumerate(outputs):
            stats[k, a:b] = found[name]
        if dh is not None:
            torch.mm(tile, layer.weight, out=dh[a:b])
    return logps, stats


class GradientSums:
    """Gradients of weight and bias as they add up over chunks: in float32 where there are several.

    `peak`, the largest coefficient where that is above 1, is taken out of the products and put back into their sum: a loss
    scale times a hidden state may be more than float16 has.
    """

    def __init__(self, weight: Tensor | None, bias: Tensor | None, several: bool, peak: Tensor | None = None):
        self.of_weight, self.of_bias, self.several, self.peak = weight, bias, several, peak
        self.weight = self.bias = None

    def add(self, residual: Tensor, coef: Tensor, hidden: Tensor) -> None:
        """The part of rows with `residual` [n, V], coefficients [n, 1] and hidden states [n, D]."""
        if self.of_weight is not None:
            scaled = (hidden * (coef if self.peak is None else coef / self.peak)).to(hidden.dtype)
            if self.several:
                self.weight = add_product(self.weight, residual.t(), scaled)
            else:
                self.weight = torch.mm(residual.t(), scaled)
        if self.of_bias is not None:
            for a, b in row_blocks(0, len(residual), residual):
                part = (residual[a:b] * coef[a:b]).sum(0)
                self.bias = part if self.bias is None else self.bias.add_(part)

    def results(self, empty: Tensor) -> tuple[Tensor, Tensor]:
        """In the types of weight and bias; `empty` where one is not wanted, zeros where no row was added."""
        if self.peak is not None and self.weight is not None:
            self.weight.mul_(self.peak)
        pairs = ((self.of_weight, self.weight), (self.of_bias, self.bias))
        found = []
        for like, total in pairs:
            if like is None:
                found.append(empty.new_empty(0))
            else:
                found.append(torch.zeros_like(like) if total is None else total.to(like.dtype))
        return found[0], found[1]


def add_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """`total + a @ b` in float32 or wider, in place: a sum in half precision would lose small products, and bias training.

    On a CPU, where torch has no product of half precision in float32, each product is rounded once before it is added.
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
    # In slices that stay in the cache: 4 times as fast as the whole product and its sum.
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
) -> None:
    """Rows past those kept are computed again, a tile at a time."""
    n, kept = hidden.shape[0], residual.shape[0]
    rest = [(a + kept, b + kept) for a, b in layer.chunks(n - kept)]
    spare = hidden.new_empty(max((b - a for a, b in rest), default=0), layer.weight.shape[0])
    # The kept rows are one chunk: their product is accumulated inside one GEMM and rounded once.
    for a, b in ([(0, kept)] if kept else []) + rest:
        if b <= kept:
            g = residual
        else:
            g = layer.logits(hidden[a:b], spare[: b - a])
            layer.launch.residual_(g, targets[a:b], outputs=(), **layer.transform)
        if dh is not None:
            dh[a:b] = torch.mm(g, layer.weight) * coef[a:b]
        sums.add(g, coef[a:b], hidden[a:b])


def kept_rows(n: int, weight: Tensor, workspace_bytes: int) -> int:
    return min(n, workspace_bytes // (weight.shape[0] * weight.element_size()))

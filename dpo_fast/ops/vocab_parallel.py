"""The head whose weight is cut along the vocabulary: each rank holds rows [V / p, D] of it and all the hidden states.

A rank knows the log-sum-exp of its own words, and the logit of a target that is one of them. One collective per chunk of
rows brings both together; every rank then computes the same log-probs. In backward each rank has its own words' part of
`onehot - softmax`: whole for its weight, one summand of the hidden states' gradient, which is summed over the ranks.

Megatron-LM's vocabulary-parallel cross entropy (arXiv:1909.08053, section 3) is the same idea on logits that are held.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..backends import resolve
from ..backends.eager import chunks, rows_within, tile_rows, transform_logits, wide_dtype
from ..losses import require
from .arguments import check_targets, local
from .scored import in_place, scored_rows, whole_rows
from .tiles import GradientSums, OutputLayer
from .torch_library import once_differentiable


class VocabShard(NamedTuple):
    """Which words this rank holds: `start` to `start + rows of its weight`, of `words` in all; `most` on any rank."""

    group: "dist.ProcessGroup"
    words: int
    start: int
    most: int


def shard_of(weight: Tensor, group: "dist.ProcessGroup", vocab_size: int | None = None) -> VocabShard:
    """Rank r of p holds the r-th of p equal parts, or what `torch.chunk` gives it of `vocab_size` rows."""
    ranks, rank, rows = dist.get_world_size(group), dist.get_rank(group), len(weight)
    words = rows * ranks if vocab_size is None else vocab_size
    most = -(-words // ranks)
    start = min(rank * most, words)
    expected = min(start + most, words) - start
    require((ranks - 1) * most < words, lambda: f"{words} words leave a rank of {ranks} without one: use fewer ranks")
    require(
        rows == expected,
        lambda: (
            f"rank {rank} of {ranks} holds {rows} rows of weight, but {expected} of vocab_size={words} are its part: cut the "
            "weight as torch.chunk does, and give the number of all rows as vocab_size"
        ),
    )
    return VocabShard(group, words, start, most)


def local_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, group: "dist.ProcessGroup | None", vocab_size: int | None
) -> tuple[Tensor, Tensor, Tensor | None, VocabShard | None]:
    """Plain tensors, and this rank's words where the weight is cut along the vocabulary.

    A DTensor weight alone does not say whether the ranks hold the same hidden states (tensor parallelism) or their own
    (FSDP): it is taken for the former with `group`, with hidden states that are a DTensor, or on a mesh called "tp".
    """
    mesh = getattr(weight, "device_mesh", None)
    named = mesh is not None and mesh.mesh_dim_names == ("tp",)
    if mesh is not None and mesh.ndim == 1 and (group is not None or named or hasattr(hidden, "device_mesh")):
        rows = weight.placements[0].is_shard(0)
        require(rows, lambda: f"weight is a DTensor {weight.placements}: shard it on its rows, or give the whole")
        same = not hasattr(hidden, "device_mesh") or hidden.placements[0].is_replicate()
        require(same, lambda: f"hidden is a DTensor {hidden.placements}: every rank needs all of it, replicate it")
        group, vocab_size = mesh.get_group(), weight.shape[0]
        hidden, weight, bias = (x.to_local() if hasattr(x, "to_local") else x for x in (hidden, weight, bias))
    if group is None:
        require(vocab_size is None, lambda: "vocab_size has no effect without process_group: leave it out")
        names = {"hidden": hidden, "weight": weight, "bias": bias}
        return *(local(name, x) for name, x in names.items()), None
    return hidden, weight, bias, shard_of(weight, group, vocab_size)


def vocab_parallel_token_logps(
    hidden: Tensor,  # [N, D], the same on every rank
    weight: Tensor,  # [V / p, D], this rank's words
    targets: Tensor,  # [N], words of the whole vocabulary
    bias: Tensor | None,  # [V / p]
    shard: VocabShard,
    transform: dict,
    ignore_index: int | None,
    outputs: tuple[str, ...],
    workspace_bytes: int,
    backend: str | None,
    debug: bool,
) -> tuple[Tensor, Tensor]:
    """Log-probs [N] and statistics [K, N] as the op `linear_token_logps` returns them, the same on every rank."""
    check_targets(targets, shard.words, ignore_index, debug)
    call = _Call(shard, transform, ignore_index, outputs, workspace_bytes, backend)
    if not torch.is_grad_enabled():
        hidden, weight, bias = (None if x is None else x.detach() for x in (hidden, weight, bias))
    with torch.autocast(hidden.device.type, enabled=False):
        return _VocabParallel.apply(hidden, weight, bias, targets, call)


class _Call(NamedTuple):
    shard: VocabShard
    transform: dict  # scale, softcap, temperature
    ignore_index: int | None
    outputs: tuple[str, ...]
    workspace_bytes: int
    backend: str | None

    def layer(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> OutputLayer:
        return OutputLayer(weight, bias, self.transform, resolve(self.backend, hidden.device, hidden.dtype))

    def local(self, targets: Tensor, words: int) -> tuple[Tensor, Tensor]:
        """Which targets [n] are words of this rank, and their rows of the weight: the first word's for all others."""
        here = targets - self.shard.start
        own = (here >= 0) & (here < words)
        return own, here.masked_fill(~own, 0)

    def chunk_rows(self, weight: Tensor) -> int:
        """Rows per chunk, the same on every rank, since each chunk is a collective."""
        return tile_rows(self.shard.most, weight.dtype, weight.device.type)


class _VocabParallel(torch.autograd.Function):
    """Forward keeps the log-sum-exp of every row, and the logits of as many as the workspace holds; a frozen head keeps none.

    A frozen head takes its product with the weight in forward, as in head.py: two products, not three.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, call):
        n = len(hidden)
        layer = call.layer(hidden, weight, bias)
        rows, labels, *where = scored_rows(hidden, targets.contiguous(), call.ignore_index)
        frozen = not any(ctx.needs_input_grad[1:3])
        # The limit is that of the rank with most words, so that the chunks are the same on every rank.
        limit = call.workspace_bytes // (call.shard.most * weight.element_size())
        keeps = rows_within(len(rows), limit) if any(ctx.needs_input_grad) and not frozen else 0
        kept = rows.new_empty(keeps, len(weight))
        dh = torch.empty_like(rows) if frozen and ctx.needs_input_grad[0] else None
        logps, lse, stats = _forward(layer, call, rows, labels, kept, dh)
        ctx.call = call
        ctx.save_for_backward(hidden, weight, bias, targets, lse, kept, dh)
        logps, stats = in_place(logps, *where, n), in_place(stats, *where, n)
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        return logps, stats

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        if grad is None:
            return (None,) * 5
        hidden, weight, bias, targets, lse, kept, dh = ctx.saved_tensors
        call, n = ctx.call, len(hidden)
        rows, labels, index, scored = scored_rows(hidden, targets.contiguous(), call.ignore_index)
        if scored is not None:
            grad = grad.masked_fill(~scored, 0)
        coef = (grad if index is None else grad[index])[:, None]
        if dh is not None:
            out, sums = torch.mul(dh, coef), None
        else:
            out = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
            sums = _gradients(ctx, call.layer(hidden, weight, bias), rows, labels, coef, lse, kept, out)
        if out is not None:
            # Each rank has the part of its words; the sum is taken in the wide type.
            total = out.to(wide_dtype(out.dtype))
            dist.all_reduce(total, group=call.shard.group)
            out = whole_rows(total.to(hidden.dtype), index, n)
        dw, db = (None, None) if sums is None else sums.results(hidden)
        needs = ctx.needs_input_grad
        return out, dw if needs[1] else None, db if needs[2] else None, None, None


def _forward(layer: OutputLayer, call: _Call, hidden: Tensor, targets: Tensor, kept: Tensor, dh: Tensor | None):
    """Log-probs [n], log-sum-exp [n], statistics [K, n]; logits of the first rows go to `kept`, unscaled gradients to `dh`."""
    n, wide = len(hidden), wide_dtype(hidden.dtype)
    logps, lse = hidden.new_empty(n, dtype=wide), hidden.new_empty(n, dtype=wide)
    stats = hidden.new_empty(len(call.outputs), n, dtype=wide)
    rows = call.chunk_rows(layer.weight)
    memory = hidden.new_empty(min(n - len(kept), rows), len(layer.weight))
    for a, b in _chunks(len(kept), n, rows):
        tile = layer.logits(hidden[a:b], kept[a:b] if b <= len(kept) else memory[: b - a])
        logps[a:b], lse[a:b], found = _combine(layer, call, tile, targets[a:b])
        for k, x in enumerate(found):
            stats[k, a:b] = x
        if dh is not None:
            _residual_(layer, call, tile, targets[a:b], lse[a:b])
            torch.mm(tile, layer.weight, out=dh[a:b])
    return logps, lse, stats


def _chunks(kept: int, n: int, rows: int) -> list[tuple[int, int]]:
    """The kept rows and then the others, in ranges of at most `rows`."""
    return chunks(kept, rows) + [(a + kept, b + kept) for a, b in chunks(n - kept, rows)]


def _combine(layer: OutputLayer, call: _Call, tile: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Log-probs [n], log-sum-exp [n] and statistics of all words, from every rank's own words: one collective."""
    own, here = call.local(targets, len(layer.weight))
    logps, lse, found = layer.launch.logps_fwd(tile, here, ignore_index=-100, outputs=call.outputs, **layer.transform)
    # NaN says that the target is another rank's word: whatever no rank has, or two have, comes out as NaN.
    at_target = (logps + lse).masked_fill(~own, float("nan"))
    if "is_top1" in found:
        # A target that is the largest of its rank's words is so of all where no rank has a larger one.
        found["is_top1"] = torch.where(found["is_top1"] & own, 1.0, 0.0)
        found["largest"] = _largest(tile, layer.transform, lse.dtype)
    mine = torch.stack([lse, at_target, *(x.to(lse.dtype) for x in found.values())])
    every = mine.new_empty(dist.get_world_size(call.shard.group), *mine.shape)
    dist.all_gather(list(every.unbind(0)), mine, group=call.shard.group)
    lses, at_targets, *others = every.unbind(1)  # each [p, n]
    lse = lses.logsumexp(0)
    owners = (~at_targets.isnan()).sum(0)
    at_target = at_targets.nansum(0).masked_fill(owners != 1, float("nan"))
    parts = dict(zip(found, others, strict=True))
    return at_target - lse, lse, [_statistic(name, parts, lses, lse, call) for name in call.outputs]


def _largest(tile: Tensor, transform: dict, dtype: torch.dtype) -> Tensor:
    """The largest transformed logit of each row [n]."""
    ends = torch.stack([tile.amax(-1), tile.amin(-1)]).to(dtype)  # a negative scale turns the order round
    names = (transform["scale"], transform["softcap"], transform["temperature"])
    return transform_logits(ends, *names).amax(0)


def _statistic(name: str, found: dict[str, Tensor], lses: Tensor, lse: Tensor, call: _Call) -> Tensor:
    """A statistic [n] of all words from those of each rank's words, each [p, n], whose log-sum-exp are `lses`."""
    parts = found[name]
    share = torch.exp(lses - lse)  # the probability of each rank's words
    if name == "entropy":
        return (share * (parts + lse - lses)).sum(0)
    if name == "mean_logits":
        words, most = call.shard.words, call.shard.most
        return (parts[:-1].sum(0) * most + parts[-1] * (words - most * (len(parts) - 1))) / words
    if name == "is_top1":
        return (parts * (found["largest"] >= found["largest"].amax(0))).amax(0)
    assert name == "log_sum_sq_probs", name
    return (parts + 2 * lses).logsumexp(0) - 2 * lse


def _residual_(layer: OutputLayer, call: _Call, tile: Tensor, targets: Tensor, lse: Tensor) -> Tensor:
    """`tile` [n, V / p] of logits becomes `d logps / d logits` of this rank's words, for the log-sum-exp of all words."""
    own, here = call.local(targets, len(layer.weight))
    first = tile[:, 0].to(lse.dtype, copy=True)
    ones = torch.ones_like(lse)
    layer.launch.logps_bwd(tile, here, lse, ones, ignore_index=-100, out=tile, **layer.transform)
    # The launcher took the first word for the target where that is another rank's: there it is a word like the others.
    transform = layer.transform
    z = transform_logits(first, transform["scale"], transform["softcap"], transform["temperature"])
    slope = transform["scale"] / transform["temperature"]
    if transform["softcap"] is not None:
        slope = slope * (1 - (z * (transform["temperature"] / transform["softcap"])) ** 2)
    tile[:, 0] = torch.where(own, tile[:, 0], (-slope * torch.exp(z - lse)).to(tile.dtype))
    return tile


def _gradients(ctx, layer, hidden, targets, coef, lse, kept, out) -> GradientSums:
    """Those of weight and bias; this rank's part of the hidden states' goes to `out`. Rows past `kept` are computed again."""
    needs, call, n = ctx.needs_input_grad, ctx.call, len(hidden)
    rows = call.chunk_rows(layer.weight)
    memory, parts = hidden.new_empty(min(n, rows), len(layer.weight)), _chunks(len(kept), n, rows)
    peak = coef.abs().amax().clamp(min=1.0) if hidden.dtype == torch.float16 and n else None
    sums = GradientSums(layer.weight if needs[1] else None, layer.bias if needs[2] else None, len(parts) > 1, peak)
    for a, b in parts:
        tile = memory[: b - a]
        # The graph may be kept for another backward pass, and the kept logits with it.
        tile = tile.copy_(kept[a:b]) if b <= len(kept) else layer.logits(hidden[a:b], tile)
        _residual_(layer, call, tile, targets[a:b], lse[a:b])
        if out is not None:
            torch.mm(tile, layer.weight, out=out[a:b]).mul_(coef[a:b])
        sums.add(tile, coef[a:b], hidden[a:b])
    return sums

"""The launchers in plain PyTorch: the back end `torch`, which runs wherever PyTorch does.

Every back end implements these functions with the same signatures (kernels/ in Triton, extension.py by way of csrc/). They
know rows of logits and where the rows of a sequence begin; they know nothing of autograd.

    logps_fwd   log-probs of the targets, and statistics            1 read of the scored rows
    logps_bwd   their gradient times one number per row             1 read, 1 write
    residual_   log-probs, and their gradient over the logits       1 read, 1 write (of the scored rows)
    dpo_fused   log-probs, losses and gradient of all pairs         2 reads, 1 write
    scale_      a tensor times a number that is on the device       nothing where the number is 1
    new_empty   memory for a gradient                               nothing

`logits` are [N, V]: the entries of a row are adjacent, and rows have any stride. `targets` are [N] int64, in [0, V) or
`ignore_index`. Rows with an ignored target do not count: their log-prob, log-sum-exp, statistics and gradient are 0,
whatever they hold. Any other target outside [0, V) reads nothing outside its row: its log-prob and its gradient are NaN,
and so are the loss and the gradient of its pair.
Results are float32, or float64 for float64 logits. The logits x are transformed, in the order in which models do it, to
`z = softcap * tanh(scale * x / softcap) / temperature`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..losses import LossOptions, loss_and_coefficients
from .sequences import past_shorter_weights, scored_lengths, segment_ids, segment_sum

# Per-row statistics beside the log-probs; none carries a gradient.
OUTPUTS = ("entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
# Bytes of the tile of logits between two matrix products. On a CPU a tile is large enough for the products to run at full
# speed (512 x 576 x 49152 in float32, two cores: two products take 351 ms with 512 rows per tile, 379 with 256, 458 with 128).
TILE_BYTES = {"cpu": 128 << 20, "cuda": 256 << 20}
# A chunk's rows are a multiple of this, or better of twice this: a GPU's matrix products work on that many rows at a time.
ROW_STEP = 128
# Bytes per thread of the float32 copies of rows that a launcher makes at a time: they stay in a core's cache and the heap.
ROW_BYTES = 2 << 20


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of log-probs and sums: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def transform_logits(logits, logit_scale=1.0, softcap=None, temperature=1.0) -> Tensor:
    """Apply scale, soft-cap and temperature in the order of models: `cap * tanh(logits * scale / cap) / temperature`."""
    if logit_scale != 1.0:
        logits = logits * logit_scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    return logits if temperature == 1.0 else logits / temperature


def _statistic(name: str, z: Tensor, log_probs: Tensor, logps: Tensor, temperature: float) -> Tensor:
    """One statistic [N] of transformed logits z [N, V], their log-softmax [N, V] and the targets' log-probs [N]."""
    if name == "entropy":
        # A masked word has log-prob -inf and probability 0; their product must be 0.
        return -torch.linalg.vecdot(log_probs.exp(), log_probs.clamp(min=torch.finfo(z.dtype).min))
    if name == "mean_logits":
        return z.mean(-1) * temperature
    if name == "is_top1":
        return logps >= log_probs.amax(-1)
    assert name == "log_sum_sq_probs", name
    return torch.logsumexp(2 * log_probs, dim=-1)


def logps_fwd(
    logits: Tensor,  # [N, V]
    targets: Tensor,  # [N]
    *,
    ignore_index: int = -100,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    outputs: tuple[str, ...] = (),
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Log-probs [N], log-sum-exp [N] of the transformed logits, and the named statistics [N] (`is_top1` as bool)."""
    wide, scored = wide_dtype(logits.dtype), targets != ignore_index
    safe, fault = _checked(targets, logits)
    logps, lse = (logits.new_zeros(len(targets), dtype=wide) for _ in range(2))
    stats = {name: torch.zeros_like(logps, dtype=torch.bool if name == "is_top1" else wide) for name in outputs}
    for a, b in _scored_blocks(scored, logits):
        z = transform_logits(logits[a:b].to(wide), scale, softcap, temperature)
        log_probs = torch.log_softmax(z, dim=-1)
        logps[a:b] = log_probs.gather(-1, safe[a:b])[:, 0] + fault[a:b]
        # The log-sum-exp is read off at the largest entry, where the difference loses no digits.
        lse[a:b] = z.amax(-1) - log_probs.amax(-1)
        for name in outputs:
            stats[name][a:b] = _statistic(name, z, log_probs, logps[a:b], temperature)
    _zero_ignored(scored, None, (logps, lse, *stats.values()))
    return logps, lse, stats


def logps_bwd(
    logits: Tensor,  # [N, V]
    targets: Tensor,  # [N]
    lse: Tensor,  # [N], from logps_fwd
    coef: Tensor,  # [N]
    *,
    ignore_index: int = -100,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    out: Tensor,  # [N, V], the type of logits; may be logits
) -> Tensor:
    """`out[n] = coef[n] * d logps[n] / d logits[n]`; returns `out`."""
    wide, scored = wide_dtype(logits.dtype), targets != ignore_index
    safe, fault = _checked(targets, logits)
    factor = (coef.to(wide) * (scale / temperature) + fault)[:, None]
    for a, b in _scored_blocks(scored, logits):
        z = transform_logits(logits[a:b].to(wide), scale, softcap, temperature)
        slope = None if softcap is None else 1 - (z * (temperature / softcap)) ** 2
        g = torch.exp(z - lse[a:b, None])
        at_target = (1 - g.gather(-1, safe[a:b])) * factor[a:b]
        g.mul_(-factor[a:b]).scatter_(-1, safe[a:b], at_target)
        if slope is not None:
            g.mul_(slope)
        out[a:b] = g.masked_fill_(~scored[a:b, None], 0) if logits.is_cuda else g
    _zero_ignored(scored, out, ())
    return out


def residual_(
    logits: Tensor,  # [N, V], overwritten
    targets: Tensor,  # [N]
    *,
    ignore_index: int = -100,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    outputs: tuple[str, ...] = (),
) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probs [N] and the named statistics; `logits` are overwritten with the residual `d logps[n] / d logits[n]`:

    (onehot - softmax) * scale / temperature * (1 - tanh(scale * logits / softcap)**2)

    It goes into matrix products without its coefficient, which is not known yet and is too small for half precision.
    """
    wide, scored = wide_dtype(logits.dtype), targets != ignore_index
    safe, fault = _checked(targets, logits)
    logps = logits.new_zeros(len(targets), dtype=wide)
    stats = {name: torch.zeros_like(logps, dtype=torch.bool if name == "is_top1" else wide) for name in outputs}
    for a, b in _scored_blocks(scored, logits):
        z = transform_logits(logits[a:b].to(wide), scale, softcap, temperature)
        log_probs = torch.log_softmax(z, dim=-1)
        logps[a:b] = log_probs.gather(-1, safe[a:b])[:, 0] + fault[a:b]
        for name in outputs:
            stats[name][a:b] = _statistic(name, z, log_probs, logps[a:b], temperature)
        factor = -scale / temperature + fault[a:b, None]
        g = log_probs.exp_().scatter_(-1, safe[a:b], torch.expm1(logps[a:b, None])).mul_(factor)
        if softcap is not None:
            g.mul_(1 - (z * (temperature / softcap)) ** 2)
        logits[a:b] = g.masked_fill_(~scored[a:b, None], 0) if logits.is_cuda else g
    _zero_ignored(scored, logits, (logps, *stats.values()))
    return logps, stats


def dpo_fused(
    logits: Tensor,  # [N, V]
    targets: Tensor,  # [N]
    cu_rows: Tensor,  # [2B + 1] int32 from 0 to N: the rows of sequence s begin at cu_rows[s]; B chosen, then B rejected
    ref_logps: Tensor | None,  # [2B]; None: zeros
    grad_scale: float,
    *,
    loss_type: str,  # one of `loss_table.FUSED`
    beta: float,
    label_smoothing: float,
    discopop_tau: float,
    simpo_gamma: float,
    ignore_index: int = -100,
    out: Tensor,  # [N, V], the type of logits; may be logits
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses [B], summed log-probs [2B] and `out`: `grad_scale * d losses.sum() / d logits`.

    The other back ends need one launch for this; here it is two of the functions above.
    """
    options = LossOptions(loss_type, beta, label_smoothing, discopop_tau=discopop_tau, simpo_gamma=simpo_gamma)
    launch = (logps_fwd, logps_bwd)
    _, losses, logps = dpo_two_launches(
        launch, logits, targets, cu_rows, ref_logps, grad_scale, options=options, ignore_index=ignore_index, out=out
    )
    return losses, logps, out


def dpo_two_launches(
    launch: tuple[Callable, Callable],  # logps_fwd and logps_bwd of any back end
    logits: Tensor,
    targets: Tensor,
    cu_rows: Tensor,
    ref_logps: Tensor | None,
    grad_scale: float,
    *,
    options: LossOptions,
    pair_weights: Tensor | None = None,  # [B]
    label_smoothing: Tensor | None = None,  # [B]; None: the number in `options`
    mean_chosen_length: Tensor | None = None,
    ld_alpha: float | None = None,
    ignore_index: int = -100,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    out: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Any loss in two launches: the loss, losses [B] and log-probs [2B]; `out = grad_scale * B * d loss / d logits`."""
    forward, backward = launch
    common = {"ignore_index": ignore_index, "scale": scale, "softcap": softcap, "temperature": temperature}
    token_logps, lse, _ = forward(logits, targets, outputs=(), **common)
    weights = None
    if ld_alpha is not None:
        weights = past_shorter_weights(targets != ignore_index, cu_rows, ld_alpha).to(token_logps.dtype)
        token_logps = token_logps * weights
    lengths = scored_lengths(targets, ignore_index, cu_rows)
    per_pair = pair_weights, label_smoothing, mean_chosen_length
    summed = segment_sum(token_logps, cu_rows)
    loss, losses, coef, logps = loss_and_coefficients(options, summed, lengths, ref_logps, *per_pair)
    coef = (coef * (grad_scale * (len(logps) // 2)))[segment_ids(cu_rows, len(targets))]
    backward(logits, targets, lse, coef if weights is None else coef * weights, out=out, **common)
    return loss, losses, logps


def scale_(x: Tensor, factor: Tensor) -> Tensor:
    """`x *= factor` for a factor of one element on the device of x, without waiting for a GPU; returns x."""
    if not x.is_cuda and factor.item() == 1.0:
        return x
    return x.mul_(factor)


def new_empty(like: Tensor, *size: int) -> Tensor:
    """`like.new_empty(size)`."""
    return like.new_empty(size)


# ---- Rows at a time ----


def whole_steps(rows: int) -> int:
    """The largest multiple of 2 * ROW_STEP up to `rows`; where that is 0, the largest multiple of ROW_STEP."""
    return rows // (2 * ROW_STEP) * (2 * ROW_STEP) or rows // ROW_STEP * ROW_STEP


def tile_rows(v: int, dtype: torch.dtype, device: str) -> int:
    """The number of rows of a tile [rows, V] of TILE_BYTES: whole steps, and at least one step."""
    return max(whole_steps(TILE_BYTES.get(device, TILE_BYTES["cuda"]) // (v * dtype.itemsize)), ROW_STEP)


def chunks(n: int, rows: int) -> list[tuple[int, int]]:
    """[0, n) cut into ranges of `rows` (whole steps) and a rest, which is never one row: a product takes a whole step for it."""
    starts = list(range(0, n, rows))
    if n > 1 and rows > 1 and n - starts[-1] == 1:
        # The chunk before gives up a step of its rows, or one row where it has one step only.
        starts[-1] -= ROW_STEP if rows > ROW_STEP else 1
    return list(zip(starts, [*starts[1:], n], strict=False))


def rows_within(n: int, limit: int) -> int:
    """How many of n rows a workspace of `limit` rows holds: all of them, or whole steps that leave no single row."""
    if n <= limit:
        return n
    return chunks(n, whole_steps(limit))[0][1] if limit >= ROW_STEP else 0


def _runs(mask: Tensor) -> list[tuple[int, int]]:
    """The ranges [start, end) in which a mask [N] on the CPU is True."""
    edges = mask.to(torch.int8).diff(
        prepend=mask.new_zeros(1, dtype=torch.int8), append=mask.new_zeros(1, dtype=torch.int8)
    )
    return list(zip((edges == 1).nonzero()[:, 0].tolist(), (edges == -1).nonzero()[:, 0].tolist(), strict=True))


def row_blocks(start: int, end: int, logits: Tensor) -> list[tuple[int, int]]:
    """[start, end) cut into blocks of ROW_BYTES per thread in the wide type; on a GPU, of TILE_BYTES."""
    budget = TILE_BYTES["cuda"] if logits.is_cuda else ROW_BYTES * torch.get_num_threads()
    rows = max(1, budget // (logits.shape[1] * wide_dtype(logits.dtype).itemsize))
    return [(a, min(a + rows, end)) for a in range(start, end, rows)]


def _checked(targets: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Targets as indices into their rows [N, 1], and the term that their log-probs gain [N]: 0, or NaN outside the vocabulary."""
    inside = (targets >= 0) & (targets < logits.shape[1])
    fault = torch.zeros(len(targets), dtype=wide_dtype(logits.dtype), device=logits.device)
    return targets.masked_fill(~inside, 0)[:, None], fault.masked_fill_(~inside, torch.nan)


def _zero_ignored(scored: Tensor, rows: Tensor | None, numbers: tuple[Tensor, ...]) -> None:
    """Zero what belongs to rows without a scored token: on a GPU, which computed all rows, `numbers` [N]; else `rows` [N, V]."""
    if scored.is_cuda:
        for x in numbers:
            x.masked_fill_(~scored, 0)
    elif rows is not None:
        for a, b in _runs(~scored):
            rows[a:b] = 0


def _scored_blocks(scored: Tensor, logits: Tensor) -> list[tuple[int, int]]:
    """`row_blocks` of the scored rows; on a GPU of all rows, since reading the mask would wait for the device."""
    runs = [(0, len(scored))] if scored.is_cuda else _runs(scored)
    return [block for start, end in runs for block in row_blocks(start, end, logits)]

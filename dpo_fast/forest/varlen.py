"""Forest attention on CUDA in bf16 and fp16: flash attention over variable-length segments with gathered keys.

Segment k's queries are its own rows, and its keys are the rows of its ancestors and its own, causal from the bottom right.
The gathered keys and values are not kept: backward gathers them again. It adds up the gradients of a row over the segments
that read the row, in float32 and in a fixed order.

Flash attention's own backward pass adds the gradient of q with atomics, so its bits differ from run to run. Under
`torch.use_deterministic_algorithms(True)` (`full_determinism` of transformers' TrainingArguments sets it) torch takes the
slower deterministic algorithm of the same kernel, and everything here gives the same bits on every run.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from .packing import PrefixForest


def varlen_attention_forest(query, key, value, forest: PrefixForest, scale, window=None, kernels=None) -> torch.Tensor:
    """[1, H, T, Dk], [1, Hkv, T, Dk], [1, Hkv, T, Dv] -> [1, T, H, Dv]; `window` counts positions.

    `kernels` = (forward, backward) with the signatures of `flash_forward` and `flash_backward`, for tests on a CPU.
    """
    width = value.shape[-1]
    # Flash attention needs one head size for keys and values, a multiple of 8; padding zeros change no score and no output.
    padded = -(-max(query.shape[-1], width) // 8) * 8
    q, k, v = (_widened(x[0].transpose(0, 1), padded) for x in (query, key, value))
    out = _Varlen.apply(q, k, v, forest, scale, window, kernels or (flash_forward, flash_backward))
    return out[None, ..., :width]


def _widened(x: torch.Tensor, width: int) -> torch.Tensor:
    """[T, H, D] padded with zeros to D = width; x itself, not a copy, where it has that width."""
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


class _Varlen(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, forest, scale, window, kernels: tuple[Callable, Callable]):
        both = torch.cat((k, v), 1)
        out, *rest = kernels[0](q, *_gathered(both, forest), forest, scale, window)
        ctx.save_for_backward(q, both, out, *rest)
        ctx.forest, ctx.scale, ctx.window, ctx.backward_kernel = forest, scale, window, kernels[1]
        return out

    @staticmethod
    def backward(ctx, grad):
        q, both, out, *rest = ctx.saved_tensors
        forest, gathered = ctx.forest, _gathered(both, ctx.forest)
        dq, dk, dv = ctx.backward_kernel(grad.contiguous(), q, *gathered, out, *rest, forest, ctx.scale, ctx.window)
        return dq, *sum_over_readers(torch.cat((dk, dv), 1), forest).chunk(2, 1), *[None] * 4


def _gathered(both: torch.Tensor, forest: PrefixForest) -> tuple[torch.Tensor, ...]:
    """Keys and values side by side [T, 2 Hkv, D] -> the keys and the values that each segment sees, [keys, Hkv, D] each."""
    return both.index_select(0, forest.key_rows).chunk(2, 1)


def sum_over_readers(gradient: torch.Tensor, forest: PrefixForest) -> torch.Tensor:
    """Gradients of gathered rows [sum of keys, ...], added up per row [T, ...] in float32 and in the order of the segments.

    Equivalent except for the order: `zeros(T, ...).index_add(0, forest.key_rows, gradient)`.
    """
    if "readers" not in forest.cache:
        order = torch.argsort(forest.key_rows, stable=True)
        counts = torch.zeros(forest.rows, dtype=torch.int64, device=order.device)
        counts.index_add_(0, forest.key_rows, torch.ones_like(forest.key_rows))
        forest.cache["readers"] = order, counts
    order, counts = forest.cache["readers"]
    wide = torch.promote_types(gradient.dtype, torch.float32)
    rows = gradient.index_select(0, order).to(wide).flatten(1)
    total = torch.segment_reduce(rows, "sum", lengths=counts, axis=0, unsafe=True)
    return total.view(forest.rows, *gradient.shape[1:]).to(gradient.dtype)


def flash_forward(q, k, v, forest: PrefixForest, scale, window):
    """[T, H, D] and twice [keys, Hkv, D] -> output [T, H, D], log-sum-exp [H, T], and two tensors that backward needs."""
    out, lse, rng_state, unused, _ = torch.ops.aten._flash_attention_forward(
        q, k, v, forest.cu_q, forest.cu_k, forest.max_q, forest.max_k, 0.0, True, False, scale=scale, **_left(window)
    )
    return out, lse, rng_state, unused


def flash_backward(grad, q, k, v, out, lse, rng_state, unused, forest: PrefixForest, scale, window):
    """Gradients of q [T, H, D] and of the gathered k and v [keys, Hkv, D]."""
    return torch.ops.aten._flash_attention_backward(
        grad, q, k, v, out, lse, forest.cu_q, forest.cu_k, forest.max_q, forest.max_k, 0.0, True, rng_state, unused,
        scale=scale, **_left(window),
    )  # fmt: skip


def _left(window: int | None) -> dict[str, int]:
    # A key's place in its segment's list is its position, so a window in keys is the same window in positions.
    return {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}

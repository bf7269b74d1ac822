"""Attention over a prefix forest, registered with transformers under the name `dpo_fast`.

The forest reaches the function as the keyword argument `forest` of `model.model(...)`, so it survives gradient
checkpointing. A call without a forest must say so (`forest=None, plain_attention=True`, see model.py): without its forest,
attention would take every branch of a forest for a new document and silently give wrong numbers.

The CPU, and fp32 on CUDA, run one SDPA call per block of the forest; bf16 and fp16 on CUDA run `varlen.py`. Soft-capping
and attention sinks need plain matrix products on the CPU and FlexAttention on CUDA. This file knows no model and no loss.
"""

import contextvars
import math

import torch
import torch.nn.functional as F

from .packing import PrefixForest

NAME = "dpo_fast"

# True while a trunk runs over a forest in this context.
ON_FOREST = contextvars.ContextVar("dpo_fast_on_forest", default=False)

# The cost of one more SDPA call, in attention scores of one head (two cores, fp32, 9 heads of 64, 1280 rows).
CALL_COST = 5_000


@torch.compiler.disable  # a compiled layer would hold one forest's lengths, and would be compiled again for the next
def forest_attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # [1, H, T, Dk]
    key: torch.Tensor,  # [1, Hkv, T, Dk]
    value: torch.Tensor,  # [1, Hkv, T, Dv]
    attention_mask: torch.Tensor | None,
    *,
    forest: PrefixForest | None = None,
    plain_attention: bool = False,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: output [1, T, H, Dv].

    Equivalent: `softmax(q @ k.T * scaling + mask) @ v` with the mask `k <= q < subtree_end[k]` (and
    `q_position - k_position < sliding_window`). Raises RuntimeError without a forest, and ValueError for dropout, position
    biases and masks, which cannot be honoured on a forest.
    """
    if forest is None:
        if not plain_attention:
            raise RuntimeError(
                "the model's attention was called without its prefix forest: call the model itself, not its layers, "
                "or undo dpo_fast.forest.model.prepare_model() with restore_model()"
            )
        return plain_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, softcap=softcap, s_aux=s_aux
        )
    if dropout:
        raise ValueError(f"attention dropout {dropout} cannot be shared between completions: set it to 0")
    if kwargs.get("position_bias") is not None:
        raise ValueError("attention with a position bias is not supported on a prefix forest")
    if attention_mask is not None and attention_mask.numel():
        raise ValueError("the model makes an attention mask of its own, which a prefix forest cannot follow")
    # `forest_mask` passes on the window of the layer's mask; some models (qwen2_moe) give the window nowhere else.
    window = None if attention_mask is None else attention_mask.shape[0]
    if sliding_window not in (None, window):
        raise ValueError(f"a sliding window of {sliding_window} is asked for, but the layer's mask has {window}")
    sliding_window = window
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if softcap is not None or s_aux is not None:
        if query.is_cuda:
            from .flex import flex_attention_forest

            return flex_attention_forest(query, key, value, forest, scale, sliding_window, softcap, s_aux), None
        out = block_attention(query, key, value, forest, scale, sliding_window, softcap, s_aux)
    elif query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and query.shape[-1] <= 256:
        from .varlen import varlen_attention_forest

        return varlen_attention_forest(query, key, value, forest, scale, sliding_window), None
    else:
        out = block_attention(query, key, value, forest, scale, sliding_window)
    # The output is contiguous like transformers' own, since some models (jetmoe, afmoe) take a view of it.
    return out.transpose(1, 2).contiguous(), None


def block_attention(query, key, value, forest, scale, sliding_window=None, softcap=None, s_aux=None) -> torch.Tensor:
    """One attention call per block of `plan_blocks`, [1, H, T, Dk] -> [1, H, T, Dv]."""
    blocks = plan_blocks(forest)
    sizes = [end - start for start, end in forest.spans]
    keys, values = key.split(sizes, dim=2), value.split(sizes, dim=2)
    queries = query.split([sum(sizes[first:last]) for first, last, _ in blocks], dim=2)
    masks = block_masks(forest, sliding_window, query.device)
    outputs = []
    for q, (first, last, above), mask in zip(queries, blocks, masks, strict=True):
        picked = [*above, *range(first, last)]
        k = torch.cat([keys[i] for i in picked], dim=2) if len(picked) > 1 else keys[first]
        v = torch.cat([values[i] for i in picked], dim=2) if len(picked) > 1 else values[first]
        if softcap is not None or s_aux is not None:
            mask = _causal(q.shape[2], q.device) if mask is None else mask
            outputs.append(matmul_attention(q, k, v, mask, scale, softcap, s_aux))
        else:
            # SDPA uses a float mask of the query's type as it is, and would convert a boolean one in every call.
            bias = None if mask is None else _bias(forest, mask, first, sliding_window, q.dtype)
            gqa = q.shape[1] != k.shape[1]
            outputs.append(
                F.scaled_dot_product_attention(
                    q, k, v, attn_mask=bias, is_causal=mask is None, scale=scale, enable_gqa=gqa
                )
            )
    return torch.cat(outputs, dim=2)


def matmul_attention(q, k, v, mask, scale, softcap=None, s_aux=None) -> torch.Tensor:
    """Attention written out, with soft-capped scores (gemma2) and one sink logit per head (gpt-oss, `s_aux` [H])."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = q @ k.transpose(2, 3) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    # The lowest number instead of -inf: padding rows of a plain batch see nothing, and their NaN would reach other rows.
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if s_aux is not None:
        sinks = s_aux.to(scores.dtype).view(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
        scores = torch.cat([scores, sinks], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(q.dtype)
    return weights[..., : k.shape[2]] @ v


def plan_blocks(forest: PrefixForest) -> list[tuple[int, int, tuple[int, ...]]]:
    """Cut the forest into blocks (first segment, last segment + 1, segments above) with the fewest attention scores.

    A block is a whole subtree under one mask, or one segment whose subtrees are blocks of their own. A short pair is one
    block. A long prompt is a block of its own, and so is each pair under a common system prompt, since one mask over all
    of them would be quadratic.
    """
    plan = forest.cache.get("blocks")
    if plan is None:
        plan = forest.cache["blocks"] = _plan(forest)
    return plan


def _plan(forest: PrefixForest) -> list[tuple[int, int, tuple[int, ...]]]:
    parents, count = forest.parents, len(forest.spans)
    sizes = [end - start for start, end in forest.spans]
    above: list[tuple[int, ...]] = []
    for parent in parents:
        above.append((*above[parent], parent) if parent >= 0 else ())
    depth = [sum(sizes[i] for i in a) for a in above]
    rows, last = list(sizes), list(range(1, count + 1))
    below = [0] * count  # cost of the children's subtrees, each cut in its cheapest way
    split = [False] * count
    for k in reversed(range(count)):
        whole = CALL_COST + rows[k] * (depth[k] + rows[k])
        apart = CALL_COST + sizes[k] * (depth[k] + sizes[k]) + below[k]
        split[k] = apart < whole
        parent = parents[k]
        if parent >= 0:
            rows[parent] += rows[k]
            last[parent] = max(last[parent], last[k])
            below[parent] += min(apart, whole)
    blocks, k = [], 0
    while k < count:
        end = k + 1 if split[k] else last[k]
        blocks.append((k, end, above[k]))
        k = end
    return blocks


def block_masks(forest: PrefixForest, window: int | None, device: torch.device) -> list[torch.Tensor | None]:
    """A boolean mask [rows, keys] per block, True where attention is allowed; None for a plain causal block."""
    key = ("masks", window, device)
    if key not in forest.cache:
        forest.cache[key] = [_block_mask(forest, block, window, device) for block in plan_blocks(forest)]
    return forest.cache[key]


def _block_mask(forest, block, window, device) -> torch.Tensor | None:
    first, last, above = block
    start, end = forest.spans[first][0], forest.spans[last - 1][1]
    keys = torch.cat([torch.arange(*forest.spans[i], device=device) for i in [*above, *range(first, last)]])
    positions = forest.position_ids.to(device)
    windowed = window is not None and int(positions[start:end].max()) >= window
    if last - first == 1 and not above and not windowed:
        return None
    queries = torch.arange(start, end, device=device)[:, None]
    allowed = (keys <= queries) & (queries < forest.subtree_end.to(device)[keys])
    if windowed:
        allowed &= positions[queries] - positions[keys] < window
    return allowed


def _bias(forest, mask, first, window, dtype) -> torch.Tensor:
    key = ("bias", first, window, dtype, mask.device)
    if key not in forest.cache:
        forest.cache[key] = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, -math.inf)
    return forest.cache[key]


def _causal(n: int, device: torch.device) -> torch.Tensor:
    return torch.ones(n, n, dtype=torch.bool, device=device).tril()


def plain_forward(module, query, key, value, attention_mask, *, scaling, dropout, softcap=None, s_aux=None):
    """Attention of an ordinary (padded, cached, generated) batch: transformers' SDPA, or written out where SDPA cannot do it."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if softcap is None and s_aux is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling)
    mask = attention_mask
    if mask is None:
        rows, keys = query.shape[2], key.shape[2]
        mask = torch.ones(rows, keys, dtype=torch.bool, device=query.device).tril(keys - rows)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return matmul_attention(query, key, value, mask, scale, softcap, s_aux).transpose(1, 2).contiguous(), None


def forest_mask(*args, local_size: int | None = None, **kwargs):
    """transformers' mask interface: SDPA's mask for a plain call, and only the layer's window over a forest.

    The forest itself is the mask there. The window is passed on as a tensor [window, 0], or None without one.
    """
    from transformers.masking_utils import sdpa_mask

    if not ON_FOREST.get():
        return sdpa_mask(*args, local_size=local_size, **kwargs)
    return None if local_size is None else torch.empty(local_size, 0)


def register() -> None:
    """Make `dpo_fast` a valid `attn_implementation` of transformers; calling it again changes nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, forest_attention)
    AttentionMaskInterface.register(NAME, forest_mask)

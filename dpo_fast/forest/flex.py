"""Forest attention on CUDA where scores are soft-capped (gemma2) or a head has a sink (gpt-oss): FlexAttention.

It is compiled once for all shapes. FlexAttention has no backward pass on a CPU; `attention.matmul_attention` runs there.
"""

import functools

import torch
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention

from .packing import PrefixForest


def flex_attention_forest(
    query, key, value, forest: PrefixForest, scale, window=None, softcap=None, s_aux=None, compiled=True
) -> torch.Tensor:
    """[1, H, T, Dk], [1, Hkv, T, Dk], [1, Hkv, T, Dv] -> [1, T, H, Dv]; `s_aux` [H] sink logits."""
    attend = _compiled() if compiled else flex_attention

    def capped(score, batch, head, q, k):
        return softcap * torch.tanh(score / softcap)

    result = attend(
        query,
        key,
        value,
        score_mod=None if softcap is None else capped,
        block_mask=block_mask(forest, window),
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
        return_aux=None if s_aux is None else AuxRequest(lse=True),
    )
    if s_aux is None:
        return result.transpose(1, 2)
    out, aux = result
    # A sink takes a share of the softmax and has no value: exp(lse) / (exp(lse) + exp(sink)) of the weight is left.
    kept = torch.sigmoid(aux.lse - s_aux.to(aux.lse.dtype)[None, :, None])
    return (out * kept[..., None].to(out.dtype)).transpose(1, 2)


def block_mask(forest: PrefixForest, window: int | None) -> BlockMask:
    """The forest as FlexAttention's mask, made once per forest and window."""
    key = ("flex", window)
    if key not in forest.cache:
        end, position = forest.subtree_end, forest.position_ids

        def allowed(batch, head, q, k):
            inside = (k <= q) & (q < end[k])
            return inside if window is None else inside & (position[q] - position[k] < window)

        forest.cache[key] = create_block_mask(allowed, None, None, forest.rows, forest.rows, device=end.device)
    return forest.cache[key]


@functools.cache
def _compiled():
    return torch.compile(flex_attention, dynamic=True)

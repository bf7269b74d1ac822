"""Attention over a forest written out: one query row and one head at a time, and forests to try it on."""

import torch

from dpo_fast.forest.packing import PrefixForest

SYSTEM = list(range(50, 90))  # a system prompt


def ancestors(forest):
    """Rows that each row may see, in order, by walking the parents."""
    above, keys = [], []
    for (start, end), parent in zip(forest.spans, forest.parents, strict=True):
        before = keys[parent] if parent >= 0 else []
        above += [[*before, *range(start, row + 1)] for row in range(start, end)]
        keys.append([*before, *range(start, end)])
    return above


def brute_force(query, key, value, forest, scale, window=None, softcap=None, s_aux=None):
    """Attention for one query row and one head at a time: [1, H, T, Dk] -> [1, H, T, Dv]."""
    seen = ancestors(forest)
    groups = query.shape[1] // key.shape[1]
    heads = []
    for h in range(query.shape[1]):
        rows = []
        for row in range(query.shape[2]):
            # The path is in the order of positions: a window is its last entries.
            keys = seen[row] if window is None else seen[row][-window:]
            scores = key[0, h // groups, keys] @ query[0, h, row] * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            top = scores.max() if s_aux is None else torch.maximum(scores.max(), s_aux[h])
            weights = (scores - top).exp()
            total = weights.sum() if s_aux is None else weights.sum() + (s_aux[h] - top).exp()
            rows.append((weights / total) @ value[0, h // groups, keys])
        heads.append(torch.stack(rows))
    return torch.stack(heads)[None]


def inputs(forest, heads=4, kv_heads=2, dk=6, dv=4, seed=0, dtype=torch.float64):
    rng = torch.Generator().manual_seed(seed)
    shapes = ((heads, dk), (kv_heads, dk), (kv_heads, dv))
    qkv = [torch.randn(1, h, forest.rows, d, generator=rng, dtype=torch.float64) * 2 for h, d in shapes]
    return [x.to(dtype).requires_grad_() for x in qkv]


def with_gradients(function, leaves):
    """Output and gradients under a fixed random gradient of the output."""
    out = function(*leaves)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(out.dtype)
    return out.detach(), *torch.autograd.grad(out, leaves, grad)


TREES = {
    "pair": ([[1, 2, 3]] * 2, [[4, 5, 6], [7, 8]]),
    "two pairs": ([[1, 2, 3]] * 2 + [[9]] * 2, [[4, 5, 6], [7, 8], [1, 2], [3, 4, 5]]),
    "branch in a branch": ([[1, 2]] * 4, [[3, 4, 5], [3, 4, 6, 7], [3, 8, 9, 1], [5, 5, 5]]),
    "system prompt": ([[*SYSTEM, 1]] * 2 + [[*SYSTEM, 2, 3]] * 2, [[4, 5, 6], [7, 8, 1], [1, 2], [3, 4, 5]]),
    "one sequence": ([[1, 2, 3]], [[4, 5, 6, 7]]),
    "one row": ([[1]], [[4]]),
}


def tree(name, share="prefix", keep_last=True):
    return PrefixForest.build(*TREES[name], share=share, keep_last=keep_last)

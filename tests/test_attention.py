"""Attention over a forest against softmax under a brute-force mask, and the plan of its blocks."""

import functools
import itertools

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dpo_fast.forest import attention
from dpo_fast.forest.attention import block_attention, forest_attention, matmul_attention, plan_blocks
from dpo_fast.forest.packing import PrefixForest

SYSTEM = list(range(50, 90))  # a system prompt that all prompts begin with


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


def compare(forest, window=None, softcap=None, sinks=False, **shape):
    leaves = inputs(forest, **shape)
    if sinks:
        leaves.append(torch.linspace(-2, 3, leaves[0].shape[1], dtype=torch.float64).requires_grad_())

    def call(function, q, k, v, s_aux=None):
        return function(q, k, v, forest, 0.37, window, softcap, s_aux)

    ours = with_gradients(functools.partial(call, block_attention), leaves)
    theirs = with_gradients(functools.partial(call, brute_force), leaves)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)
    return ours


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


# ---- Values and gradients ----


@pytest.mark.parametrize("window", [None, 1, 2, 3, 5, 100])
@pytest.mark.parametrize("share", ["none", "prompt", "prefix"])
@pytest.mark.parametrize("name", TREES)
def test_equals_brute_force(name, share, window):
    if name == "system prompt" and window in (1, 2, 3):
        window = 20 * window  # around the system prompt's length
    compare(tree(name, share), window)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("name", ["two pairs", "branch in a branch", "one sequence"])
def test_softcap_and_sinks(name, softcap, sinks, window):
    compare(tree(name), window, softcap, sinks)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1), (1, 1)])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_grouped_heads(heads, kv_heads, softcap):
    compare(tree("branch in a branch"), softcap=softcap, heads=heads, kv_heads=kv_heads)


@pytest.mark.parametrize("cost", [0, 10**12])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("name", TREES)
def test_the_plan_does_not_change_the_result(monkeypatch, name, window, cost):
    usual = compare(tree(name), window)
    monkeypatch.setattr(attention, "CALL_COST", cost)
    forest = tree(name)
    assert len(plan_blocks(forest)) == (len(forest.spans) if cost == 0 else forest.parents.count(-1))
    for a, b in zip(usual, compare(forest, window), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


token = st.integers(0, 2)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    sequences=st.lists(st.tuples(st.integers(0, 3), st.lists(token, min_size=1, max_size=6)), min_size=1, max_size=6),
    window=st.one_of(st.none(), st.integers(1, 6)),
    softcap=st.sampled_from([None, 1.5]),
    sinks=st.booleans(),
    cost=st.sampled_from([0, 10, 40, 10**9]),
)
def test_random_forests(sequences, window, softcap, sinks, cost):
    prompts = [[1, 2, 0], [1], [2, 2, 2, 2], SYSTEM[:17]]
    forest = PrefixForest.build([prompts[i] for i, _ in sequences], [c for _, c in sequences], keep_last=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "CALL_COST", cost)
        compare(forest, window, softcap, sinks)


def test_windows_and_types_of_one_forest_do_not_mix():
    """Layers of one model may differ in window and type, while the forest keeps the masks."""
    forest = tree("branch in a branch")
    first = [compare(forest, window) for window in (None, 2, 4)]
    again = [compare(forest, window) for window in (4, 2, None)]
    for a, b in zip(first, reversed(again), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    single = inputs(forest, dtype=torch.float32)
    out = block_attention(*single, forest, 0.37, 2)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), first[1][0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"softcap": 1.5}, {"sliding_window": 3}])
def test_bf16_is_as_exact_as_plain_attention(options):
    """Error at most twice that of torch's own SDPA (or written-out attention) under a dense mask, plus 1e-3."""
    forest = tree("branch in a branch")
    leaves = inputs(forest, dtype=torch.bfloat16)
    window, softcap = options.get("sliding_window"), options.get("softcap")
    exact = with_gradients(
        lambda q, k, v: brute_force(q, k, v, forest, 0.37, window, softcap),
        [x.detach().double().requires_grad_() for x in leaves],
    )
    mask = torch.zeros(forest.rows, forest.rows, dtype=torch.bool)
    for row, keys in enumerate(ancestors(forest)):
        mask[row, keys if window is None else keys[-window:]] = True

    def plain(q, k, v):
        if softcap is not None:
            return matmul_attention(q, k, v, mask, 0.37, softcap)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=0.37, enable_gqa=True)

    ours = with_gradients(lambda q, k, v: block_attention(q, k, v, forest, 0.37, window, softcap), leaves)
    for x, y, truth in zip(ours, with_gradients(plain, leaves), exact, strict=True):
        assert x.dtype == torch.bfloat16
        error, other = ((z.double() - truth).abs().max() / truth.abs().max() for z in (x, y))
        assert error <= 2 * other + 1e-3


# ---- The interface ----


def test_interface_transposes_and_scales():
    forest = tree("two pairs")
    q, k, v = inputs(forest)
    out, weights = forest_attention(None, q, k, v, None, forest=forest)
    assert weights is None
    torch.testing.assert_close(out.transpose(1, 2), brute_force(q, k, v, forest, q.shape[-1] ** -0.5))
    out, _ = forest_attention(None, q, k, v, None, forest=forest, scaling=0.1, softcap=2.0)
    torch.testing.assert_close(out.transpose(1, 2), brute_force(q, k, v, forest, 0.1, softcap=2.0))


def test_the_window_comes_from_the_mask():
    """Some models (qwen2_moe) state a layer's window only through its mask."""
    forest = tree("branch in a branch")
    q, k, v = inputs(forest)
    mask = torch.empty(2, 0)
    for options in ({}, {"sliding_window": 2}):
        out, _ = forest_attention(None, q, k, v, mask, forest=forest, **options)
        torch.testing.assert_close(out.transpose(1, 2), brute_force(q, k, v, forest, q.shape[-1] ** -0.5, 2))
    for wrong, options in ((None, {"sliding_window": 2}), (mask, {"sliding_window": 3})):
        with pytest.raises(ValueError, match="sliding window"):
            forest_attention(None, q, k, v, wrong, forest=forest, **options)


def test_refusals():
    forest = tree("pair")
    q, k, v = inputs(forest)
    with pytest.raises(RuntimeError, match="called without its prefix forest"):
        forest_attention(None, q, k, v, None)
    with pytest.raises(ValueError, match=r"dropout 0\.1 cannot be shared"):
        forest_attention(None, q, k, v, None, forest=forest, dropout=0.1)
    with pytest.raises(ValueError, match="position bias"):
        forest_attention(None, q, k, v, None, forest=forest, position_bias=torch.zeros(1))
    with pytest.raises(ValueError, match="attention mask of its own"):
        forest_attention(None, q, k, v, torch.zeros(1, 1, forest.rows, forest.rows), forest=forest)


class _Layer(torch.nn.Module):
    num_key_value_groups = 2
    is_causal = True


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 7])
def test_plain_calls(rows, sinks, softcap):
    """An ordinary batch: causal without a mask (also after a cache), and under a padding mask with empty rows."""
    forest = PrefixForest.build([[1, 2, 3]], [[4, 5, 6, 7]], keep_last=True)
    q, k, v = (x.detach() for x in inputs(forest))
    s_aux = torch.linspace(-2, 3, 4, dtype=torch.float64) if sinks else None
    options = {"plain_attention": True, "scaling": 0.3, "softcap": softcap, "s_aux": s_aux}
    if rows in (1, 7) or sinks or softcap:
        exact = brute_force(q, k, v, forest, 0.3, None, softcap, s_aux)[:, :, -rows:]
        out, _ = forest_attention(_Layer(), q[:, :, -rows:], k, v, None, **options)
        torch.testing.assert_close(out.transpose(1, 2), exact)
    # The left padding of two tokens sees nothing, and its rows must not put NaN into what others read.
    mask = torch.ones(7, 7, dtype=torch.bool).tril()
    mask[:, :2] = False
    out, _ = forest_attention(_Layer(), q, k, v, mask[None, None], **options)
    assert out.isfinite().all()
    rest = PrefixForest.build([[1, 2, 3]], [[4, 5]], keep_last=True)
    exact = brute_force(q[:, :, 2:], k[:, :, 2:], v[:, :, 2:], rest, 0.3, None, softcap, s_aux)
    torch.testing.assert_close(out.transpose(1, 2)[:, :, 2:], exact)


# ---- The plan ----


def chain(forest, k):
    above = []
    while forest.parents[k] >= 0:
        k = forest.parents[k]
        above.insert(0, k)
    return tuple(above)


def cost(forest, blocks):
    size = [end - start for start, end in forest.spans]
    total = 0
    for first, last, above in blocks:
        rows = sum(size[first:last])
        total += attention.CALL_COST + rows * (rows + sum(size[i] for i in above))
    return total


def possible_plans(forest):
    """Every way to cut the forest: each segment reached is a block with its subtree, or alone."""

    def subtree_end(k):
        return next((j for j in range(k + 1, len(forest.spans)) if k not in chain(forest, j)), len(forest.spans))

    def from_segment(k):
        if k == len(forest.spans):
            yield []
            return
        for end in {k + 1, subtree_end(k)}:
            for rest in from_segment(end):
                yield [(k, end, chain(forest, k)), *rest]

    return from_segment(0)


# Completions of few kinds of pieces: deep trees with segments of several sizes.
piece = st.sampled_from([[1], [2, 2, 2], [0] * 6])
pieces = st.lists(piece, min_size=1, max_size=5).map(lambda parts: list(itertools.chain(*parts)))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    sequences=st.lists(st.tuples(st.integers(0, 3), pieces), min_size=1, max_size=7),
    call_cost=st.sampled_from([0, 5, 30, 100, 5000]),
)
# The root is better cut only because its child is cut too.
@example(sequences=[(1, [1]), (1, [2] + [0] * 6), (1, [2] + [1] * 6)], call_cost=30)
def test_the_plan_tiles_the_forest_at_the_lowest_cost(sequences, call_cost):
    prompts = [[1, 2, 0], [1], [2, 2, 2, 2], SYSTEM[:17]]
    forest = PrefixForest.build([prompts[i] for i, _ in sequences], [c for _, c in sequences], keep_last=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "CALL_COST", call_cost)
        blocks = plan_blocks(forest)
        assert list(itertools.chain(*(range(first, last) for first, last, _ in blocks))) == list(
            range(len(forest.spans))
        )
        plans = list(possible_plans(forest))
        assert blocks in plans
        assert cost(forest, blocks) == min(cost(forest, plan) for plan in plans)
        assert plan_blocks(forest) is blocks


def test_sensible_blocks():
    rng = torch.Generator().manual_seed(0)

    def ids(n):
        return torch.randint(1000, 30000, (n,), generator=rng).tolist()

    def shape(forest):
        return [(last - first, above) for first, last, above in plan_blocks(forest)]

    # Short pairs: a block each, without keys from elsewhere.
    prompts = [ids(30), ids(50), ids(10)]
    pairs = PrefixForest.build([*prompts, *prompts], [ids(20) for _ in range(6)])
    assert shape(pairs) == [(3, ())] * 3
    # Twenty such pairs under one system prompt of 500 tokens: the prompt once, and a block for each pair.
    system = ids(500)
    prompts = [[*system, *ids(30)] for _ in range(20)]
    forest = PrefixForest.build([*prompts, *prompts], [ids(20) for _ in range(40)])
    assert shape(forest) == [(1, ()), *[(3, (0,))] * 20]
    # Long completions do not see each other: one mask over both would compute a quarter of a square for nothing.
    prompt = ids(4000)
    assert shape(PrefixForest.build([prompt] * 2, [ids(4000), ids(4000)])) == [(1, ()), (1, (0,)), (1, (0,))]

"""Attention over a forest against softmax under a brute-force mask, and the interface that models call."""

import functools

import pytest
import torch
from attention_tools import SYSTEM, TREES, ancestors, brute_force, inputs, tree, with_gradients
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_fast.forest import attention
from dpo_fast.forest.attention import block_attention, forest_attention, matmul_attention, plan_blocks
from dpo_fast.forest.packing import PrefixForest


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

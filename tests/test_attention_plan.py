"""The plan of an attention's blocks: it tiles the forest, at the lowest cost of all ways to cut it."""

import itertools

import pytest
import torch
from attention_tools import SYSTEM
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dpo_fast.forest import attention
from dpo_fast.forest.attention import plan_blocks
from dpo_fast.forest.packing import PrefixForest


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


# Completions are made of a few kinds of pieces, so that trees are deep and their segments of several sizes.
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

"""Items that cancel in the gradient of a margin loss are moved to the end, and nothing else changes."""

import itertools

import pytest
import torch
from forest_tools import token
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_fast.forest import packing
from dpo_fast.forest.packing import SHARE_MODES, PrefixForest


def check_cancelling(examples, share, keep_last, fewest):
    """What cancels in a margin loss is last, and everything else is as it was; membership by sets of paths."""
    whole = PrefixForest.from_pairs(examples, share=share, keep_last=keep_last)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "MIN_LEFT_OUT", fewest)
        moved = whole.cancelling_last()
    n, pairs = len(whole.targets), len(examples)
    paths = [set(path) for path in whole.path_index.tolist()]
    cancels = [all((item in paths[i]) == (item in paths[pairs + i]) for i in range(pairs)) for item in range(n)]
    left_out = sum(cancels) if fewest <= sum(cancels) < n else 0
    assert whole.grad_items == n
    assert moved.grad_items == n - left_out
    for name in vars(whole):
        if name not in ("live_rows", "targets", "path_index", "grad_items"):
            assert getattr(moved, name) is getattr(whole, name), name
    for name in ("live_rows", "targets"):
        values, before = getattr(moved, name), getattr(whole, name)
        assert values.dtype == before.dtype
        assert torch.equal(moved.gather_paths(values), whole.gather_paths(before)), name
        if left_out:
            assert torch.equal(values[: n - left_out], before[~torch.tensor(cancels)]), name
    assert moved.path_index.eq(n).equal(whole.path_index.eq(n))
    return left_out


def ranked(prompt, *completions):
    """All pairs of several completions of a prompt, the better first."""
    return [
        {"prompt_ids": prompt, "chosen_ids": a, "rejected_ids": b} for a, b in itertools.combinations(completions, 2)
    ]


def test_items_that_cancel_by_hand():
    two = ranked([1, 2], [3, 4, 5], [3, 4, 6, 7])
    assert check_cancelling(two, "prefix", False, 1) == 2
    assert check_cancelling(two, "prefix", False, 2) == 2
    assert check_cancelling(two, "prefix", False, 3) == 0  # too few to leave out
    assert check_cancelling(two, "prompt", False, 1) == 0
    # All three pass 3; 4 is passed by one side of two pairs.
    assert check_cancelling(ranked([1, 2], [3, 4, 5], [3, 4, 6], [3, 7]), "prefix", False, 1) == 1
    # A pair whose sides are equal needs nothing; alone it keeps its rows.
    same = ranked([1, 2], [3, 4], [3, 4])
    assert check_cancelling(same, "prefix", False, 1) == 0
    assert check_cancelling(same + ranked([8], [3], [4]), "prefix", False, 1) == 2
    assert check_cancelling(same + ranked([1, 2], [3, 4], [5]), "prefix", False, 1) == 0


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    prompts=st.lists(st.lists(token, max_size=4), min_size=1, max_size=3),
    pairs=st.lists(
        st.tuples(st.integers(0, 2), *[st.lists(token, min_size=2, max_size=6)] * 2), min_size=1, max_size=6
    ),
    share=st.sampled_from(SHARE_MODES),
    keep_last=st.booleans(),
    fewest=st.integers(1, 3),
)
def test_items_that_cancel_in_random_forests(prompts, pairs, share, keep_last, fewest):
    examples = [
        {"prompt_ids": prompts[i % len(prompts)], "chosen_ids": chosen, "rejected_ids": rejected}
        for i, chosen, rejected in pairs
    ]
    check_cancelling(examples, share, keep_last, fewest)

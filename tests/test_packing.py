"""The prefix forest against what it stands for: sets of distinct prefixes, walked slowly in plain Python."""

import pytest
import torch
from forest_tools import CASES, LONG, SHORT, check, token
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_fast.forest.packing import SHARE_MODES, PrefixForest


@pytest.mark.parametrize("keep_last", [False, True])
@pytest.mark.parametrize("share", SHARE_MODES)
@pytest.mark.parametrize("case", CASES)
def test_cases(case, share, keep_last):
    check(CASES[case], share, keep_last)


prompt = st.one_of(
    st.lists(token, max_size=4),
    st.lists(token, max_size=3).map(lambda tail: LONG + tail),
    st.lists(token, max_size=2).map(lambda tail: SHORT + tail),
    st.lists(token, max_size=1).map(lambda tail: [*LONG, 1, *LONG, *tail]),
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    prompts=st.lists(prompt, min_size=1, max_size=4),
    completions=st.lists(st.tuples(st.integers(0, 3), st.lists(token, min_size=1, max_size=5)), min_size=1, max_size=7),
    share=st.sampled_from(SHARE_MODES),
    keep_last=st.booleans(),
)
def test_random_forests(prompts, completions, share, keep_last):
    sequences = [(prompts[i % len(prompts)], c) for i, c in completions]
    if all(len(p) + len(c) == 1 for p, c in sequences):
        with pytest.raises(ValueError, match="no token to score"):
            check(sequences, share, keep_last)
    else:
        check(sequences, share, keep_last)


def rows(case, share, keep_last=False):
    sequences = CASES[case]
    forest = PrefixForest.build([p for p, _ in sequences], [c for _, c in sequences], share=share, keep_last=keep_last)
    return forest.rows


def test_rows_by_hand():
    # Prompt 2, then 3 4 . and 7 8 9 and 8 below a shared 3 (4 is shared by two): the last token of a leaf has no row.
    assert rows("branch in the middle", "prefix") == 2 + 1 + 1 + 1 + 2 + 0
    assert rows("branch in the middle", "prompt") == 2 + 3 + 4 + 1
    assert rows("branch in the middle", "none") == 5 + 6 + 3
    assert rows("branch in the middle", "prefix", keep_last=True) == 2 + 1 + 1 + 2 + 3 + 1
    assert rows("identical completions", "prefix") == 4
    assert rows("equal prompts apart", "prompt") == 2 + 2 + 1
    assert rows("short prefix of two prompts", "prefix") == 2 * len(SHORT) + 2
    assert rows("long prefix of two prompts", "prefix") == len(LONG) + 2
    assert rows("long prefix of two prompts", "prompt") == 2 * len(LONG) + 2


def test_a_short_common_beginning_does_not_hinder_long_ones():
    """Two pairs of prompts, each pair with a long text of its own, all four behind the same BOS."""
    other = [t + 100 for t in LONG]
    prompts = [[1, *LONG, 5], [1, *LONG, 6], [1, *other, 5], [1, *other, 6]]
    forest = PrefixForest.build(prompts, [[7]] * 4)
    assert forest.rows == 2 * (1 + len(LONG)) + 4


def test_from_pairs_orders_chosen_before_rejected():
    examples = [
        {"prompt_ids": [1, 2], "chosen_ids": [3, 4], "rejected_ids": [5]},
        {"prompt_ids": [6], "chosen_ids": [7], "rejected_ids": [7, 8, 9]},
    ]
    for share in SHARE_MODES:
        pairs = PrefixForest.from_pairs(examples, share=share, keep_last=True)
        built = PrefixForest.build(
            [[1, 2], [6], [1, 2], [6]], [[3, 4], [7], [5], [7, 8, 9]], share=share, keep_last=True
        )
        assert pairs.lengths.tolist() == [2, 1, 1, 3]
        assert pairs.input_ids.tolist() == built.input_ids.tolist()
        assert pairs.path_index.tolist() == built.path_index.tolist()
        assert pairs.sequence_rows.tolist() == built.sequence_rows.tolist()


def test_ids_may_be_tensors_or_arrays():
    prompts, completions = [[1, 2], [1, 2]], [[3, 4], [3, 5]]
    lists = PrefixForest.build(prompts, completions)
    tensors = PrefixForest.build([torch.tensor(p) for p in prompts], [torch.tensor(c).numpy() for c in completions])
    assert lists.input_ids.tolist() == tensors.input_ids.tolist()
    assert lists.path_index.tolist() == tensors.path_index.tolist()


@pytest.mark.parametrize(
    ("prompts", "completions", "share", "message"),
    [
        ([[1]], [[2]], "all", "share='all' is not one of none, prompt, prefix"),
        ([], [], "prefix", "got 0 and 0"),
        ([[1]], [[2], [3]], "prefix", "got 1 and 2"),
        ([[1], [1]], [[2], []], "prefix", r"completions\[1\] is empty"),
        ([[]], [[2]], "prefix", "no token to score"),
        ([[], []], [[2], [3]], "none", "no token to score"),
    ],
)
def test_errors(prompts, completions, share, message):
    with pytest.raises(ValueError, match=message):
        PrefixForest.build(prompts, completions, share=share)


def test_gather_paths_and_its_gradient():
    sequences = CASES["branch in the middle"]
    forest = check(sequences, "prefix", False)
    values = torch.arange(1.0, len(forest.targets) + 1, dtype=torch.float64).requires_grad_()
    paths = forest.gather_paths(values)
    assert paths.shape == (3, 5)
    for s in range(3):
        length = int(forest.lengths[s])
        assert paths[s, :length].tolist() == [values[i].item() for i in forest.path_index[s, :length]]
        assert paths[s, length:].eq(0).all()
    # A token that several sequences share collects the coefficients of all of them.
    coefficients = torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64)
    (paths.sum(1) * coefficients).sum().backward()
    wanted = [
        sum(c for c, path in zip((1, 10, 100), forest.path_index.tolist(), strict=True) if item in path)
        for item in range(len(forest.targets))
    ]
    assert values.grad.tolist() == wanted
    assert 111 in wanted


def test_to_moves_every_tensor_and_drops_the_cache():
    forest = check(CASES["several groups"], "prefix", True)
    forest.cache["blocks"] = "of another device"
    moved = forest.to("meta")
    assert moved.cache == {}
    assert moved.spans == forest.spans
    assert moved.num_tokens == forest.num_tokens
    tensors = {k: v for k, v in vars(moved).items() if isinstance(v, torch.Tensor)}
    assert len(tensors) == 11
    assert all(t.is_meta for t in tensors.values())
    same = forest.to("cpu", non_blocking=True)
    assert all(torch.equal(getattr(same, k), getattr(forest, k)) for k in tensors)

"""The prefix forest against what it stands for: sets of distinct prefixes, walked slowly in plain Python."""

import itertools
import multiprocessing
import os
import pickle
import signal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from dpo_fast.forest import packing
from dpo_fast.forest.batch import ForestCollator, Part
from dpo_fast.forest.packing import SHARE_MODES, PrefixForest
from dpo_fast.forest.trie import MIN_SHARED_ACROSS_PROMPTS

LONG = list(range(100, 100 + MIN_SHARED_ACROSS_PROMPTS))
SHORT = LONG[:-1]

# Sequences (prompt, completion) of one forest each.
CASES = {
    "one completion": [([1, 2], [3, 4])],
    "one token each": [([1], [2])],
    "one-token completion": [([1, 2], [3]), ([1, 2], [4, 5])],
    "only one-token completions": [([1, 2], [3]), ([1, 2], [4]), ([1, 2], [3])],
    "empty prompt": [([], [3, 4, 5]), ([], [3, 6])],
    "empty prompt, different first tokens": [([], [3, 4]), ([], [5, 6, 7])],
    "empty prompt, one token beside another": [([], [3]), ([], [3, 4]), ([], [9])],
    "empty and other prompts": [([], [1, 2, 3]), ([1], [2, 4]), ([1, 2], [3])],
    "completion is a prefix of another": [([1, 2], [3, 4]), ([1, 2], [3, 4, 5, 6]), ([1, 2], [3])],
    "identical completions": [([1, 2], [3, 4, 5]), ([1, 2], [3, 4, 5])],
    "identical pairs": [([1, 2], [3, 4]), ([1, 2], [3, 4]), ([1, 2], [5]), ([1, 2], [5])],
    "branch in the middle": [([1, 2], [3, 4, 5, 6]), ([1, 2], [3, 4, 7, 8, 9]), ([1, 2], [3, 8])],
    "several groups": [([1, 2], [3, 4]), ([5], [6, 7, 8]), ([1, 2], [4, 4]), ([5], [6, 9])],
    "equal prompts apart": [([1, 2], [3]), ([7, 8], [3]), ([1, 2], [4]), ([7, 8], [4]), ([1, 2], [3, 4])],
    "short prefix of two prompts": [([*SHORT, 1], [2]), ([*SHORT, 3], [4])],
    "long prefix of two prompts": [([*LONG, 1], [2]), ([*LONG, 3], [4])],
    "long prefix of two, a third apart": [([*LONG, 1], [2, 3]), ([*LONG, 3], [4, 5]), ([100, 2], [3]), ([7], [8])],
    "long prefix, then a short one": [
        ([*LONG, 1, 2, 3], [2, 3]),
        ([*LONG, 1, 2, 4], [4, 5]),
        ([*LONG, 5], [3]),
        ([*LONG, 5], [3, 6]),
    ],
    "long prefix, then another": [([*LONG, *LONG, 1], [2]), ([*LONG, *LONG, 2], [2]), ([*LONG, 5], [3])],
    "prompt goes on as another's completion": [(LONG, [1, 2, 3]), ([*LONG, 1], [2, 4]), ([*LONG, 1, 2], [3])],
    "one sequence, two prompts": [(LONG, [1, 2]), ([*LONG, 1], [2]), ([], [*LONG, 1, 2])],
}


def expected_owners(sequences, share):
    """What may share a row: for each sequence and depth, the set of sequences that share the token there.

    Plain recursion over sets of sequences: no rows, no segments.
    """
    tokens = [[*prompt, *completion] for prompt, completion in sequences]
    owners = [[frozenset([s])] * len(t) for s, t in enumerate(tokens)]
    everyone = range(len(sequences))

    def same_prompt(s, other):
        return sequences[s][0] == sequences[other][0]

    if share == "prompt":
        for s in everyone:
            group = frozenset(o for o in everyone if same_prompt(s, o))
            owners[s][: len(sequences[s][0])] = [group] * len(sequences[s][0])
    if share == "prefix":

        def visit(members, depth):
            columns = zip(*(tokens[s] for s in members), strict=False)
            run = len(list(itertools.takewhile(lambda column: len(set(column)) == 1, columns)))
            several = any(not same_prompt(members[0], s) for s in members)
            if several and run - depth < MIN_SHARED_ACROSS_PROMPTS:
                # Too short a run to share: every prompt's own group keeps it, joined with those that go on alike.
                def branch(s):
                    inside = len(sequences[s][0]) > run
                    return ("token", tokens[s][run]) if inside else ("prompt", tuple(sequences[s][0]))

                start = depth
            else:
                for s in members:
                    owners[s][depth:run] = [frozenset(members)] * (run - depth)
                members = [s for s in members if len(tokens[s]) > run]
                branch, start = (lambda s: tokens[s][run]), run
            for key in {branch(s) for s in members}:
                visit([s for s in members if branch(s) == key], start)

        for first in {t[0] for t in tokens}:
            visit([s for s in everyone if tokens[s][0] == first], 0)
    return tokens, owners


def check(sequences, share, keep_last):
    """Every field of the forest against the slow description; returns the forest."""
    prompts, completions = [p for p, _ in sequences], [c for _, c in sequences]
    forest = PrefixForest.build(prompts, completions, share=share, keep_last=keep_last)
    tokens, owners = expected_owners(sequences, share)
    prefixes = [[tuple(t[: d + 1]) for d in range(len(t))] for t in tokens]

    # Nodes that must have a row: all of them with keep_last, else those with a successor.
    nodes, inner = set(), set()
    for s, t in enumerate(tokens):
        for d in range(len(t)):
            nodes.add((owners[s][d], prefixes[s][d]))
            if d + 1 < len(t):
                inner.add((owners[s][d], prefixes[s][d]))
    assert forest.rows == len(nodes if keep_last else inner)

    # Walk: paths of rows from each segment up to its root.
    assert forest.cu_q.tolist() == [0, *(end for _, end in forest.spans)]
    assert [start for start, _ in forest.spans] == forest.cu_q.tolist()[:-1]
    ancestors = {}
    row_node = {}
    keys = []
    for k, (start, end) in enumerate(forest.spans):
        assert start < end
        assert forest.parents[k] < k
        above = keys[forest.parents[k]] if forest.parents[k] >= 0 else []
        keys.append([*above, *range(start, end)])
        assert forest.key_rows[forest.cu_k[k] : forest.cu_k[k + 1]].tolist() == keys[k]
        for row in range(start, end):
            ancestors[row] = [*above, *range(start, row + 1)]
            path = tuple(forest.input_ids[ancestors[row]].tolist())
            assert forest.position_ids[row] == len(path) - 1
            row_node[row] = path
    assert len(forest.cu_k) == len(forest.cu_q) == len(forest.spans) + 1
    assert forest.cu_k[-1] == len(forest.key_rows)
    assert forest.max_q == max(end - start for start, end in forest.spans)
    assert forest.max_k == max(map(len, keys))
    ends = forest.subtree_end.tolist()
    for q in range(forest.rows):
        assert [k for k in range(forest.rows) if k <= q < ends[k]] == ancestors[q]

    # Scored tokens: each path's targets are the completion, each predicted by a row that has read what precedes it.
    n = len(forest.targets)
    assert len(forest.live_rows) == n
    counts = [0] * n
    item_node = {}
    for s, (prompt, completion) in enumerate(sequences):
        first = max(len(prompt), 1)
        scored = tokens[s][first:]
        assert forest.lengths[s] == len(scored)
        path = forest.path_index[s].tolist()
        assert path[len(scored) :] == [n] * (forest.path_index.shape[1] - len(scored))
        assert forest.targets[path[: len(scored)]].tolist() == scored
        for d, item in enumerate(path[: len(scored)], first):
            counts[item] += 1
            assert row_node[int(forest.live_rows[item])] == prefixes[s][d - 1]
            # Two sequences have the same item exactly where they may share the token.
            assert item_node.setdefault(item, (owners[s][d], prefixes[s][d])) == (owners[s][d], prefixes[s][d])
        assert completion == scored[len(scored) - len(completion) :] or not prompt
    assert len(set(item_node.values())) == n
    assert min(counts) > 0
    assert forest.path_index.shape == (len(sequences), int(forest.lengths.max()))

    if keep_last:
        walked = [row_node[row] for row in forest.sequence_rows.tolist()]
        assert walked == [p for one in prefixes for p in one]
    else:
        assert forest.sequence_rows.numel() == 0
    assert forest.num_tokens == sum(map(len, tokens))
    dtypes = {torch.int32: "subtree_end cu_q cu_k"}
    dtypes[torch.int64] = "input_ids position_ids live_rows targets path_index lengths key_rows sequence_rows"
    for dtype, names in dtypes.items():
        assert all(getattr(forest, name).dtype == dtype for name in names.split())
    return forest


@pytest.mark.parametrize("keep_last", [False, True])
@pytest.mark.parametrize("share", SHARE_MODES)
@pytest.mark.parametrize("case", CASES)
def test_cases(case, share, keep_last):
    check(CASES[case], share, keep_last)


# Few token ids and copied prompts, so that prefixes meet.
token = st.integers(0, 2)
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


# ---- Numbers of rows, by hand ----


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


# ---- Pairs ----


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


def test_ids_may_be_tensors_or_arrays():
    prompts, completions = [[1, 2], [1, 2]], [[3, 4], [3, 5]]
    lists = PrefixForest.build(prompts, completions)
    tensors = PrefixForest.build([torch.tensor(p) for p in prompts], [torch.tensor(c).numpy() for c in completions])
    assert lists.input_ids.tolist() == tensors.input_ids.tolist()
    assert lists.path_index.tolist() == tensors.path_index.tolist()


# ---- Errors ----


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


# ---- Tensors ----


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


def part_of(name: str) -> Part:
    forest = check(CASES[name], "prefix", True)
    return Part(
        forest, torch.arange(2), torch.tensor([[1.5, 2.5], [3.5, 4.5]]), 2, 7, 9, torch.tensor([0.5, 0.9]).double()
    )


def tensors_of(part: Part) -> dict[str, torch.Tensor]:
    return {**part.forest.tensors(), "ref_logps": part.ref_logps, "p_chosen": part.p_chosen}


def test_a_part_is_one_piece_of_memory():
    part = part_of("several groups")
    packed = part.pack()
    assert len({x.untyped_storage().data_ptr() for x in tensors_of(packed).values()}) == 1
    for name, x in tensors_of(packed).items():
        assert torch.equal(x, tensors_of(part)[name]), name
        assert x.dtype == tensors_of(part)[name].dtype
        assert x.data_ptr() % 16 == 0
    # From another process, as a worker sends it, it is one piece still.
    again = pickle.loads(pickle.dumps(packed))._views_of(packed.packed.clone())
    assert all(torch.equal(x, tensors_of(part)[name]) for name, x in tensors_of(again).items())
    assert (again.pairs, again.chosen_tokens, again.longest, again.forest.spans) == (2, 7, 9, part.forest.spans)


def test_a_part_moves_in_one_copy():
    class Copies(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.found = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "device" in (kwargs or {}) and torch.device(kwargs["device"]).type == "meta":
                self.found.append((str(func), kwargs["non_blocking"]))
            return func(*args, **(kwargs or {}))

    part = part_of("several groups")
    part.forest.cache["blocks"] = "of another device"
    with Copies() as copies:
        moved = part.on("meta")
    assert copies.found == [("aten._to_copy.default", True)]
    assert all(x.is_meta for x in tensors_of(moved).values())
    assert {name: (x.shape, x.dtype) for name, x in tensors_of(moved).items()} == {
        name: (x.shape, x.dtype) for name, x in tensors_of(part).items()
    }
    assert moved.forest.cache == {}
    assert moved.index is part.index
    assert part.on("cpu") is part


def test_accelerate_leaves_parts_alone():
    operations = pytest.importorskip("accelerate.utils.operations")
    batch = {"parts": [part_of("several groups")]}
    assert operations.send_to_device(batch, torch.device("meta"))["parts"][0] is batch["parts"][0]


def test_a_worker_that_collates_outlives_sigterm():
    """A signal to the whole process group stops a run in order; what stops must still get its batches."""
    rows = [{"prompt_ids": [5, 6], "chosen_ids": [7, 8], "rejected_ids": [9]}] * 64
    loader = torch.utils.data.DataLoader(rows, batch_size=2, num_workers=1, collate_fn=ForestCollator())
    batches = iter(loader)
    next(batches)
    for process in multiprocessing.active_children():
        os.kill(process.pid, signal.SIGTERM)
    assert sum(1 for _ in batches) == 31


@pytest.mark.gpu
def test_pin_memory():
    part = part_of("several groups").pin_memory()
    assert all(x.is_pinned() for x in tensors_of(part).values() if x.numel())
    moved = part.on("cuda")
    assert all(torch.equal(x.cpu(), tensors_of(part)[name]) for name, x in tensors_of(moved).items())

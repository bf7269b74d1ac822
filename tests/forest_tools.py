"""Small forests by name, and a slow check of every field of a forest: sets of distinct prefixes in plain Python."""

import itertools

import torch
from hypothesis import strategies as st

from dpo_fast.forest.packing import PrefixForest
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


# Few token ids and copied prompts, so that prefixes meet.
token = st.integers(0, 2)

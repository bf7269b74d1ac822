"""The walk that lays a prefix forest out: from sequences of token ids to the index tensors of `PrefixForest`.

Sequences that begin with the same ids go together until they part. Each run of shared tokens becomes a segment, depth
first, so that the rows of a subtree follow its root's.
"""

from collections.abc import Sequence

import numpy as np
import torch

# A shorter prefix common to different prompts (a lone BOS) costs a gather per layer and saves nothing.
MIN_SHARED_ACROSS_PROMPTS = 16


def common_prefix_length(a: Sequence[int], b: Sequence[int]) -> int:
    """The number of leading ids that two sequences share."""
    n = min(len(a), len(b))
    different = np.asarray(a[:n]) != np.asarray(b[:n])
    return int(different.argmax()) if different.any() else n


class Walk:
    """A depth-first walk over the trie of S sequences; the lists grow by one entry per segment. `share` is one of SHARE_MODES."""

    def __init__(self, prompts, completions, share: str, keep_last: bool):
        self.prompt_lengths = [len(p) for p in prompts]
        self.sequences = [
            np.concatenate([np.asarray(p, dtype=np.int64), np.asarray(c, dtype=np.int64)])
            for p, c in zip(prompts, completions, strict=True)
        ]
        self.keep_last = keep_last
        self.prompt_of = self._number_prompts()
        # The live item and the row of every position of every sequence; they are filled in as segments are emitted.
        self.items = [np.full(len(q), -1, dtype=np.int64) for q in self.sequences]
        self.row_of = [np.full(len(q), -1, dtype=np.int64) for q in self.sequences]
        self.ids, self.positions, self.live_rows, self.targets = [], [], [], []
        self.spans: list[tuple[int, int]] = []
        self.parents: list[int] = []
        self.rows = self.live = 0
        everyone = list(range(len(self.sequences)))
        # An entry of the stack: its sequences, their depth that is already emitted, the segment above, and how to go on.
        self.stack = []
        if share == "none":
            self._push([([s], 0, -1, "alone") for s in everyone])
        elif share == "prompt":
            self._push([(g, 0, -1, "prompt") for g in _group(everyone, self.prompt_of.__getitem__)])
        else:
            self._push([(g, 0, -1, "prefix") for g in self._by_token(everyone, 0)])
        while self.stack:
            self._visit(*self.stack.pop())

    def _number_prompts(self) -> list[int]:
        numbers: dict[bytes, int] = {}
        return [
            numbers.setdefault(q[:n].tobytes(), len(numbers))
            for q, n in zip(self.sequences, self.prompt_lengths, strict=True)
        ]

    def _push(self, entries) -> None:
        self.stack.extend(reversed(entries))

    def _by_token(self, members: list[int], depth: int) -> list[list[int]]:
        return _group(members, lambda s: int(self.sequences[s][depth]))

    def _next_in_prompt(self, s: int, depth: int) -> tuple[bool, int]:
        inside = depth < self.prompt_lengths[s]
        return inside, int(self.sequences[s][depth]) if inside else self.prompt_of[s]

    def _visit(self, members: list[int], depth: int, parent: int, mode: str) -> None:
        first = self.sequences[members[0]]
        if mode == "prompt":
            end = self.prompt_lengths[members[0]]
        else:
            end = min(common_prefix_length(first, self.sequences[s]) for s in members)
        prompts = {self.prompt_of[s] for s in members}
        if mode == "prefix" and len(prompts) > 1 and end - depth < MIN_SHARED_ACROSS_PROMPTS:
            # Sequences that go on alike may share a longer run; those of one prompt stay together.
            groups = _group(members, lambda s: self._next_in_prompt(s, end))
            self._push([(g, depth, parent, mode) for g in groups])
            return
        going_on = [s for s in members if len(self.sequences[s]) > end]
        segment = self._emit(members, depth, end, parent, leaf=not going_on)
        if mode == "prompt":
            self._push([([s], end, segment, "alone") for s in going_on])
        elif going_on:
            self._push([(g, end, segment, "prefix") for g in self._by_token(going_on, end)])

    def _emit(self, members: list[int], depth: int, end: int, parent: int, leaf: bool) -> int:
        """Append positions depth:end of the members as one segment; returns the parent of what follows."""
        tokens = self.sequences[members[0]][depth:end]
        # The last token of a leaf predicts nothing, so it gets no row.
        count = len(tokens) - (1 if leaf and not self.keep_last else 0)
        start = self.rows
        # The row before each token; the first token's is the last of the parent.
        rows = np.arange(start - 1, start - 1 + len(tokens))
        if len(tokens) and parent >= 0:
            rows[0] = self.spans[parent][1] - 1
        lowest = max(depth, 1, min(self.prompt_lengths[s] for s in members))
        live = np.arange(self.live, self.live + max(end - lowest, 0))
        self.live_rows.append(rows[lowest - depth :] if len(live) else rows[:0])
        self.targets.append(tokens[lowest - depth :] if len(live) else tokens[:0])
        self.live += len(live)
        for s in members:
            if len(live):
                self.items[s][lowest:end] = live
            self.row_of[s][depth : depth + count] = np.arange(start, start + count)
        if count <= 0:
            return parent
        self.ids.append(tokens[:count])
        self.positions.append(np.arange(depth, depth + count))
        self.rows += count
        self.spans.append((start, start + count))
        self.parents.append(parent)
        return len(self.spans) - 1

    def fields(self) -> dict:
        """The fields of the PrefixForest, by name. Raises ValueError where no sequence has a token to score."""
        if self.live == 0:
            raise ValueError("no token to score: every sequence is a single token without a prompt")
        starts = np.array([start for start, _ in self.spans] + [self.rows], dtype=np.int64)
        subtree_end = np.zeros(self.rows, dtype=np.int32)
        key_rows: list[np.ndarray] = []
        for k, (start, end) in enumerate(self.spans):
            above = self.parents[k]
            own = np.arange(start, end)
            key_rows.append(np.concatenate([key_rows[above], own]) if above >= 0 else own)
            subtree_end[key_rows[k]] = end  # depth-first order: the last writer of a row is its last descendant
        key_counts = [len(k) for k in key_rows]
        paths = [items[max(n, 1) :] for items, n in zip(self.items, self.prompt_lengths, strict=True)]
        path_index = np.full((len(paths), max(map(len, paths))), self.live, dtype=np.int64)
        for s, path in enumerate(paths):
            path_index[s, : len(path)] = path
        lengths = [len(q) for q in self.sequences]
        return dict(
            input_ids=_join(self.ids),
            position_ids=_join(self.positions),
            subtree_end=torch.from_numpy(subtree_end),
            live_rows=_join(self.live_rows),
            targets=_join(self.targets),
            path_index=torch.from_numpy(path_index),
            lengths=torch.tensor([len(p) for p in paths]),
            cu_q=torch.from_numpy(starts.astype(np.int32)),
            cu_k=torch.from_numpy(np.cumsum([0, *key_counts]).astype(np.int32)),
            key_rows=_join(key_rows),
            sequence_rows=_join(self.row_of) if self.keep_last else torch.zeros(0, dtype=torch.int64),
            spans=tuple(self.spans),
            parents=tuple(self.parents),
            max_q=int(np.diff(starts).max(initial=0)),
            max_k=max(key_counts, default=0),
            num_tokens=sum(lengths),
            grad_items=self.live,
        )


def _join(parts: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64))


def _group(members: list[int], key) -> list[list[int]]:
    """Members with equal keys together, in order of first appearance."""
    groups: dict = {}
    for member in members:
        groups.setdefault(key(member), []).append(member)
    return list(groups.values())

"""Batches that are filled to a budget of tokens instead of a number of pairs, the pairs of one prompt side by side.

Which pairs share a batch is decided once, from the seed alone; every epoch takes the batches in another order (as fairseq
does), so that all epochs have the same number of steps. Nothing depends on the number of workers that load them.
"""

from collections.abc import Iterator

import numpy as np

from ..data.examples import Examples


class TokenBatches:
    """A batch sampler: lists of indices into `examples` whose forest takes at most `budget` tokens.

    seed: None keeps the order of the data, in every epoch. drop_last: leave out the batch that is filled last.

    Raises ValueError for a pair that is larger than the budget.
    """

    batch_size = None  # accelerate's name for batches of unequal sizes

    def __init__(self, examples: Examples, share: str, budget: int, seed: int | None, drop_last: bool = False):
        sizes = examples.pair_tokens(share)
        large = np.flatnonzero(sizes > budget)
        if len(large):
            raise ValueError(
                f"{len(large)} pairs have more tokens than the {budget} of a batch (tokens_per_step divided by processes and "
                f"gradient_accumulation_steps; pair {large[0]} has {sizes[large[0]]}): raise tokens_per_step or lower "
                "max_length"
            )
        self.seed, self.epoch, self.drop_last = seed, 0, drop_last
        self.batches = _fill(examples, sizes, share, budget, seed)
        if drop_last and len(self.batches) > 1:
            self.batches.pop()

    # accelerate tells the epoch to the sampler of a batch sampler.
    sampler = property(lambda self: self)

    def set_epoch(self, epoch: int) -> None:
        """The order of which epoch comes next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        order = np.arange(len(self.batches))
        if self.seed is not None:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(order)
        for i in order:
            yield self.batches[i].tolist()


def _fill(examples: Examples, sizes: np.ndarray, share: str, budget: int, seed: int | None) -> list[np.ndarray]:
    """Pairs prompt by prompt into the open batch, or into a new one where they do not fit."""
    prompts, numbers = np.unique(examples.column("prompt"), return_inverse=True)
    order = np.argsort(numbers, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(numbers[order])) + 1) if len(prompts) else []
    groups.sort(key=lambda group: group[0])  # of first appearance
    if seed is not None:
        groups = [groups[i] for i in np.random.default_rng(seed).permutation(len(groups))]
    shared = examples.column("shared")
    batches, batch, room = [], [], budget
    for group in groups:
        several = len(group) > 1 and share != "none"
        inside: set[bytes] = set()  # what the open batch holds of this prompt
        for i in group.tolist():
            tokens, names = int(sizes[i]), set()
            if several:
                example = examples[i]
                tokens, names = _added(example, tokens, int(shared[i]), share, inside)
            if tokens > room:
                batches.append(np.array(batch))
                batch, room, inside = [], budget, set()
                tokens = int(sizes[i])
            batch.append(i)
            room -= tokens
            inside |= names
    return [*batches, np.array(batch)] if batch else batches


def _added(example, alone: int, shared: int, share: str, inside: set[bytes]) -> tuple[int, set[bytes]]:
    """Tokens that a pair adds, at most, beside others of its prompt (`inside`), and what it is known by from then on.

    alone: its tokens without them. shared: what its two completions begin with in common.
    """
    if "rejected_prompt_ids" in example:  # two prompts: counted as if alone
        return alone, set()
    sides = {b"." + example[side].tobytes(): len(example[side]) for side in ("chosen_ids", "rejected_ids")}
    prompt = 0 if b"prompt" in inside else len(example["prompt_ids"])
    if share == "prompt":
        return prompt + len(example["chosen_ids"]) + len(example["rejected_ids"]), {b"prompt"}
    new = sides.keys() - inside
    # Where one of the two is there already, the other goes on from what they share.
    again = shared if new and len(sides) == 2 else 0
    return prompt + sum(sides[name] for name in new) - again, {b"prompt", *sides}

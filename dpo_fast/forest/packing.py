"""The prefix forest: every distinct token of a batch once, in one row without padding.

Sequences (prompt + completion) that begin with the same token ids form a tree. The trees follow each other in one row of
tokens; inside a tree the tokens are in depth-first order and positions continue from the shared part. One int32 per token
is the whole attention mask: `allowed(q, k)  <=>  k <= q < subtree_end[k]`.

Everything here is index arithmetic on the CPU, done in the collator. It knows no model, no loss and no device.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from .paths import sum_logps
from .trie import Walk, common_prefix_length

SHARE_MODES = ("none", "prompt", "prefix")

# Leaving out rows costs one more pass over the head's weight. Fewer rows than this save less than that: the two break even
# at 32 to 64 rows on 2 CPU cores with V 49152, D 576.
MIN_LEFT_OUT = 64


@dataclasses.dataclass
class PrefixForest:
    """Index tensors for one forest of S sequences in T rows with N live items (K segments, C longest completion).

    A *segment* is a run of rows without a branch; its keys are its ancestors' rows and its own. A *live item* is a
    distinct completion token: it is predicted by the hidden state of row `live_rows[n]` and its id is `targets[n]`.
    The last token of a leaf predicts nothing, so it has no row unless `keep_last` is set (mixture-of-experts models
    count it in their auxiliary loss). A first token without a predecessor (empty prompt) is not scored.
    """

    input_ids: torch.Tensor  # [T] int64
    position_ids: torch.Tensor  # [T] int64
    subtree_end: torch.Tensor  # [T] int32, row after the last row of the token's subtree
    live_rows: torch.Tensor  # [N] int64, the row that predicts the item
    targets: torch.Tensor  # [N] int64
    path_index: torch.Tensor  # [S, C] int64, live items of each sequence in order; N where the completion has ended
    lengths: torch.Tensor  # [S] int64, scored tokens of each sequence
    cu_q: torch.Tensor  # [K + 1] int32, rows of segment k are cu_q[k]:cu_q[k + 1]
    cu_k: torch.Tensor  # [K + 1] int32, keys of segment k are key_rows[cu_k[k]:cu_k[k + 1]]
    key_rows: torch.Tensor  # [sum of keys] int64
    sequence_rows: torch.Tensor  # [sum of lengths] int64, rows of every sequence in turn (empty unless keep_last)
    spans: tuple[tuple[int, int], ...]  # row range of each segment
    parents: tuple[int, ...]  # parent segment of each segment, -1 at a root
    max_q: int
    max_k: int
    num_tokens: int  # tokens of all sequences, with nothing shared and nothing padded
    grad_items: int  # how many live items take part in the backward pass; they come first
    cache: dict = dataclasses.field(default_factory=dict, repr=False)  # masks that attention keeps between layers

    @property
    def rows(self) -> int:
        """T, the number of tokens that the trunk computes."""
        return self.input_ids.numel()

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "PrefixForest":
        """The same forest with its tensors on `device`."""
        return self.with_tensors({k: x.to(device, non_blocking=non_blocking) for k, x in self.tensors().items()})

    def tensors(self) -> dict[str, torch.Tensor]:
        """Its tensors by the names of their fields."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: x for name, x in fields.items() if isinstance(x, torch.Tensor)}

    def with_tensors(self, tensors: Mapping[str, torch.Tensor]) -> "PrefixForest":
        """The same forest with these tensors, and nothing kept of the old ones."""
        return dataclasses.replace(self, **tensors, cache={})

    def gather_paths(self, token_values: torch.Tensor) -> torch.Tensor:
        """Values of the live items along each sequence, [N] -> [S, C], zero past the end.

        Equivalent: `torch.stack([F.pad(token_values[path], (0, C - len(path))) for path in paths])`.
        """
        padded = torch.cat([token_values, token_values.new_zeros(1)])
        return padded[self.path_index]

    def sum_paths(self, token_logps: torch.Tensor, ld_alpha: float | None = None) -> torch.Tensor:
        """Summed log-probs of the 2B sequences of B pairs, [N] -> [2, B]: chosen, rejected. `ld_alpha`: see `sum_logps`."""
        partner = None if ld_alpha is None else self.lengths.view(2, -1).flip(0).flatten()
        paths = self.gather_paths(token_logps)
        return sum_logps(paths, self.lengths, partner_lengths=partner, ld_alpha=ld_alpha).view(2, -1)

    def cancelling_last(self) -> "PrefixForest":
        """The same forest of B pairs with the items that cancel in the gradient of a margin loss last, outside `grad_items`.

        A pair's two coefficients are opposite numbers there (`LossOptions.margin_only`), so an item cancels where each
        pair has it on both sides or on neither: `all((n in path[i]) == (n in path[B + i]) for i in range(B))`. Fewer than
        `MIN_LEFT_OUT` such items stay where they are. If all items cancel, they stay too: a gradient of zeros is still a
        gradient.
        """
        items = len(self.targets)
        chosen, rejected = self.path_index.chunk(2)
        # Where both sides of a pair follow the same prompt, a shared item has the same place in both paths. Where the
        # prompts differ, a shared item may have two places; it then counts as needed, which is safe.
        differ = chosen != rejected
        needed = torch.zeros(items + 1, dtype=torch.bool)
        needed[chosen[differ]] = needed[rejected[differ]] = True
        needed = needed[:items]
        count = int(needed.sum())
        if count == 0 or items - count < MIN_LEFT_OUT:
            return self
        order = torch.cat([needed.nonzero()[:, 0], (~needed).nonzero()[:, 0]])
        place = torch.full((items + 1,), items)
        place[order] = torch.arange(items)
        moved = {name: getattr(self, name)[order] for name in ("live_rows", "targets")}
        return dataclasses.replace(self, **moved, path_index=place[self.path_index], grad_items=count)

    @classmethod
    def build(
        cls,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        *,
        share: str = "prefix",
        keep_last: bool = False,
    ) -> "PrefixForest":
        """The forest of S sequences with one prompt and one completion each (repeat the prompt for several completions).

        share: "prefix" shares every common prefix, also of completions; "prompt" shares equal prompts and nothing of the
        completions; "none" packs the sequences one after the other.
        Raises ValueError for an unknown `share`, no sequences, different counts, an empty completion, or no token to
        score in any sequence.
        """
        if share not in SHARE_MODES:
            raise ValueError(f"share={share!r} is not one of {', '.join(SHARE_MODES)}")
        if len(prompts) != len(completions) or not prompts:
            raise ValueError(
                f"prompts and completions need one entry per sequence, got {len(prompts)} and {len(completions)}"
            )
        for s, completion in enumerate(completions):
            if len(completion) == 0:
                raise ValueError(f"completions[{s}] is empty: drop the pair or give it at least one token")
        return cls(**Walk(prompts, completions, share, keep_last).fields())

    @classmethod
    def from_pairs(
        cls, examples: Sequence[Mapping], *, share: str = "prefix", keep_last: bool = False
    ) -> "PrefixForest":
        """The forest of B pairs as 2B sequences: the B chosen first, then the B rejected in the same order.

        examples: mappings with `prompt_ids`, `chosen_ids` and `rejected_ids`, and `rejected_prompt_ids` where the rejected
        completion follows another prompt.
        """
        prompts = [e["prompt_ids"] for e in examples]
        others = [e.get("rejected_prompt_ids", e["prompt_ids"]) for e in examples]
        completions = [e["chosen_ids"] for e in examples] + [e["rejected_ids"] for e in examples]
        return cls.build(prompts + others, completions, share=share, keep_last=keep_last)


def pair_tokens(example: Mapping, share: str) -> int:
    """The largest number of rows that one pair can take: its distinct tokens under `share`."""
    prompt, chosen, rejected = (len(example[k]) for k in ("prompt_ids", "chosen_ids", "rejected_ids"))
    if "rejected_prompt_ids" in example:
        return prompt + len(example["rejected_prompt_ids"]) + chosen + rejected
    if share == "none":
        return 2 * prompt + chosen + rejected
    total = prompt + chosen + rejected
    if share == "prefix":
        total -= common_prefix_length(example["chosen_ids"], example["rejected_ids"])
    return total


def check_fits(sizes: np.ndarray, max_tokens: int) -> None:
    """Raise ValueError when a single pair is larger than `max_tokens`; `sizes` are the pairs' `pair_tokens`."""
    large = np.flatnonzero(sizes > max_tokens)
    if len(large):
        raise ValueError(
            f"{len(large)} pairs have more tokens than max_tokens_per_batch={max_tokens} (pair {large[0]} has "
            f"{sizes[large[0]]}): raise it to {sizes.max()} or lower max_length"
        )

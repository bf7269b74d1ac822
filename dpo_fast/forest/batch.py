"""The collator: batches of pairs become prefix forests, split into parts that fit `max_tokens_per_batch`."""

import dataclasses
from collections.abc import Mapping, Sequence

import torch

from .packing import PrefixForest, pair_tokens


@dataclasses.dataclass
class Part:
    """The input of one forward pass: B pairs of a batch (sequences 0..B-1 are chosen, B..2B-1 rejected)."""

    forest: PrefixForest
    index: torch.Tensor  # [B] int64, the pairs' places in their data set
    ref_logps: torch.Tensor | None  # [2, B] float32, the reference's chosen and rejected log-probs
    pairs: int  # B
    chosen_tokens: int  # scored tokens of the chosen completions, on the CPU so that nothing waits for the device
    longest: int = 0  # tokens of the longest sequence, the width of the same batch with padding
    p_chosen: torch.Tensor | None = None  # [B] float64, the chance that the chosen one is really better

    def to(self, device, non_blocking: bool = False) -> "Part":
        """The same part on `device`; `index` stays on the CPU."""
        ref, p_chosen = (
            None if x is None else x.to(device, non_blocking=non_blocking) for x in (self.ref_logps, self.p_chosen)
        )
        forest = self.forest.to(device, non_blocking)
        return dataclasses.replace(self, forest=forest, ref_logps=ref, p_chosen=p_chosen)

    def pin_memory(self) -> "Part":
        """The same part in page-locked memory (called by torch's DataLoader)."""
        ref, p_chosen = (None if x is None else x.pin_memory() for x in (self.ref_logps, self.p_chosen))
        return dataclasses.replace(self, forest=self.forest.pin_memory(), ref_logps=ref, p_chosen=p_chosen)


def padded_tokens(parts: Sequence[Part]) -> int:
    """Tokens of one batch whose sequences are padded to the longest, with nothing shared."""
    return 2 * sum(part.pairs for part in parts) * max(part.longest for part in parts)


class ForestCollator:
    """Examples -> {"parts": [Part, ...]}; every pair is in one part, and the order is kept.

    An example has `prompt_ids`, `chosen_ids`, `rejected_ids`, and may have `index`, `p_chosen`, `ref_chosen_logps` and
    `ref_rejected_logps` (floats). `margin` says that the loss is `LossOptions.margin_only`: items whose coefficients
    cancel then need no backward pass.
    """

    def __init__(
        self, share: str = "prefix", keep_last: bool = False, max_tokens: int | None = None, margin: bool = False
    ):
        self.share, self.keep_last, self.max_tokens, self.margin = share, keep_last, max_tokens, margin

    def __call__(self, examples: Sequence[Mapping]) -> dict[str, list[Part]]:
        return {"parts": [self.part(group) for group in self.split(examples)]}

    def part(self, examples: Sequence[Mapping]) -> Part:
        """All `examples` in one forest."""
        ref = None
        if "ref_chosen_logps" in examples[0]:
            ref = torch.tensor([[e[f"ref_{side}_logps"] for e in examples] for side in ("chosen", "rejected")])
            if not ref.isfinite().all():
                raise ValueError("ref_chosen_logps and ref_rejected_logps must be finite numbers")
        forest = PrefixForest.from_pairs(examples, share=self.share, keep_last=self.keep_last)
        if self.margin:
            forest = forest.cancelling_last()
        index = torch.tensor([e.get("index", -1) for e in examples])
        pairs = len(examples)
        lengths = (len(e["prompt_ids"]) + max(len(e["chosen_ids"]), len(e["rejected_ids"])) for e in examples)
        p_chosen = None
        if "p_chosen" in examples[0]:
            p_chosen = torch.tensor([e["p_chosen"] for e in examples], dtype=torch.float64)
        return Part(forest, index, ref, pairs, int(forest.lengths[:pairs].sum()), max(lengths), p_chosen)

    def split(self, examples: Sequence[Mapping]) -> list[Sequence[Mapping]]:
        """The examples in consecutive groups whose tokens fit `max_tokens`."""
        if self.max_tokens is None:
            return [examples]
        groups, room = [], 0
        for example in examples:
            size = pair_tokens(example, self.share)
            if not groups or size > room:
                groups.append([])
                room = self.max_tokens
            groups[-1].append(example)
            room -= size
        return groups

"""The collator: batches of pairs become prefix forests, split into parts that fit `max_tokens_per_batch`."""

import dataclasses
import signal
from collections.abc import Mapping, Sequence

import torch

from .packing import PrefixForest, pair_tokens

_ALIGNED = 16  # bytes


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
    packed: torch.Tensor | None = None  # [bytes], of which all tensors but `index` are views; None before `pack`

    # Not called `to`: accelerate calls that of whatever a batch holds, and waits for each copy.
    def on(self, device: torch.device | str) -> "Part":
        """The same part on `device`, by one copy that nobody waits for where the part is pinned; `index` stays on the CPU."""
        if torch.device(device).type == "cpu":
            return self
        part = self if self.packed is not None else self.pack()
        return part._views_of(part.packed.to(device, non_blocking=True))

    def pin_memory(self) -> "Part":
        """The same part in page-locked memory, one piece (called by torch's DataLoader)."""
        part = self if self.packed is not None else self.pack()
        return part._views_of(part.packed.pin_memory())

    def pack(self) -> "Part":
        """The same part, its tensors views of one piece of memory."""
        sizes = [-(-x.nbytes // _ALIGNED) * _ALIGNED for x in self._tensors().values()]
        packed = torch.empty(sum(sizes), dtype=torch.uint8)
        views, start = {}, 0
        for (name, x), size in zip(self._tensors().items(), sizes, strict=True):
            views[name] = packed[start : start + x.nbytes].view(x.dtype).view(x.shape).copy_(x)
            start += size
        return self._with(views, packed)

    def _views_of(self, packed: torch.Tensor) -> "Part":
        """A packed part in another piece of memory that holds the same bytes."""
        places = {name: (x, x.storage_offset() * x.element_size()) for name, x in self._tensors().items()}
        views = {name: packed[at : at + x.nbytes].view(x.dtype).view(x.shape) for name, (x, at) in places.items()}
        return self._with(views, packed)

    def _tensors(self) -> dict[str, torch.Tensor]:
        """What a device needs."""
        own = {"ref_logps": self.ref_logps, "p_chosen": self.p_chosen}
        return {**self.forest.tensors(), **{name: x for name, x in own.items() if x is not None}}

    def _with(self, tensors: dict[str, torch.Tensor], packed: torch.Tensor) -> "Part":
        own = {name: tensors.pop(name) for name in ("ref_logps", "p_chosen") if name in tensors}
        return dataclasses.replace(self, forest=self.forest.with_tensors(tensors), packed=packed, **own)


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
        parts = [self.part(group) for group in self.split(examples)]
        if torch.utils.data.get_worker_info() is not None:
            # A signal to the whole process group lets a run end in order, and until then it takes batches.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            parts = [part.pack() for part in parts]  # one piece of shared memory each
        return {"parts": parts}

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

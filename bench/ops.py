"""What is measured: ops with the work that they cannot avoid, and random batches for them.

An op is a row of OPS. Who computes it is a row of SYSTEMS (systems.py), so a benchmark is a loop over two tables.
"""

import dataclasses
import functools

import torch
import torch.nn.functional as F
from torch import Tensor

BETA = 0.1


@dataclasses.dataclass(frozen=True)
class Op:
    """One measured piece of work; `grads` names the inputs whose gradient is part of it."""

    function: str
    grads: tuple[str, ...] = ()
    reads: int = 0  # reads of the scored rows of the logits
    writes: int = 0  # writes of all rows of the logits, since ignored ones get zeros
    gemms: int = 0  # GEMMs of 2 N D V operations each


OPS = {
    "token_logps": Op("token_logps", reads=1),
    "token_logps + gradient": Op("token_logps", ("logits",), reads=2, writes=1),
    "sequence_logps": Op("sequence_logps", reads=1),
    "dpo_loss + gradient": Op("dpo_loss", ("logits",), reads=2, writes=1),
    "linear_token_logps": Op("linear_token_logps", gemms=1),
    "linear_token_logps + gradient, frozen head": Op("linear_token_logps", ("hidden",), gemms=2),
    "linear_token_logps + gradient, trained head": Op("linear_token_logps", ("hidden", "weight"), gemms=3),
    "linear_dpo_loss + gradient, frozen head": Op("linear_dpo_loss", ("hidden",), gemms=2),
    "linear_dpo_loss + gradient, trained head": Op("linear_dpo_loss", ("hidden", "weight"), gemms=3),
}
# The ops that torch.compile is tried on; compiling one takes seconds at every size.
COMPILED = ("token_logps", "dpo_loss + gradient", "linear_token_logps", "linear_dpo_loss + gradient, trained head")


@dataclasses.dataclass
class Batch:
    """2B sequences of T rows, of which some are prompt. Hidden-in ops get the rows that predict a scored token, as in training."""

    targets: Tensor  # [2B, T], -100 in prompts
    logits: Tensor | None = None  # [2B, T, V]
    padded: Tensor | None = None  # [2B, T, D], for systems that take prompt rows through the head too
    hidden: Tensor | None = None  # [N, D], the scored rows of `padded`
    weight: Tensor | None = None  # [V, D]
    live_targets: Tensor | None = None  # [N]
    cu_seqlens: Tensor | None = None  # [2B + 1], on the CPU
    segments: Tensor | None = None  # [N], the sequence of each row
    upstream: Tensor | None = None  # the gradient of the token log-probs

    @property
    def scored(self) -> int:
        return int((self.targets != -100).sum())

    def cast(self, dtype: torch.dtype, grads: tuple[str, ...] = ()) -> "Batch":
        """The same numbers in `dtype` (shared where they have it already), with `grads` as leaves that need a gradient."""
        changed = {}
        for field in dataclasses.fields(self):
            x = getattr(self, field.name)
            if x is not None and x.is_floating_point():
                changed[field.name] = x.detach().to(dtype).requires_grad_(field.name in grads)
        return dataclasses.replace(self, **changed)


def make_batch(op: Op, pairs, t, d, v, dtype, device, *, live=0.5, seed=0) -> Batch:
    """A random batch for `op`: completions have random lengths, and a share `live` of all rows is scored.

    Logits have a standard deviation of 2, so that the softmax has peaks.
    """
    rng = torch.Generator(device).manual_seed(seed)
    random = functools.partial(torch.randn, generator=rng, device=device, dtype=dtype)
    host = torch.Generator().manual_seed(seed)
    lengths = torch.full((2 * pairs,), t)
    if live < 1:
        # One side of a pair is longer by as much as the other is shorter.
        extra = torch.randint(-t // 4, t // 4 + 1, (pairs,), generator=host)
        lengths = int(live * t) + torch.cat([extra, -extra])
    targets = torch.randint(v, (2 * pairs, t), generator=host)
    targets[torch.arange(t) < t - lengths[:, None]] = -100
    batch = Batch(targets.to(device))
    if not op.gemms:
        batch.logits = random(2 * pairs, t, v).mul_(2)
        batch.upstream = torch.randn(2 * pairs, t, generator=rng, device=device)
        return batch
    keep = batch.targets != -100
    batch.padded = random(2 * pairs, t, d)
    batch.weight = random(v, d).mul_(2 / d**0.5)
    batch.hidden, batch.live_targets = batch.padded[keep], batch.targets[keep]
    batch.cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    batch.segments = torch.repeat_interleave(torch.arange(2 * pairs), lengths).to(device)
    batch.upstream = torch.randn(len(batch.hidden), generator=rng, device=device)
    return batch

"""Special values and strides for the samples of the table of ops: functions that edit leaves and targets, or lay them out anew."""

import math
from collections.abc import Callable

import torch
from op_samples import REFERENCE_FREE, SIDES


def masked(leaves, targets, row):
    """Every third word has no probability; no target is one of them."""
    leaves["logits"][..., ::3] = -math.inf
    targets[(targets >= 0) & (targets % 3 == 0)] += 1


def masked_target(leaves, targets, row):
    """As `masked`, and one target has no probability."""
    masked(leaves, targets, row)
    targets.view(-1)[(targets.view(-1) >= 0).nonzero()[0]] = 0


def mostly(low: float) -> Callable:
    """Nine words in ten are `low`: blocks and lanes of nothing else occur."""

    def edit(leaves, targets, row):
        x = leaves["logits"]
        keep = torch.rand(x.shape, generator=torch.Generator().manual_seed(3)) < 0.1
        word = row.v * 6 // 7
        keep[..., word] = True
        x.masked_fill_(~keep, low)
        targets[targets >= 0] = word

    return edit


def first_block(leaves, targets, row):
    """The first 2048 words of one row are masked, the last of the other."""
    x = leaves["logits"]
    x[:, :2048] = -math.inf
    x[1] = x[1].flip(0)
    targets[:] = torch.tensor([row.v - 500, 3])


def peaked(size: float) -> Callable:
    """Probabilities of 1 and of exp(-size)."""

    def edit(leaves, targets, row):
        x, places = leaves["logits"].view(-1, row.v), torch.arange(targets.numel())
        x[places, targets.view(-1).clamp(min=0)] = size * (places % 3 - 1).double()

    return edit


def spread(factor: float) -> Callable:
    def edit(leaves, targets, row):
        leaves["logits"].mul_(factor)

    return edit


def far(leaves, targets, row):
    """Near 10000, where float32 has 10 bits behind the point."""
    leaves["logits"].mul_(64).round_().div_(64).add_(10000)


def apart(sign: int) -> Callable:
    """A margin of many nats for the losses without a reference."""

    def edit(leaves, targets, row):
        if row.options.get("loss_type") in REFERENCE_FREE:
            x = leaves["logits"]
            x[: sum(a + b for a, b in row.lengths[: len(row.lengths) // 2])] = 0
            x[torch.arange(len(x)), targets.clamp(min=0)] -= sign * 40.0

    return edit


def ignore(*which: int) -> Callable:
    """Sequences without a scored token; none given: all."""

    def edit(leaves, targets, row):
        ends = torch.tensor([0, *(a + b for a, b in row.lengths)]).cumsum(0)
        for s in which or range(len(row.lengths)):
            targets[slice(ends[s], ends[s + 1]) if row.packed else s] = -100

    return edit


ALL_IGNORED = ignore()


def other_index(leaves, targets, row):
    """What is ignored is a word of the vocabulary, which occurs."""
    targets[targets == -100] = row.options["ignore_index"]


def masked_bias(leaves, targets, row):
    leaves["bias"][[2, 5]] = -math.inf
    targets[:] = torch.tensor([0, 1, 3, 4, 6, 7, 8, 2])  # the last target is masked itself


def top_and_tail(leaves, targets, row):
    """Logits up to thousands: half of the targets have probability 1, others 1e-300 and less."""
    leaves["hidden"].mul_(1000)
    logits = torch.nn.functional.linear(*leaves.values())
    half = len(targets) // 2
    targets[:half] = logits.argmax(-1)[:half]


def _in(shape: Callable, index) -> Callable:
    """Logits inside of a larger memory of NaN."""

    def layout(leaves):
        x = leaves["logits"]
        memory = torch.full(shape(*x.shape), math.nan, dtype=x.dtype)
        memory[index].copy_(x)
        return {"logits": memory[index]}

    return layout


def _transposed(leaves):
    return {"logits": leaves["logits"].transpose(0, 1).contiguous().transpose(0, 1)}


def _expanded(leaves):
    x = leaves["logits"]
    return {"logits": x[:, :1].expand(x.shape)}


def _head(leaves):
    """Hidden states, weight and bias, none of which is contiguous."""
    hidden, weight, bias = leaves.values()
    return {
        "hidden": hidden.transpose(0, -1).contiguous().transpose(0, -1),
        "weight": weight.repeat_interleave(2, dim=1)[:, ::2] if len(hidden) % 2 == 0 else weight.t().contiguous().t(),
        "bias": bias.repeat_interleave(3)[::3],
    }


def repeated(leaves):
    return {**leaves, "hidden": leaves["hidden"][:1].expand(leaves["hidden"].shape)}


# Name -> layout, the lengths that it takes, packed or padded.
LAYOUTS = {
    "shifted": (_in(lambda s, t, v: (s, t + 1, v), (slice(None), slice(None, -1))), SIDES, False),
    "words": (_in(lambda *shape: (*shape[:-1], shape[-1] + 8), (..., slice(None, -8))), SIDES, False),
    "both": (
        _in(lambda s, t, v: (s, t + 1, v + 8), (slice(None), slice(1, None), slice(None, -8))),
        SIDES,
        False,
    ),
    "transposed": (_transposed, SIDES, False),
    "every second word": (_in(lambda s, t, v: (s, t, 2 * v), (..., slice(None, None, 2))), SIDES, False),
    "every second row": (_in(lambda s, t, v: (s, 2 * t, v), (slice(None), slice(None, None, 2))), SIDES, False),
    "expanded": (_expanded, SIDES, False),
    "one row": (_in(lambda s, t, v: (s, 3, v), (slice(None), slice(2, 3))), ((0, 1),) * 4, False),
    "at an odd address": (_in(lambda n, v: (n, v + 5), (slice(None), slice(3, -2))), SIDES, True),
    "every second packed row": (_in(lambda n, v: (2 * n, v), slice(None, None, 2)), SIDES, True),
    "packed words": (_in(lambda n, v: (n, v + 7), (slice(None), slice(None, -7))), SIDES, True),
}
HEAD = _head

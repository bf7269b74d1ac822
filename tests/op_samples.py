"""How a row of the table of ops (op_table.py) becomes tensors: batches, special values, strides.

What is not scored is NaN for the op and finite for the truth, and so is the memory between rows: nobody may read it.
"""

import dataclasses
import inspect
import math
from collections.abc import Callable

import torch
from op_tools import pairs
from torch import Tensor

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
REFERENCE_FREE = {"sft", "simpo", "orpo"}
# (prompt, completion) of each sequence, the chosen first: four ragged pairs, five sequences, two pairs of equal size.
LENGTHS = ((2, 3), (0, 1), (1, 4), (3, 2), (2, 2), (0, 5), (1, 1), (3, 3))
SHORT = ((2, 3), (0, 1), (1, 4), (0, 5), (3, 0))
SIDES = ((1, 4), (0, 5), (2, 3), (4, 1))


@dataclasses.dataclass(frozen=True)
class Row:
    """One sample of an op."""

    v: int = 37
    width: int = 5  # of hidden states
    lengths: tuple = LENGTHS
    packed: bool = False
    options: dict = dataclasses.field(default_factory=dict)  # the op's and the truth's
    own: dict = dataclasses.field(default_factory=dict)  # the op's alone: they change no number
    needs: tuple | None = None  # the leaves that need a gradient; None: all
    grad: float = 1.0  # of the loss; of log-probs a random one, or this number expanded
    bias: bool = True
    ref: str | float | None = "random"  # of a loss: log-probs, +-log-probs of this size, "hidden" states, none
    edit: Callable | None = None  # (leaves, targets, row): special values, in place
    layout: Callable | None = None  # leaves -> leaves of other strides
    tile: int | None = None  # rows of logits (in the wide type) at a time
    tile_bytes: int | None = None
    kept: int | None = None  # rows that the workspace holds
    dtypes: tuple = (F64, F32, BF16, F16)
    floor: float | None = None  # where the tolerance of the type is not enough, for a reason that the row says
    kernel: bool = False  # also in Triton's interpreter, where a row of logits takes a tenth of a second
    graph: bool = False  # opcheck and torch.compile: these take a second


@dataclasses.dataclass
class Sample:
    leaves: dict[str, Tensor]
    rest: dict
    grad: Tensor | float


def takes(function: Callable, name: str) -> bool:
    return name in inspect.signature(function).parameters


def sample(op, row: Row, dtype: torch.dtype, poisoned: bool) -> Sample:
    """The arguments of `op` in `dtype`, fresh; `poisoned`: as the op sees them."""
    if not takes(op.function, "targets"):
        return _of_log_probs(row, dtype)
    on_hidden = takes(op.function, "hidden")
    rng = torch.Generator().manual_seed(1)
    width, scale = (row.width, 1.0) if on_hidden else (row.v, 2.0)
    values, targets, cu = pairs(row.lengths, row.v, packed=row.packed, width=width, scale=scale)
    leaves = {"hidden" if on_hidden else "logits": values}
    if on_hidden:
        leaves["weight"] = torch.randn(row.v, width, generator=rng, dtype=F64)
        leaves["bias"] = torch.randn(row.v, generator=rng, dtype=F64)
        if not row.bias:
            del leaves["bias"]
    if row.edit:
        row.edit(leaves, targets, row)
    leaves = {name: x.to(dtype) for name, x in leaves.items()}
    leaves = row.layout(leaves) if row.layout else leaves
    index = row.options.get("ignore_index", -100)
    scored = targets != (-100 if index is None else index)
    rows = next(iter(leaves.values()))
    rest = {name: x.to(wide(dtype)) if _floating(x) else x for name, x in row.options.items()}
    rest |= {"targets": targets}
    if row.packed and takes(op.function, "cu_seqlens"):
        rest["cu_seqlens"] = cu
    grad = row.grad if op.loss else _grad(op, row, targets, scored, poisoned, dtype)
    if op.loss:
        rest |= _reference(row, leaves, rng, dtype)
    if poisoned and 0 not in rows.stride():
        for x in (rows, rest.get("ref_hidden")):
            if x is not None:
                x[~scored] = math.nan
    return Sample(leaves, rest, grad)


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, F32)


def _floating(x) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _grad(op, row, targets, scored, poisoned, dtype):
    """Of log-probs: random, some 0; of a token that is not scored or past `grad_rows` it is not looked at."""
    per_sequence = takes(op.function, "average")
    if row.grad != 1.0:
        return torch.tensor(row.grad, dtype=wide(dtype)).expand(targets.shape)
    shape = (len(row.lengths),) if per_sequence else targets.shape
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=F64).to(wide(dtype))
    if not per_sequence:
        grad.view(-1)[1::5] = 0
        grad[~scored] = math.nan if poisoned else 0
        if "grad_rows" in row.own:
            grad[row.own["grad_rows"] :] = math.nan if poisoned else 0
    return grad


def _reference(row: Row, leaves: dict, rng, dtype: torch.dtype) -> dict:
    """What a loss takes of its reference."""
    names = row.options.get("loss_type", "sigmoid")
    names = {names} if isinstance(names, str) else set(names)
    if row.ref is None or names <= REFERENCE_FREE:
        return {}
    if row.ref == "hidden":
        shapes = {name: leaves[name].shape for name in ("hidden", "weight", "bias")}
        return {f"ref_{k}": torch.randn(shape, generator=rng, dtype=F64).to(dtype) for k, shape in shapes.items()}
    return {"ref_logps": _ref_logps(row).to(wide(dtype))}


def _ref_logps(row: Row) -> Tensor:
    pairs_ = len(row.lengths) // 2
    if row.ref == "random":
        return -4 * torch.rand(2 * pairs_, generator=torch.Generator().manual_seed(5))
    return row.ref * torch.tensor([1.0] * pairs_ + [-1.0] * pairs_)


def _of_log_probs(row: Row, dtype: torch.dtype) -> Sample:
    """Of preference_loss: log-probs and lengths of pairs."""
    rng = torch.Generator().manual_seed(0)
    lengths = torch.tensor([n for _, n in row.lengths])
    logps = (-3 * torch.rand(len(lengths), generator=rng, dtype=F64) * lengths).to(dtype)
    leaves = dict(zip(("chosen_logps", "rejected_logps"), logps.chunk(2), strict=True))
    rest = {name: x.to(wide(dtype)) if _floating(x) else x for name, x in row.options.items()}
    rest |= dict(zip(("chosen_lengths", "rejected_lengths"), lengths.chunk(2), strict=True))
    ref = _reference(row, leaves, rng, dtype).get("ref_logps")
    if ref is not None:
        rest |= dict(zip(("ref_chosen_logps", "ref_rejected_logps"), ref.chunk(2), strict=True))
    return Sample({name: x.clone() for name, x in leaves.items()}, rest, row.grad)


# ---- Special values ----


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


# ---- Strides ----


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

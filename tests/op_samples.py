"""How a row of the table of ops (op_table.py) becomes tensors: batches, their edits (op_inputs.py), gradients.

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

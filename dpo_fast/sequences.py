"""Between rows and pairs: where sequences lie among the rows of logits, their sums, and what a loss asks of each.

Nothing here waits for the device, and every sum has a fixed order.
"""

import contextlib
import inspect

import torch
from torch import Tensor

from .losses import LOSSES, preference_loss

# Losses that are a function of one pair: loss and gradient of a batch can be had in one launch.
FUSED = tuple(name for name, row in LOSSES.items() if not row.over_batch and not row.token_mean)

_SIGNATURE = inspect.signature(preference_loss).parameters
# Options of `preference_loss` that an op hands on, beside loss_type, beta and label_smoothing, and their defaults.
LOSS_OPTIONS = {
    name: _SIGNATURE[name].default
    for name in ("f_divergence_type", "f_alpha_divergence_coef", "discopop_tau", "simpo_gamma", "loss_weights")
}
_NUMBERS = ("beta", "label_smoothing", "f_alpha_divergence_coef", "discopop_tau", "simpo_gamma")


# ---- Rows ----


def row_period(logits: Tensor) -> int:
    """Rows from one sequence of [S, T, V] to the next when all are seen as [N, V] with one stride; 0: they cannot be.

    T where sequences follow each other; more for a slice such as `logits[:, :-1]`, whose view takes in the rows between.
    """
    sequences, length, words = logits.shape
    between, row, word = logits.stride()
    if word != 1 and words > 1:
        return 0
    if sequences <= 1 or length <= 1:
        return length
    return between // row if row >= words and between % row == 0 and between // row >= length else 0


def flat_rows(logits: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """[S, T, V], [S, T] -> [N, V], [N] without a copy where the strides allow one; rows between sequences are ignored.

    [N, V] and [N] pass through. Sequence s begins at row s * period, `period = row_period(logits) or T`.
    """
    if logits.ndim == 2:
        return logits if logits.stride(1) == 1 or logits.shape[1] == 1 else logits.contiguous(), targets.contiguous()
    period = row_period(logits)
    if not period:
        logits, period = logits.contiguous(), logits.shape[1]
    (sequences, length, words), n = logits.shape, _row_count(logits, period)
    stride = logits.stride(1) if length > 1 else logits.stride(0)
    rows = logits.as_strided((n, words), (stride, 1))
    if period == length:
        # A slice of one column is [S] without a copy, and has gaps.
        return rows, targets.reshape(-1).contiguous()
    padded = targets.new_full((sequences, period), ignore_index)
    padded[:, :length] = targets
    return rows, padded.view(-1)[:n]


def empty_rows(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Uninitialised memory for a gradient: [N, V] with the rows of `flat_rows`, and the same in the shape of logits."""
    if logits.ndim == 2:
        rows = logits.new_empty(logits.shape)
        return rows, rows
    period = row_period(logits) or logits.shape[1]
    memory = logits.new_empty(logits.shape[0], period, logits.shape[2])
    return memory.view(-1, logits.shape[2])[: _row_count(logits, period)], memory[:, : logits.shape[1]]


def unflatten(x: Tensor, logits: Tensor) -> Tensor:
    """[..., N] of `flat_rows` -> [..., S, T]; [..., N] stays what it is."""
    if logits.ndim == 2:
        return x
    sequences, length, _ = logits.shape
    period = row_period(logits) or length
    x = torch.nn.functional.pad(x, (0, sequences * period - x.shape[-1]))
    return x.view(*x.shape[:-1], sequences, period)[..., :length].contiguous()


def uniform_bounds(logits: Tensor) -> Tensor:
    """`cu_rows` [S + 1] of padded [S, T, V] logits."""
    sequences, length, _ = logits.shape
    period = row_period(logits) or length
    bounds = torch.arange(sequences + 1, dtype=torch.int32, device=logits.device) * period
    return bounds.clamp(max=_row_count(logits, period))


def _row_count(logits: Tensor, period: int) -> int:
    sequences, length, _ = logits.shape
    return (sequences - 1) * period + length if sequences and length else 0


# ---- Sums ----


def segment_sum(values: Tensor, cu_rows: Tensor) -> Tensor:
    """[N], [S + 1] -> [S]: `values[cu_rows[s]:cu_rows[s + 1]].sum()`, in float64; the type of values comes back."""
    total = torch.segment_reduce(values.double(), "sum", offsets=cu_rows.long(), initial=0, unsafe=True)
    return total.to(values.dtype)


def segment_ids(cu_rows: Tensor, n: int) -> Tensor:
    """[S + 1] -> [N]: the sequence of each row."""
    rows = torch.arange(n, dtype=cu_rows.dtype, device=cu_rows.device)
    return torch.searchsorted(cu_rows, rows, right=True) - 1


def scored_lengths(targets: Tensor, ignore_index: int, cu_rows: Tensor | None = None) -> Tensor:
    """Scored tokens of each sequence, int32: [S, T] -> [S], or [N] with `cu_rows` [S + 1] -> [S]."""
    scored = targets != ignore_index
    if cu_rows is None:
        return scored.sum(-1, dtype=torch.int32)
    return segment_sum(scored.to(torch.float64), cu_rows).to(torch.int32)


# ---- Losses ----


@contextlib.contextmanager
def autograd_inside_op():
    """Autograd as outside of ops: the dispatcher switches it off in one, and torch.func cannot run under a mode."""
    include, exclude = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    for name in ("AutogradFunctionality", "AutogradOther", "ADInplaceOrView"):
        exclude = exclude.remove(getattr(torch._C.DispatchKey, name))
    with torch._C._ForceDispatchKeyGuard(include, exclude), torch.enable_grad():
        yield


def loss_and_coefficients(
    logps: Tensor,
    lengths: Tensor,
    ref_logps: Tensor | None,
    options: dict,
    pair_weights: Tensor | None = None,
    mean_chosen_length: Tensor | float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`preference_loss` of [2B] summed log-probs: its loss, its losses [B] and `d loss / d logps` [2B]."""
    references = (None, None) if ref_logps is None else ref_logps.chunk(2)
    chosen, rejected = lengths.chunk(2)
    with autograd_inside_op():
        leaf = logps.detach().requires_grad_()
        out = preference_loss(
            *leaf.chunk(2),
            *references,
            chosen_lengths=chosen,
            rejected_lengths=rejected,
            pair_weights=pair_weights,
            mean_chosen_length=mean_chosen_length,
            validate=False,
            **options,
        )
        (coefficients,) = torch.autograd.grad(out.loss, leaf)
    return out.loss.detach(), out.losses.detach(), coefficients


def loss_names(loss_type: str | list[str]) -> list[str]:
    return [loss_type] if isinstance(loss_type, str) else list(loss_type)


def fusable(options: dict) -> bool:
    """True where the loss is one of `FUSED` alone, with weight 1 and no divergence but the KL of DPO."""
    names = loss_names(options["loss_type"])
    plain = list(options["loss_weights"] or [1.0]) == [1.0] and options["f_divergence_type"] == "reverse_kl"
    return plain and len(names) == 1 and names[0] in FUSED


def pack_loss(options: dict) -> tuple[str, str, list[float]]:
    """The options of `preference_loss` as what the schema of an op can hold."""
    names = loss_names(options["loss_type"])
    weights = options["loss_weights"] or [1.0] * len(names)
    numbers = [float(options[name]) for name in _NUMBERS] + [float(weight) for weight in weights]
    return ",".join(names), options["f_divergence_type"], numbers


def unpack_loss(names: str, divergence: str, numbers: list[float]) -> dict:
    """What `pack_loss` packed."""
    listed, count = names.split(","), len(_NUMBERS)
    values = dict(zip(_NUMBERS, numbers[:count], strict=True))
    return {"loss_type": listed, "loss_weights": numbers[count:], "f_divergence_type": divergence, **values}

"""The checks of the public ops' arguments; each error names the argument, what was given and what is expected.

Shapes, types and devices are checked before an op is called, values inside the op: always on the CPU, and on a GPU
under `debug=True` only, since reading a value waits for the device.
"""

import itertools

import torch
from torch import Tensor

from ..backends.eager import OUTPUTS
from ..losses import require


def shown(x: object) -> str:
    """A tensor as `torch.float32 [2, 3] on cpu`, anything else as its repr."""
    return f"{x.dtype} {list(x.shape)} on {x.device}" if isinstance(x, Tensor) else repr(x)


def local(name: str, x: Tensor | None) -> Tensor | None:
    """`x` as a plain tensor. A DTensor is gathered where it needs no gradient or has one rank, and refused elsewhere."""
    if x is None or not hasattr(x, "full_tensor"):
        return x
    if name.endswith(("weight", "bias")) and (
        x.device_mesh.size() == 1 or not (x.requires_grad and torch.is_grad_enabled())
    ):
        return x.full_tensor()
    raise ValueError(
        f"{name} is a DTensor (FSDP2, tensor parallelism), and how ranks' gradients add up is not known here: call this "
        f"inside of the forward of the module that FSDP gathers, or pass {name}.full_tensor() where all ranks hold the "
        f"same rows, {name}.full_tensor(grad_placements=[Partial()]) where each has its own"
    )


def check_transform(logit_scale: float, softcap: float | None, temperature: float, outputs=()) -> None:
    """Raise ValueError for a transform of the logits out of range, and for unknown outputs."""
    require(
        logit_scale == logit_scale and abs(logit_scale) < float("inf"),
        lambda: f"logit_scale must be finite, got {logit_scale}",
    )
    require(softcap is None or softcap > 0, lambda: f"softcap must be above 0, got {softcap}")
    require(temperature > 0, lambda: f"temperature must be above 0, got {temperature}")
    names = [outputs] if isinstance(outputs, str) else outputs
    unknown = sorted(name for name in names if name not in OUTPUTS)
    require(not unknown, lambda: f"outputs {unknown} are not among {', '.join(OUTPUTS)}")
    require(not isinstance(outputs, str), lambda: f"outputs must be a tuple of names, got {outputs!r}")


def check_logits(logits: Tensor, targets: Tensor) -> None:
    """Raise ValueError unless `logits` are floating-point [N, V] or [S, T, V] and `targets` fit them."""
    fits = isinstance(logits, Tensor) and logits.is_floating_point() and logits.ndim in (2, 3)
    require(fits, lambda: f"logits must be floating-point [N, V] or [S, T, V], got {shown(logits)}")
    require(logits.shape[-1] > 0, lambda: f"logits must have V >= 1 words, got {shown(logits)}")
    check_targets_like(targets, logits, "logits")


def check_targets_like(targets: Tensor, rows: Tensor, name: str) -> None:
    """Raise ValueError unless `targets` fit `rows` [..., V or D]."""
    fits = isinstance(targets, Tensor) and targets.shape == rows.shape[:-1] and targets.dtype == torch.int64
    require(
        fits, lambda: f"targets must be int64 {list(rows.shape[:-1])}, one for each row of {name}, got {shown(targets)}"
    )
    require(
        targets.device == rows.device, lambda: f"targets are on {targets.device} and {name} on {rows.device}: move one"
    )


def check_sequences(rows: Tensor, name: str, cu_seqlens: Tensor | None, pairs: bool = False) -> int:
    """The number of sequences S of padded [S, T, ...] or of packed [N, ...] with `cu_seqlens` [S + 1]; checks their shapes."""
    if cu_seqlens is None:
        require(
            rows.ndim == 3,
            lambda: f"{name} of shape {list(rows.shape)} is packed: give cu_seqlens, or padded [S, T, ...]",
        )
        count, whose = rows.shape[0], name
    else:
        fits = isinstance(cu_seqlens, Tensor) and cu_seqlens.dtype == torch.int32 and cu_seqlens.ndim == 1
        require(fits and cu_seqlens.shape[0] > 1, lambda: f"cu_seqlens must be int32 [S + 1], got {shown(cu_seqlens)}")
        require(rows.ndim == 2, lambda: f"cu_seqlens goes with packed {name} [N, ...], got {list(rows.shape)}")
        near = cu_seqlens.device in (rows.device, torch.device("cpu"))
        require(
            near,
            lambda: f"cu_seqlens is on {cu_seqlens.device} and {name} on {rows.device}: move one, or it to the CPU",
        )
        count, whose = cu_seqlens.shape[0] - 1, "cu_seqlens"
    if pairs:
        fits = count > 0 and count % 2 == 0
        require(
            fits, lambda: f"{whose} must hold 2B sequences, the B chosen and then the B rejected, B >= 1, got {count}"
        )
    return count


def check_per_sequence(name: str, x: Tensor | None, count: int, device: torch.device) -> None:
    """Raise ValueError unless `x` is None or floating-point [count] on `device`."""
    if x is not None:
        fits = isinstance(x, Tensor) and x.is_floating_point() and x.shape == (count,) and x.device == device
        require(fits, lambda: f"{name} must be floating-point [{count}] on {device}, got {shown(x)}")


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise ValueError unless hidden [N, D] or [S, T, D], weight [V, D] and bias [V] fit each other and share a device."""
    fits = hidden.ndim in (2, 3) and weight.ndim == 2 and hidden.shape[-1] == weight.shape[1]
    require(
        fits,
        lambda: (
            f"hidden must be [N, D] or [S, T, D] and weight [V, D], got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        ),
    )
    require(hidden.is_floating_point(), lambda: f"hidden must be floating-point, got {shown(hidden)}")
    fits = bias is None or bias.shape == weight.shape[:1]
    require(fits, lambda: f"bias must be [{weight.shape[0]}], got {None if bias is None else tuple(bias.shape)}")
    for name, x in (("weight", weight), ("bias", bias)):
        if x is not None and x.device != hidden.device:
            raise ValueError(f"{name} and hidden are on different devices, {shown(x)} and {shown(hidden)}: move one")


# ---- Values ----


def check_targets(targets: Tensor, words: int, ignore_index: int | None, debug: bool) -> None:
    """Raise ValueError unless all targets lie in [0, words) or are `ignore_index`."""
    if (targets.is_cuda and not debug) or not targets.numel():
        return
    scored = targets if ignore_index is None else targets[targets != ignore_index]
    low, high = (int(scored.min()), int(scored.max())) if scored.numel() else (0, 0)
    also = "" if ignore_index is None else f" and are not ignore_index={ignore_index}"
    inside = low >= 0 and high < words
    require(inside, lambda: f"targets lie in [{low}, {high}], outside the vocabulary [0, {words}){also}")


def check_bounds(cu_seqlens: Tensor, rows: int, debug: bool) -> None:
    """Raise ValueError unless `cu_seqlens` goes from 0 to `rows` and never down."""
    if cu_seqlens.is_cuda and not debug:
        return
    bounds = cu_seqlens.tolist()
    fits = bounds[0] == 0 and bounds[-1] == rows and all(a <= b for a, b in itertools.pairwise(bounds))
    few = bounds if len(bounds) <= 9 else [*bounds[:4], "...", *bounds[-4:]]
    require(fits, lambda: f"cu_seqlens must go up from 0 to the {rows} rows, got {few}")

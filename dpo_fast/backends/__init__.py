"""The table of back ends, and the one function that chooses which of them runs the launchers (eager.py lists those)."""

import dataclasses
import functools
import importlib
import os
import re
import shutil
from collections.abc import Callable

import torch

from . import eager


@dataclasses.dataclass(frozen=True)
class Backend:
    """The launchers of one back end, with the signatures of eager.py."""

    name: str
    logps_fwd: Callable
    logps_bwd: Callable
    residual_: Callable
    dpo_fused: Callable
    scale_: Callable
    new_empty: Callable


LAUNCHERS = tuple(field.name for field in dataclasses.fields(Backend))[1:]
_BUILD = "run `pip install --no-build-isolation -e .` in a checkout, with torch and a C++ compiler there"


class _MissingError(Exception):
    """A back end cannot be used; the message says why and how to get it."""


def _torch(device: str) -> Backend:
    return Backend("torch", *(getattr(eager, name) for name in LAUNCHERS))


def _triton(device: str) -> Backend:
    try:
        interprets = importlib.import_module("triton").knobs.runtime.interpret
    except ImportError as error:
        raise _MissingError("triton is not installed: pip install triton") from error
    if device != "cuda" and not interprets:
        raise _MissingError("its kernels need CUDA tensors (tests run them on a CPU with TRITON_INTERPRET=1)")
    if device == "cuda" and not torch.cuda.is_available():
        raise _MissingError("this machine has no CUDA device that torch can use")
    try:
        logps, dpo = (importlib.import_module(f"dpo_fast.kernels.{name}") for name in ("logps", "dpo"))
    except ModuleNotFoundError as error:
        raise _MissingError("dpo_fast.kernels is missing: install dpo_fast again, or use a whole checkout") from error
    scale_ = getattr(logps, "scale_", eager.scale_)
    return Backend("triton", logps.logps_fwd, logps.logps_bwd, logps.residual_, dpo.dpo_fused, scale_, eager.new_empty)


def _csrc(device: str) -> Backend:
    try:
        csrc = importlib.import_module("dpo_fast.backends.extension")
    except ModuleNotFoundError as error:
        if error.name != "dpo_fast._csrc":
            raise
        compilers = [name for name in (os.environ.get("CXX"), "c++", "g++", "clang++") if name and shutil.which(name)]
        why = (
            "it was not built" if compilers else "it was not built, and there is no C++ compiler here (apt install g++)"
        )
        raise _MissingError(f"{why}: {_BUILD}") from error
    except ImportError as error:
        raise _MissingError(f"it was built for another torch ({error}): {_BUILD}") from error
    if not re.match(rf"{re.escape(csrc.TORCH_VERSION)}(\D|$)", torch.__version__):
        raise _MissingError(f"it was built for torch {csrc.TORCH_VERSION}, this is {torch.__version__}: {_BUILD}")
    if device == "cuda" and not csrc.WITH_CUDA:
        raise _MissingError(f"it was built without CUDA: install the CUDA toolkit (nvcc), then {_BUILD}")
    if device not in ("cpu", "cuda"):
        raise _MissingError(f"it has no kernels for {device}")
    return Backend("csrc", *(getattr(csrc, name) for name in LAUNCHERS))


# The fastest first. A loader takes a device type and returns a Backend or raises _MissingError.
BACKENDS: dict[str, Callable[[str], Backend]] = {"csrc": _csrc, "triton": _triton, "torch": _torch}

_NO_FLOAT64 = {"csrc", "triton"}  # their kernels compute in float32


@functools.cache
def _load(name: str, device: str) -> Backend | str:
    """The back end, or the reason why it is missing."""
    try:
        return BACKENDS[name](device)
    except _MissingError as error:
        return str(error)


def resolve(name: str | None, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Backend:
    """The back end for tensors on `device`; None (or "") picks the fastest that is there and takes `dtype`.

    Raises ValueError for an unknown name and for a back end that is missing, with what to do about it.
    """
    device = torch.device(device).type
    if name:
        if name not in BACKENDS:
            raise ValueError(f"backend is {name!r}: give one of {', '.join(BACKENDS)}, or None for the fastest there")
        found = _load(name, device)
        if isinstance(found, str):
            raise ValueError(f"backend {name!r} cannot be used on {device}: {found}; backend='torch' always can")
        if dtype == torch.float64 and name in _NO_FLOAT64:
            raise ValueError(
                f"backend {name!r} takes no float64: give backend='torch' or None, or logits of another type"
            )
        return found
    # Triton on a CPU runs in its interpreter, which is exact and thousands of times slower.
    skipped = set() if device == "cuda" else {"triton"}
    if dtype == torch.float64:
        skipped |= _NO_FLOAT64
    loaded = (_load(name, device) for name in BACKENDS if name not in skipped)
    return next(found for found in loaded if isinstance(found, Backend))


def available_backends() -> dict[str, str | None]:
    """Back end -> None where some device of this machine can use it, else the reason why none can."""
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    found = {name: [_load(name, device) for device in devices] for name in reversed(BACKENDS)}
    return {name: None if any(isinstance(x, Backend) for x in tried) else tried[0] for name, tried in found.items()}

"""What every benchmark states beside its numbers, and its one line on a failure."""

import contextlib
import datetime
import gc
import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
PACKAGES = (
    "torch", "triton", "transformers", "trl", "liger-kernel", "cut-cross-entropy", "accelerate", "peft", "dpo_fast",
)  # fmt: skip


def versions() -> dict:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found | {"torch": torch.__version__}  # which also says for what CUDA it was built


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
        return f"{names[0]}, {torch.get_num_threads()} threads"
    return platform.processor()


def commit() -> str:
    """The checkout's commit, or "unknown: why": a copy that was sent to a machine may have neither git nor .git."""
    try:
        done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    except OSError as error:
        return f"unknown: {error}"
    return done.stdout.strip() or f"unknown: {done.stderr.strip()}"


def conditions(device: str, module: str) -> dict:
    """The head of a result file."""
    return {
        "device": device_name(device), "versions": versions(), "commit": commit(),
        "date": datetime.date.today().isoformat(), "command": " ".join([f"python -m {module}", *sys.argv[1:]]),
    }  # fmt: skip


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)


def reason(error: BaseException) -> str:
    """One line on what went wrong."""
    if is_out_of_memory(error):
        return "out of memory"
    return f"{type(error).__name__}: {error}".splitlines()[0]


def free(device: str) -> None:
    """Give a GPU's memory back between rows; on a CPU, memory without references is free already."""
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()

"""`python -m dpo_fast.info`: versions, devices and back ends, for a bug report or a look before a run.

It works with the core install alone: it imports nothing of the extra [train].
"""

import argparse
import importlib.metadata
import os
import platform
import sys
from pathlib import Path

import torch

from . import __version__
from .backends import available_backends

PACKAGES = ("torch", "triton", "numpy", "transformers", "accelerate", "peft", "datasets", "safetensors", "trl")


def versions() -> dict[str, str]:
    """Versions of dpo_fast, Python and the packages that matter, or "not installed"."""
    found = {"dpo_fast": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def devices() -> dict[str, str]:
    """The CPU with the cores this process may use, and each CUDA device with its memory in GiB."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = {"cpu": f"{_cpu_name()}, {usable} of {os.cpu_count()} cores usable, {torch.get_num_threads()} threads"}
    for i in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(i)
        memory = f"{device.total_memory / 2**30:.0f} GiB"
        found[f"cuda:{i}"] = f"{device.name}, {memory}, compute capability {device.major}.{device.minor}"
    if not torch.cuda.is_available():
        found["cuda"] = "none" if torch.version.cuda else "this torch is built without CUDA"
    return found


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _details(backend: str) -> str:
    """How the extension was built and runs (instruction set, threads, CUDA); other back ends have one form only."""
    if backend != "csrc":
        return ""
    from .backends import extension as csrc

    threads = "" if csrc.WITH_THREADS else ", one thread: built by a compiler without OpenMP"
    return f" ({csrc.INSTRUCTION_SET}{threads}{', CUDA' if csrc.WITH_CUDA else ''})"


def main(argv: list[str] | None = None) -> int:
    """Print it all and return the exit status."""
    argparse.ArgumentParser(prog="python -m dpo_fast.info", description=__doc__.splitlines()[0]).parse_args(argv)
    backends = {name: why or f"available{_details(name)}" for name, why in available_backends().items()}
    for title, rows in (("Versions", versions()), ("Devices", devices()), ("Back ends", backends)):
        print(title)
        for name, value in rows.items():
            print(f"  {name:<14}{value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

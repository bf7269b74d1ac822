"""The embedded default of `python -m dpo_fast.train`: DPO at work in two minutes, offline, on a CPU."""

from .stages import main

__all__ = ["main"]

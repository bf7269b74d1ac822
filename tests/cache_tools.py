"""Examples for the cache of reference log-probs, numbers that stand for a reference's, and other processes that write."""

import textwrap
from pathlib import Path

import forked
import numpy as np
import torch

KEY = {"weights": "w0", "precision": "bf16", "version": "1"}


def make_examples(n, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda: rng.integers(0, 2**17, rng.integers(1, 30)).tolist()  # noqa: E731
    return [{"prompt_ids": draw(), "chosen_ids": draw(), "rejected_ids": draw()} for _ in range(n)]


def value_of(example):
    """A stand-in for the reference: float32 numbers that depend on the example alone."""
    prompt = sum(example["prompt_ids"])
    return [-np.sqrt(prompt + sum(example[side])) / 7 for side in ("chosen_ids", "rejected_ids")]


def reference(examples):
    return torch.tensor([value_of(e) for e in examples], dtype=torch.float32)


def start_code(folder: Path, code: str, *args) -> forked.Forked:
    """A process that runs `code`, which is kept in `folder`."""
    path = folder / f"code{len(list(folder.glob('code*')))}.py"
    path.write_text(textwrap.dedent(code))
    return forked.Forked(path, folder, *args)

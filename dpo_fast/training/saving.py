"""A model on disk is whole or as it was: new files take the place of the old ones only once all of them are written."""

import contextlib
import os
import re
import shutil
import sys
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

_WEIGHTS = re.compile(r"(model|adapter_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")
_PENDING = ".saving"


def model_bytes(model: torch.nn.Module) -> int:
    """Bytes of what `save_model` writes: the adapters' where the model has any, else all weights, tied ones once."""
    adapters = hasattr(model, "disable_adapter")
    weights = {id(p): p for p in model.parameters() if p.requires_grad or not adapters}
    return sum(p.numel() * p.element_size() for p in weights.values())


def optimizer_bytes(optimizer) -> int:
    """Bytes of the optimizer's state."""
    inner = getattr(optimizer, "optimizer", optimizer)
    masters = getattr(inner, "_masters", {}).values()
    states = [t for state in inner.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    return sum(t.numel() * t.element_size() for t in [*states, *masters])


@contextlib.contextmanager
def replacing(folder: str | os.PathLike):
    """Yields a folder to write into; its files then take the place of those in `folder`, and nothing does on an error.

    Weights of the model that lay there before and are not among the new files (shards of another number) are deleted.
    """
    folder = Path(folder)
    pending = folder / _PENDING
    shutil.rmtree(pending, ignore_errors=True)
    pending.mkdir(parents=True)
    try:
        yield pending
        new = sorted((p for p in pending.rglob("*") if p.is_file()), key=lambda p: p.name.endswith(".index.json"))
        names = {path.relative_to(pending) for path in new}
        for path in new:
            target = folder / path.relative_to(pending)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
        if any(_WEIGHTS.fullmatch(str(name)) for name in names):
            for old in folder.iterdir():
                if _WEIGHTS.fullmatch(old.name) and old.relative_to(folder) not in names:
                    old.unlink()
    finally:
        shutil.rmtree(pending, ignore_errors=True)


@contextlib.contextmanager
def quiet_unless_terminal():
    """transformers' bars over shards of weights are for people who look at a terminal."""
    shown = transformers_logging.is_progress_bar_enabled()
    if shown and not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def write_arguments(args, folder: Path) -> None:
    """`training_args.json` beside transformers' pickle, for people; tokens are left out, and neither is ever read."""
    Path(folder, "training_args.json").write_text(args.to_json_string() + "\n")

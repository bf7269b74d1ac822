"""A model on disk is never half new: new files replace the old ones only once all of them are written."""

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
    """The bytes that `save_model` writes: the adapters' where the model has any, else all weights, tied ones once."""
    adapters = hasattr(model, "disable_adapter")
    weights = {id(p): p for p in model.parameters() if p.requires_grad or not adapters}
    return sum(p.numel() * p.element_size() for p in weights.values())


def optimizer_bytes(optimizer) -> int:
    """The bytes of the optimizer's state."""
    inner = getattr(optimizer, "optimizer", optimizer)
    masters = getattr(inner, "_masters", {}).values()
    states = [t for state in inner.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    return sum(t.numel() * t.element_size() for t in [*states, *masters])


@contextlib.contextmanager
def replacing(folder: str | os.PathLike):
    """Yield a folder to write into; afterwards its files replace those in `folder`, unless an error occurred.

    Old files of weights that are not among the new ones (shards of another number) are deleted.
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
    """Switch off transformers' progress bars inside, unless a terminal shows them."""
    shown = transformers_logging.is_progress_bar_enabled()
    if shown and not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def write_arguments(args, folder: Path) -> None:
    """Write `training_args.json` beside transformers' pickle, for people; tokens are left out, and neither file is ever read."""
    Path(folder, "training_args.json").write_text(args.to_json_string() + "\n")

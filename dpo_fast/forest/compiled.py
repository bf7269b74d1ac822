"""The parts of a trunk's decoder layers, compiled in place by torch.compile; attention over a forest stays as it is.

Graphs end where attention begins (attention.py hides it from the compiler), so that none of them knows a forest: norms,
projections with rotary positions, and MLPs become a few kernels each, and any number of rows takes the same ones. A layer's
parts, and not the layer, are compiled because transformers recomputes activations layer by layer, which is in the way of a
larger graph. The head is one op already.
"""

import contextlib
from collections.abc import Iterator

import torch

from .gate import base_model

_PARTS = "_dpo_fast_compiled"  # the attribute of a model that lists what was compiled


def compile_parts(model: torch.nn.Module, **how) -> int:
    """Compile the parts of the decoder layers of `model` by `torch.compile(**how)`; returns how many there are.

    Equivalent to their own forward except for rounding: compiled code keeps in float32 what would be rounded to half
    precision between two kernels. The state dict keeps its names. A part that is compiled already stays as it is.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer as Layer

    model = base_model(model)
    restore_parts(model)
    layers = [module for module in model.modules() if isinstance(module, Layer)]
    parts = [part for layer in layers for part in _parts(layer) if not isinstance(part, Layer)]
    vars(model)[_PARTS] = mine = [part for part in parts if part._compiled_call_impl is None]
    for part in mine:
        part.compile(**how)
    return len(parts)


def _parts(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The children; those of a list or a dict in its place, since a list is never called."""
    for child in module.children():
        if isinstance(child, torch.nn.ModuleList | torch.nn.ModuleDict):
            yield from _parts(child)
        else:
            yield child


def restore_parts(model: torch.nn.Module) -> None:
    """Undo `compile_parts`."""
    for part in vars(base_model(model)).pop(_PARTS, ()):
        part._compiled_call_impl = None


def uncompiled(model: torch.nn.Module) -> contextlib.AbstractContextManager:
    """Inside, the parts run as they are: with a cache of its own, every layer would be compiled anew when it generates."""
    return torch.compiler.set_stance("force_eager") if vars(model).get(_PARTS) else contextlib.nullcontext()

"""`torch_compile`: the parts of a trunk's decoder layers are compiled in place; attention over a forest stays as it is.

transformers would compile the whole model into one graph. Here graphs end where attention begins (attention.py hides it from
the compiler), so that none of them knows a forest: norms, projections with rotary positions, and MLPs become a few kernels
each, and any number of rows takes the same ones. A layer's parts, and not the layer, are compiled because transformers
recomputes activations layer by layer, which is in the way of a larger graph. The head is one op already.
"""

import logging

import torch
from accelerate.utils import TorchDynamoPlugin
from transformers.modeling_layers import GradientCheckpointingLayer

from ..forest.gate import base_model

logger = logging.getLogger(__name__)
# These are the options, with the values that ask for nothing.
OFF = {"torch_compile": False, "torch_compile_backend": None, "torch_compile_mode": None}


def check_compile(args) -> None:
    """Set `torch_compile` where a backend or mode is given. Raises ValueError for one that torch does not have."""
    args.torch_compile = any(getattr(args, name) != off for name, off in OFF.items())
    if not args.torch_compile:
        return
    try:
        torch.compile(torch.sin, **_how(args))  # nothing is compiled before the first call
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"torch_compile_backend={args.torch_compile_backend!r}, torch_compile_mode={args.torch_compile_mode!r}: {reason}"
        ) from error


def _how(args) -> dict:
    return {"backend": args.torch_compile_backend or "inductor", "mode": args.torch_compile_mode, "dynamic": True}


def no_compilation() -> TorchDynamoPlugin:
    """What accelerate is told, which would compile the whole model."""
    return TorchDynamoPlugin(backend="no")


def compile_layers(model: torch.nn.Module, args) -> None:
    """Compile the parts of the decoder layers of `model` in place where `args` ask for it; its state dict keeps its names.

    Equivalent to their own forward except for rounding: compiled code keeps in float32 what would be rounded to half
    precision between two kernels.
    """
    if not args.torch_compile:
        return
    layers = [module for module in base_model(model).modules() if isinstance(module, GradientCheckpointingLayer)]
    for part in (part for layer in layers for part in layer.children()):
        part.compile(**_how(args))
    if not layers and args.process_index == 0:
        name = type(base_model(model)).__name__
        logger.warning("torch_compile has no effect: %s has no decoder layers as transformers builds them", name)

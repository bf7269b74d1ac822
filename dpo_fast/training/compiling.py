"""The options of `torch_compile`. What is compiled is in forest/compiled.py; transformers would compile the whole model."""

import logging
import os

import torch
from accelerate.utils import TorchDynamoPlugin

from ..forest.compiled import compile_parts
from ..forest.gate import base_model

logger = logging.getLogger(__name__)
# The options of torch_compile, each with the value that means off.
OFF = {"torch_compile": False, "torch_compile_backend": None, "torch_compile_mode": None}
_ENVIRONMENT = "ACCELERATE_DYNAMO_BACKEND"


def check_compile(args) -> None:
    """Set `torch_compile` where a backend or mode is given. Raises ValueError for one that cannot be used."""
    backend, mode = args.torch_compile_backend, args.torch_compile_mode
    args.torch_compile = bool(args.torch_compile) or backend is not None or mode is not None
    if not args.torch_compile:
        return
    given = f"torch_compile_backend={backend!r}, torch_compile_mode={mode!r}"
    if args.use_liger_kernel:
        raise ValueError("torch_compile and use_liger_kernel both replace norms and MLPs: give one of them")
    if mode not in (None, "default") and backend not in (None, "inductor"):
        raise ValueError(f"{given}: only the backend inductor has modes; leave torch_compile_mode out")
    try:
        torch.compile(torch.sin, **_how(args))  # nothing is compiled before the first call
    except RuntimeError as error:
        raise ValueError(f"{given}: {str(error).strip().splitlines()[0]}") from error
    if backend == "cudagraphs" or _with_cuda_graphs(mode):
        raise ValueError(
            f"{given}: CUDA graphs overwrite the gradients of a part that is not done with, and are recorded anew for each "
            "number of rows; give torch_compile_mode=max-autotune-no-cudagraphs or leave it out"
        )


def _with_cuda_graphs(mode: str | None) -> bool:
    if mode in (None, "default"):
        return False
    from torch._inductor import list_mode_options

    return bool(list_mode_options(mode).get("triton.cudagraphs"))


def _how(args) -> dict:
    return {"backend": args.torch_compile_backend or "inductor", "mode": args.torch_compile_mode, "dynamic": True}


def described(args) -> str | None:
    """Backend and mode in one word, where roundings depend on them; None where nothing is compiled."""
    if not args.torch_compile:
        return None
    how = _how(args)
    return f"{how['backend']}/{how['mode'] or 'default'}"


def no_compilation(args) -> TorchDynamoPlugin:
    """accelerate's settings for torch.compile: none, since it would compile the whole model."""
    asked = os.environ.get(_ENVIRONMENT, "no")
    if asked.lower() != "no" and not args.torch_compile and args.process_index == 0:
        logger.warning("%s=%s is not used: give torch_compile, which compiles the trunk's layers", _ENVIRONMENT, asked)
    return TorchDynamoPlugin(backend="no")


def compile_layers(model: torch.nn.Module, args) -> None:
    """`compile_parts` where `args` ask for it."""
    if args.torch_compile and not compile_parts(model, **_how(args)) and args.process_index == 0:
        name = type(base_model(model)).__name__
        logger.warning("torch_compile has no effect: %s has no decoder layers as transformers builds them", name)

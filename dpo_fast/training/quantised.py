"""A base in 4 or 8 bits under trained adapters (QLoRA, arXiv 2305.14314): what transformers and bitsandbytes load is checked.

The base is frozen, so the reference is the same quantised base without adapters, and no log-prob is precomputed.
"""

import inspect
import math
from collections.abc import Iterator, Mapping

import torch


def bits_and_bytes(**options):
    """transformers' `BitsAndBytesConfig(**options)`; None where neither 4 nor 8 bits are asked for.

    Raises ValueError for an option that it does not have, ImportError where bitsandbytes is not installed.
    """
    from transformers import BitsAndBytesConfig
    from transformers.utils import is_bitsandbytes_available

    known = inspect.signature(BitsAndBytesConfig).parameters
    if unknown := sorted(options.keys() - known.keys()):
        raise ValueError(f"quantization_config has no {', '.join(unknown)}: give some of {', '.join(known)}")
    if not (options.get("load_in_4bit") or options.get("load_in_8bit")):
        return None
    if not is_bitsandbytes_available():
        raise ImportError("weights in 4 or 8 bits need a package that is not here: pip install bitsandbytes")
    return BitsAndBytesConfig(**options)


def choose_quantisation(config, args, by_name: bool):
    """The quantisation asked for by argument or by `model_init_kwargs`, as a BitsAndBytesConfig; None for neither.

    Raises ValueError where both are given, for a model that is loaded already and for what is not bitsandbytes'.
    """
    inside = (args.model_init_kwargs or {}).get("quantization_config")
    if config is not None and inside is not None:
        raise ValueError("quantization_config is given twice, as an argument and in model_init_kwargs: drop one")
    if config is not None and not by_name:
        raise ValueError(
            "quantization_config has no effect, since the model is already loaded: pass the model's name instead"
        )
    config = inside if config is None else config
    if config is None:
        return None
    options = dict(config) if isinstance(config, Mapping) else config.to_dict() if hasattr(config, "to_dict") else {}
    method = options.pop("quant_method", None if "load_in_4bit" in options or "load_in_8bit" in options else "")
    if getattr(method, "value", method) not in (None, "bitsandbytes"):
        raise ValueError(
            f"quantization_config is {config!r}: give a BitsAndBytesConfig with load_in_4bit or load_in_8bit"
        )
    return bits_and_bytes(**{name.removeprefix("_"): value for name, value in options.items()})


def check_adapters_train(quantisation, config, adapters: bool) -> None:
    """Raise ValueError where weights that are quantised, by request or in their files, would have to be trained."""
    stored = getattr(config, "quantization_config", None)
    if not adapters and (quantisation is not None or stored is not None):
        raise ValueError(
            "quantised weights are frozen, so there is nothing to train: add adapters (use_peft, or peft_config)"
        )


def check_shards(quantisation, config, args) -> None:
    """Raise ValueError for quantised weights, by request or in their files, that FSDP2 cannot shard unchanged."""
    found = quantisation or getattr(config, "quantization_config", None)
    if found is None:
        return
    options = found if isinstance(found, Mapping) else found.to_dict()
    if options.get("load_in_8bit"):
        raise ValueError(
            "FSDP cannot shard weights in 8 bits, whose scales lie beside them: set load_in_4bit, or leave fsdp out"
        )
    storage = str(options.get("bnb_4bit_quant_storage") or "uint8").removeprefix("torch.")
    cast = "bfloat16" if args.bf16 else "float16" if args.fp16 else None
    if options.get("load_in_4bit") and "float" in storage and cast not in (None, storage):
        raise ValueError(
            f"bnb_4bit_quant_storage={storage}, and FSDP casts what it gathers to {cast}, codes too: set "
            f"bnb_4bit_quant_storage={cast}"
        )


def numbers(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    """The parameters that are no codes, each once. A shard of 4-bit codes looks like numbers; its module knows better."""
    codes = {id(module.weight) for module in model.modules() if getattr(module, "quant_state", None) is not None}
    return (p for p in model.parameters() if id(p) not in codes and not is_quantised(p))


def settle(model: torch.nn.Module) -> torch.nn.Module:
    """Let a CPU run one kernel in evaluation and in training, or policy and reference would be rounded differently.

    bitsandbytes repacks weights of evaluated layers for CPUs with AVX-512 bf16.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def is_quantised(parameter: torch.Tensor) -> bool:
    """Whether the numbers in `parameter` are codes of weights."""
    return getattr(parameter, "quant_state", None) is not None or not parameter.is_floating_point()


def weight_count(parameter: torch.Tensor) -> int:
    """How many weights `parameter` holds: two per byte of 4-bit codes."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)

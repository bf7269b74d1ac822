"""The head of a model as a weight and a bias: its own, a copy that is trained (`modules_to_save`), or LoRA's `W + s B A`.

PEFT's modules are recognised by their attributes, so nothing here imports PEFT. Adapters that are more than a weight and
a bias are refused by name.
"""

import torch
from torch import Tensor


def output_layer(model: torch.nn.Module) -> torch.nn.Module | None:
    """The head of the bare model, or None. Raises ValueError for a head that is more than a weight and a bias."""
    head = model.get_output_embeddings()
    if head is not None:
        _check(head)
    return head


def head_weights(head: torch.nn.Module) -> tuple[Tensor, Tensor | None]:
    """The weight [V, D] and bias ([V] or None) that `head(hidden)` multiplies by and adds, active adapters included.

    For LoRA the weight is `head.weight + sum(scaling * lora_B.weight @ lora_A.weight)`, so that gradients reach both
    factors. Raises ValueError for LoRA dropout while training.
    """
    if _is_copy_wrapper(head):
        copies = [head.modules_to_save[name] for name in _active(head) if name in head.modules_to_save]
        head = copies[0] if copies else head.original_module
    if not hasattr(head, "base_layer"):
        return head.weight, getattr(head, "bias", None)
    base = head.base_layer
    weight = base.weight
    if not head.merged:
        for name in _active(head):
            if name in head.lora_A:
                dropout = getattr(head.lora_dropout[name], "p", 0.0)
                if dropout and head.training:
                    raise ValueError(
                        f"lora_dropout {dropout} on the head is not supported: leave disable_dropout on, or lm_head out of "
                        "the target modules"
                    )
                product = head.lora_B[name].weight @ head.lora_A[name].weight
                weight = weight + (product * head.scaling[name]).to(weight.dtype)
    return weight, getattr(base, "bias", None)


def _active(module) -> list[str]:
    return [] if module.disable_adapters else list(module.active_adapters)


def _is_copy_wrapper(module) -> bool:
    return hasattr(module, "original_module") and hasattr(module, "modules_to_save")


def _check(head: torch.nn.Module) -> None:
    kind, inner = type(head).__name__, head
    if _is_copy_wrapper(head):
        inner = head.original_module
    elif hasattr(head, "base_layer"):
        inner = head.base_layer
        variants = getattr(head, "lora_variant", None)
        if not hasattr(head, "lora_A") or len(head.lora_A) == 0 or head.fan_in_fan_out:
            _refuse(kind)
        if variants:
            _refuse(f"{kind} with {type(next(iter(variants.values()))).__name__}")
        if any(getattr(head, "lora_bias", {}).values()):
            _refuse(f"{kind} with lora_bias")
    weight = getattr(inner, "weight", None)
    if weight is not None and (getattr(weight, "quant_state", None) is not None or not weight.is_floating_point()):
        raise ValueError(
            "the head is quantised, and its log-probs are read off its weight: name lm_head in the quantisation's "
            "llm_int8_skip_modules"
        )
    adapted = any(hasattr(module, "base_layer") or "lora_" in name for name, module in inner.named_modules())
    if adapted or not isinstance(getattr(inner, "weight", None), torch.nn.Parameter):
        _refuse(kind)


def _refuse(kind: str) -> None:
    raise ValueError(
        f"adapters of this kind on the head ({kind}) are not supported, since its log-probs are read off its weight: use "
        "plain LoRA or modules_to_save, or leave lm_head out of both"
    )

"""FSDP2: the model is sharded before its first pass, and its passes, which are collective, are equally many on every rank."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

_PLAN = (
    "fsdp=true with fsdp_config={'version': 2, 'transformer_layer_cls_to_wrap': [the model's decoder layer], "
    "'reshard_after_forward': true}, which shards weights, gradients and optimizer state as ZeRO-3 does"
)


def refuse_zero3() -> None:
    """Raise ValueError: what ZeRO-3 does to a model cannot be checked, and FSDP2 does the same."""
    raise ValueError(
        "ZeRO-3 gathers weights when a layer is called, and the head's weight is read without such a call: leave deepspeed "
        f"out and set {_PLAN} (docs/scale.md); ZeRO-1 and ZeRO-2 are supported"
    )


def refuse_tensor_parallel(*models, options=None) -> None:
    """Raise ValueError for weights that are split over ranks before training, or would be by from_pretrained's `options`.

    Ranks of one tensor-parallel group would need the same pairs in every pass, and each would count them.
    """
    names = ("tp_plan", "tp_size", "device_mesh", "distributed_config")
    asked = [name for name in names if (options or {}).get(name) is not None]
    for model in models:
        # What an earlier run has sharded is its own affair.
        if any(isinstance(module, FSDPModule) for module in model.modules()):
            continue
        asked += [name for name, p in model.named_parameters() if isinstance(p, DTensor)][:1]
    if asked:
        raise ValueError(
            f"{', '.join(asked)}: the weights are split over ranks that compute one pass together (tensor parallelism), "
            f"which is not trained here: leave it out; for weights that do not fit one GPU set {_PLAN} (docs/scale.md)"
        )


def is_fsdp2(accelerator) -> bool:
    """Whether the model is, or will be, sharded by torch's `fully_shard`."""
    return bool(getattr(accelerator, "is_fsdp2", False))


def settle_plugin(accelerator) -> None:
    """Under bf16 or fp16, gradients are reduced in float32 and log-probs stay float32; accelerate would round both.

    Raises ValueError for weights that only one rank would load: every rank checks the model before it is sharded.
    """
    plugin = accelerator.state.fsdp_plugin
    if plugin.cpu_ram_efficient_loading:
        raise ValueError(
            "cpu_ram_efficient_loading leaves the model empty on all ranks but one, where it cannot be checked: set it to "
            "false; each rank then reads the weights once, and keeps its shard"
        )
    policy = plugin.mixed_precision_policy
    if policy is not None:
        plugin.mixed_precision_policy = dataclasses.replace(policy, reduce_dtype=torch.float32, output_dtype=None)


@contextlib.contextmanager
def already_prepared(accelerator, model, optimizer):
    """Inside, `accelerator.prepare` hands back what it is given: `model` and `optimizer` are sharded.

    accelerate finds the weights of a sharded optimizer again by the addresses of their shards, and empty shards have none.
    """
    accelerator._models.append(model)
    accelerator._optimizers.append(optimizer)
    accelerator.prepare = lambda *objects: objects if len(objects) > 1 else objects[0]
    try:
        yield
    finally:
        del accelerator.prepare


def autocast(accelerator, policy: bool):
    """The precision of a forward pass: FSDP2 casts the weights of the `policy` itself, all others run under autocast."""
    return contextlib.nullcontext() if policy and is_fsdp2(accelerator) else accelerator.autocast()


def deferred_sync(accelerator, model):
    """Add up gradients on this rank until the last pass; FSDP2 reduces each pass, or every rank would hold whole gradients."""
    return contextlib.nullcontext() if is_fsdp2(accelerator) else accelerator.no_sync(model)


def passes_together(accelerator, parts: Sequence[Any], idle: Any) -> Iterator[tuple[Any, bool]]:
    """(part, whether it is one of `parts`), equally often on every rank, since a sharded model's passes are collective.

    A rank with fewer parts runs `idle` along, whose result is not used. Costs one gather of a number per rank; yields
    nothing once no rank has a part.
    """
    count = torch.tensor([len(parts)], device=accelerator.device)
    for i in range(int(accelerator.gather(count).max())):
        yield (parts[i], True) if i < len(parts) else (idle, False)

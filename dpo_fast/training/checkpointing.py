"""Whether activations are kept for the backward pass or computed again there (`gradient_checkpointing`).

Left out, it is on only where the activations of the largest batch would not fit the device. What is kept is estimated from
above, from the sizes of the weights: each matrix of the trunk keeps its input or its output, and the functions between
two matrices about as much again.
"""

import logging
import os
from pathlib import Path

import numpy as np
import torch

from ..backends.eager import TILE_BYTES
from ..data.pairs import PairDataset
from ..data.streamed import StreamedPairs
from ..forest.gate import Plan, base_model
from .batches import batch_budget
from .config import DPOConfig

logger = logging.getLogger(__name__)
CGROUP = Path("/sys/fs/cgroup")
SPARE = 0.9  # of the free memory: the rest is for what is not counted, and for gaps
# Bytes that autograd keeps per row and per side (rows or columns) of the trunk's matrices, by the bytes of an entry. The most of
# eleven families, measured by what `saved_tensors_hooks` saw; norms keep float32 beside half precision.
_PER_SIDE = {8: 18.0, 4: 9.0, 2: 6.0}
_PER_SCORE = 6  # bytes per attention score where attention is written out


def choose(model, ref_model, plan: Plan, args: DPOConfig, data: PairDataset | None, share: str, sharded: bool) -> str:
    """Set `args.gradient_checkpointing` where it was left out; returns a sentence on what was decided and why."""
    how, why = args.gradient_checkpointing, "as asked"
    if not hasattr(model, "gradient_checkpointing_enable"):
        how, why = False, "the model has none"
    elif how is None and not getattr(base_model(model), "supports_gradient_checkpointing", True):
        how, why = False, "the model does not support it"
    elif how is None and data is None:
        how, why = False, "there is nothing to train on"
    elif how is None and _of_fsdp(args):
        how, why = False, "FSDP does it"
    elif how is None:
        how, why = _by_memory(model, ref_model, plan, args, data, share, sharded)
    args.gradient_checkpointing = args.activation_checkpointing = how  # the older and the newer name
    sentence = f"gradient checkpointing is {'on' if how else 'off'}: {why}"
    logger.info("%s", sentence)
    return sentence


def _of_fsdp(args: DPOConfig) -> bool:
    own = (args.fsdp_config or {}).get("activation_checkpointing", False)
    return str(own).lower() == "true" or os.environ.get("FSDP_ACTIVATION_CHECKPOINTING", "").lower() == "true"


def _by_memory(model, ref_model, plan, args, data, share, sharded) -> tuple[bool, str]:
    ranks = args.world_size if sharded else 1
    rows, longest = most_rows(data, args, share, padded=plan.path == "padded")
    size = 2 if args.bf16 or args.fp16 else max(p.element_size() for p in base_model(model).parameters())
    kept = activation_bytes(model, rows, size, longest)
    free = free_bytes(args.device)
    if free is None:
        return True, f"the free memory of {args.device} is not known"
    if args.device.type == "cpu":
        free //= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    left = SPARE * free - state_bytes(model, ref_model, args, ranks) - head_bytes(model, args, rows, size)
    on = _any_rank(kept > left, args.device)
    more = " on some rank" if on and kept <= left else ""
    return on, (
        f"the activations of {rows:,} rows take up to {_gb(kept)}, and {_gb(max(left, 0))} of {_gb(free)} are left for them "
        f"on {args.device}{more} (gradient_checkpointing true or false overrides)"
    )


def most_rows(data: PairDataset | StreamedPairs, args: DPOConfig, share: str, padded: bool = False) -> tuple[int, int]:
    """Rows of the largest forest that a micro-batch of `data` can make, and tokens of the longest sequence."""
    sizes, longest = data.examples.pair_tokens(share), int(np.maximum(*data.examples.sequence_lengths()).max())
    if isinstance(data, StreamedPairs) and data.max_length is not None:  # what comes later may be longer
        longest = data.max_length
        sizes = np.full(args.per_device_train_batch_size, 2 * longest)
    pairs = min(args.per_device_train_batch_size, len(sizes))
    rows = int(np.sort(sizes)[-pairs:].sum())
    if args.tokens_per_step is not None:
        rows = batch_budget(args)
        pairs = min(max(rows // int(sizes.min()), 1), len(sizes))
    rows = 2 * pairs * longest if padded else rows
    return rows if args.max_tokens_per_batch is None else min(rows, args.max_tokens_per_batch), longest


def activation_bytes(model, rows: int, size: int, longest: int) -> float:
    """At most so many bytes does autograd keep of the trunk for `rows` tokens, computed in entries of `size` bytes."""
    model = base_model(model)
    config = model.config.get_text_config()
    experts = getattr(config, "num_experts_per_tok", None) or 1
    sides = sum(n * (experts if p.ndim == 3 else 1) for p, n in _trunk_matrices(model))
    scores = 0
    if _is_written_out(model):
        scores = rows * 2 * longest * getattr(config, "num_attention_heads", 0) * config.num_hidden_layers
    return rows * sides * _PER_SIDE[size] + scores * _PER_SCORE


def state_bytes(model, ref_model, args: DPOConfig, ranks: int) -> float:
    """What a training step needs of weights and is not on the device yet; `ranks` share it where they shard."""
    trained = [p for p in model.parameters() if p.requires_grad]
    # Gradients; AdamW's two float32 numbers; beside weights of half precision a float32 master and its gradient.
    states = sum(
        p.numel() * (p.element_size() + (16 if p.element_size() == 2 else 2 * p.element_size())) for p in trained
    )
    missing = [p for module in filter(None, (model, ref_model)) for p in module.parameters()]
    states += sum(p.numel() * p.element_size() for p in missing if p.device.type != args.device.type)
    bare, half = base_model(model), args.bf16 or args.fp16
    # Autocast keeps a copy of each matrix.
    copies = sum(2 * p.numel() for p, _ in _trunk_matrices(bare) if p.element_size() > 2) if half else 0
    return states / ranks + copies


def head_bytes(model, args: DPOConfig, rows: int, size: int) -> int:
    """What the head holds of `rows` rows: logits as far as they are kept, and a float32 gradient where it is trained."""
    weight = base_model(model).get_output_embeddings().weight
    logits = rows * weight.shape[0] * size
    if weight.requires_grad:
        return weight.numel() * 4 + min(logits, args.workspace_bytes)
    return min(logits, max(TILE_BYTES.values()))


def free_bytes(device: torch.device) -> int | None:
    """Bytes that this process can still take on `device`, None where nobody knows."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    import psutil

    return min([psutil.virtual_memory().available, *_cgroup_room()])


def _cgroup_room() -> list[int]:
    """What a container's limit leaves, where there is one; pages of files can be given up."""
    try:
        limit, used = ((CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        return [] if limit == "max" else [max(int(limit) - int(used) + int(stat.get("inactive_file", 0)), 0)]
    except (OSError, ValueError):
        return []


def _trunk_matrices(model) -> list[tuple[torch.nn.Parameter, int]]:
    """Each matrix that rows are multiplied by, with its rows plus columns; no embedding, no head, no adapter.

    The experts of a layer are one parameter of three dimensions. A quantised weight may be packed, so that only its module
    knows its sizes.
    """
    tables = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    tables.add(id(model.get_output_embeddings().weight))
    found = []
    for name, module in model.named_modules():
        for p in module._parameters.values():
            if p is not None and p.ndim > 1 and id(p) not in tables and "lora_" not in name:
                packed = hasattr(module, "in_features")
                found.append((p, module.in_features + module.out_features if packed else sum(p.shape[-2:])))
    return found


def _is_written_out(model) -> bool:
    config = model.config.get_text_config()
    sinks = any(name.endswith("sinks") for name, _ in model.named_parameters())
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    return config._attn_implementation == "eager" or (not torch.cuda.is_available() and (capped or sinks))


def _any_rank(flag: bool, device: torch.device) -> bool:
    """Ranks that recompute and ranks that do not would wait for each other's collectives for ever."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return flag
    found = torch.tensor([float(flag)], device=device)
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    return bool(found.item())


def _gb(n: float) -> str:
    return f"{n / 1e9:.1f} GB"

"""The reference's log-probs come from the cache on disk, a second model, or the base model under its adapters."""

import contextlib
import copy
import logging
import os
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback

from .. import __version__
from ..forest.batch import ForestCollator
from ..forest.gate import base_model
from ..forest.model import evaluating
from ..losses import LossOptions
from .compiling import described
from .ref_cache import RefCache, compute_missing, weights_fingerprint
from .sharding import autocast, is_fsdp2, passes_together

logger = logging.getLogger(__name__)
NONE, CACHED, MODEL, ADAPTER = "none", "cached", "model", "adapter"


def choose_reference(args, model, ref_model, sharded: bool, adapters: bool, streamed: bool = False) -> str:
    """How the run gets its reference log-probs; of `streamed` pairs in every step, unless asked otherwise.

    Raises ValueError for a combination that cannot work."""
    adapters = adapters or hasattr(model, "disable_adapter")
    if not LossOptions.of(args).has_reference:
        if ref_model is not None:
            raise ValueError(f"loss_type {args.loss_type} takes no reference: do not pass ref_model")
        return NONE
    if ref_model is model:
        raise ValueError("model and ref_model are the same object: leave ref_model out, a copy is made where needed")
    if args.sync_ref_model and (adapters or sharded):
        raise ValueError("sync_ref_model needs a whole second model: it works with neither PEFT nor FSDP or DeepSpeed")
    wanted = args.precompute_ref_log_probs
    if wanted is None:
        wanted = not (adapters or args.sync_ref_model or streamed)
    if wanted:
        return CACHED
    if (args.ref_cache_dir or args.precompute_ref_batch_size) and args.process_index == 0:
        logger.warning(
            "ref_cache_dir and precompute_ref_batch_size are not used: nothing is precomputed in this run "
            "(precompute_ref_log_probs=True does)"
        )
    if adapters and ref_model is None:
        return ADAPTER
    if sharded and streamed:
        raise ValueError(
            "the train data is streamed, so the reference is a second model, which is not sharded: train adapters (use_peft), "
            "or load the data whole"
        )
    if sharded:
        raise ValueError("precompute_ref_log_probs=False needs a second model, which is not sharded: leave it on")
    return MODEL


def frozen_copy(model: torch.nn.Module) -> torch.nn.Module:
    """A second model with the same weights that is never trained."""
    copied = copy.deepcopy(model)
    return copied.requires_grad_(False).eval()


def has_trained_adapters(model: torch.nn.Module) -> bool:
    """Whether a PEFT model's adapters change what it computes. LoRA with a zero second factor and equal copies does not."""
    if not hasattr(model, "disable_adapter"):
        return False
    if any(getattr(config.peft_type, "value", None) != "LORA" for config in model.peft_config.values()):
        return True
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if ("lora_B" in name or "lora_embedding_B" in name) and bool(parameter.any()):
            return True
        if ".modules_to_save." in name:
            before, _, after = name.partition(".modules_to_save.")
            if not torch.equal(parameter, parameters[f"{before}.original_module.{after.partition('.')[2]}"]):
                return True
    return False


def keep_start_adapters(model: torch.nn.Module) -> None:
    """Keep a frozen copy of a PEFT model's adapters: the model with these, not without adapters, is its own reference."""
    adapted = [n for n, p in model.named_parameters() if _is_adapter(n) or p.requires_grad]
    parameters = dict(model.named_parameters())
    base_model(model)._dpo_fast_start = {name: parameters[name].detach().clone() for name in adapted}


@contextlib.contextmanager
def _start_adapters(model):
    """Put the kept copy in the place of the adapters inside; they come back afterwards with gradients and graph intact."""
    start, parameters = base_model(model)._dpo_fast_start, dict(model.named_parameters())
    now = {name: parameters[name].data for name in start}
    try:
        for name, kept in start.items():
            start[name] = parameters[name].data = kept.to(now[name])
        yield
    finally:
        for name, data in now.items():
            parameters[name].data = data


@contextlib.contextmanager
def as_reference(model, adapters: bool):
    """Run the model as the reference: no gradients, no dropout, and adapters off or, where kept, as at the start."""
    inner = model if hasattr(model, "disable_adapter") else getattr(model, "module", model)
    before = contextlib.nullcontext()
    if adapters:
        before = _start_adapters(inner) if hasattr(base_model(inner), "_dpo_fast_start") else inner.disable_adapter()
    with evaluating(model), before:
        yield


def _is_adapter(name: str) -> bool:
    return "lora_" in name or "modules_to_save" in name


def default_cache_dir() -> Path:
    """`~/.cache/dpo_fast/ref_logps`, or under XDG_CACHE_HOME where that is set."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dpo_fast" / "ref_logps"


def reference_cache(trainer, model) -> RefCache:
    """The cache of `model`'s log-probs; the model is whole, as it is before anything shards it."""
    args, accelerator = trainer.args, trainer.accelerator
    adapters = hasattr(model, "disable_adapter")
    with as_reference(model, adapters):
        skip = None if hasattr(base_model(model), "_dpo_fast_start") or not adapters else _is_adapter
        fingerprint = weights_fingerprint(model, skip=skip)
    compiled = {"torch_compile": described(args)} if args.torch_compile else {}
    # FSDP2 casts whole weights where autocast casts inputs of some operations: other roundings.
    sharded = is_fsdp2(accelerator) and model is trainer.model
    casts = {"fsdp2": True} if sharded and accelerator.mixed_precision != "no" else {}
    return RefCache(
        args.ref_cache_dir or default_cache_dir(),
        weights=fingerprint,
        precision=f"{next(model.parameters()).dtype}/{accelerator.mixed_precision}",
        version=__version__,
        extra={"ld_alpha": args.ld_alpha, **casts, **compiled},
    )


def precompute(trainer, model, examples, name: str, cache: RefCache | None = None) -> np.ndarray:
    """float64 [len(examples), 2] log-probs under `model`, computed where `cache` lacks them, on all ranks together.

    Under FSDP2 the policy is sharded first, if it is not yet, and the pass goes through the shards: before the first step
    policy and reference are the same weights, and no rank ever needs all of them on its device.
    """
    args, accelerator = trainer.args, trainer.accelerator
    cache = reference_cache(trainer, model) if cache is None else cache
    adapters = hasattr(model, "disable_adapter")
    collator = ForestCollator(trainer.share, max_tokens=args.max_tokens_per_batch)
    device = accelerator.device
    sharded = is_fsdp2(accelerator) and model is trainer.model

    def logps(part) -> torch.Tensor:
        with as_reference(model, adapters), autocast(accelerator, sharded):
            forest = part.forest.to(device)
            return forest.sum_paths(model(forest=forest)["token_logps"], args.ld_alpha)

    def compute(batch) -> torch.Tensor:
        parts = collator(batch)["parts"]
        if sharded:
            run = [(logps(part), counts) for part, counts in passes_together(accelerator, parts, parts[-1])]
            return torch.cat([values for values, counts in run if counts], dim=1).T.cpu()
        return torch.cat([logps(part) for part in parts], dim=1).T.cpu()

    mine = examples[accelerator.process_index :: accelerator.num_processes]
    missing = len(cache.lookup(mine)[1])
    bar = tqdm(
        total=missing,
        desc=f"reference log-probs ({name})",
        unit="pair",
        disable=args.disable_tqdm or not missing or not accelerator.is_local_main_process,
    )
    batch_size = args.precompute_ref_batch_size or args.per_device_train_batch_size
    with bar, _on_device(trainer, model, missing) if not sharded else contextlib.nullcontext():
        if sharded and int(accelerator.gather(torch.tensor([missing], device=device)).sum()):
            trainer.shard()
        compute_missing(cache, mine, batch_size, compute, progress=lambda done, _: bar.update(done - bar.n))
        if sharded:  # until the others have finished too
            idle = collator(examples[:1])["parts"][0]
            while [logps(part) for part, _ in passes_together(accelerator, [], idle)]:
                pass
    accelerator.wait_for_everyone()
    if accelerator.num_processes > 1:
        cache = RefCache(cache.path.parent, **cache.header)
    values, missing = cache.lookup(examples)
    if missing:
        raise ValueError(
            f"{len(missing)} reference log-probs of other ranks are not in {cache.path}: put ref_cache_dir on a file "
            "system that all ranks share"
        )
    return values


@contextlib.contextmanager
def _on_device(trainer, model, missing: int):
    """The whole model on this rank's device, and back where it was afterwards; nothing moves where no pair is missing."""
    where = next(model.parameters()).device
    if not missing or getattr(base_model(model), "is_quantized", False):  # bitsandbytes' weights do not move
        yield
        return
    try:
        model.to(trainer.accelerator.device)
    except torch.OutOfMemoryError as error:
        raise ValueError(
            "the reference pass needs the whole model on one accelerator: train with FSDP2, whose shards it goes through, "
            "or adapters (use_peft), or fill the cache (ref_cache_dir) on a larger accelerator"
        ) from error
    yield
    model.to(where)


class SyncRefModelCallback(TrainerCallback):
    """Move the reference every `steps` steps: `ref = alpha * policy + (1 - alpha) * ref` (TR-DPO, arXiv 2404.09656)."""

    def __init__(self, ref_model: torch.nn.Module, alpha: float, steps: int):
        self.ref_model, self.alpha, self.steps = ref_model, alpha, steps

    @torch.no_grad()
    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.steps == 0:
            for mine, theirs in zip(self.ref_model.parameters(), base_model(model).parameters(), strict=True):
                mine.lerp_(theirs.to(mine.dtype), self.alpha)

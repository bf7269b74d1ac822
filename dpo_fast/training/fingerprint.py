"""What a resumed run must have in common with the run that wrote its checkpoint, and the error where it does not.

A checkpoint restores weights, optimizer and place in the data. Anything else that decides what is computed comes from
the options of the resumed run; where these differ, the result would belong to neither of the two runs.
"""

import dataclasses
import hashlib
import json

from .compiling import described
from .ref_cache import weights_fingerprint

# Options of a config that decide what is computed, beside those of the loss.
_OPTIONS = (
    "ld_alpha", "use_weighting", "router_aux_loss_coef", "disable_dropout", "max_length", "bf16", "fp16", "seed",
    "data_seed", "train_sampling_strategy", "tokens_per_step", "dataloader_drop_last", "learning_rate", "lr_scheduler_type",
    "lr_scheduler_kwargs", "warmup_steps", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "optim_args",
    "max_grad_norm", "sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps",
)  # fmt: skip
# Schedules that do not depend on the number of steps.
_ENDLESS = ("constant", "constant_with_warmup", "inverse_sqrt", "reduce_lr_on_plateau", "greedy")
# Options that the optimizer's own file holds too; the values there are replaced where the change is allowed.
OPTIMIZER = {
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_steps", "num_train_epochs"),
    *("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
}
_FIXED = {
    "optim": "its state is of another optimizer: start from the checkpoint's weights by naming it as the model",
    "peft_config": "its weights are of other adapters: start from the checkpoint by naming it as the model",
}


def fingerprint(trainer) -> dict:
    """Name -> JSON value of everything that must agree; the names are those of options where an option exists."""
    args, setup = trainer.args, trainer.setup
    found = {
        "model": weights_fingerprint(trainer.model, skip=_random_at_start),
        "reference": None,
        "train_dataset": _data_digest(trainer.train_dataset),
        "pairs_per_step": args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "optim": type(trainer.optimizer).__name__ if trainer.optimizer is not None else args.optim,
        "peft_config": _adapters(trainer.model),
        **dataclasses.asdict(setup.loss_options),
        **{name: getattr(args, name) for name in _OPTIONS},
    }
    if setup.foreign_reference and setup.ref_model is not None:
        found["reference"] = weights_fingerprint(setup.ref_model)
    if compiled := described(args):  # left out otherwise, as in older checkpoints
        found["torch_compile"] = compiled
    if setup.loss_options.over_batch:
        found["per_device_train_batch_size"] = args.per_device_train_batch_size
    schedule = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    if schedule not in _ENDLESS or 0 < args.warmup_steps < 1:
        of_steps = args.max_steps > 0
        found["max_steps" if of_steps else "num_train_epochs"] = args.max_steps if of_steps else args.num_train_epochs
    return json.loads(json.dumps(found, default=str))


def changes(written: dict, now: dict) -> dict[str, tuple]:
    """Name -> (then, now) of every entry that differs."""
    names = sorted(written.keys() | now.keys())
    return {n: (written.get(n), now.get(n)) for n in names if written.get(n) != now.get(n)}


def compare(written: dict, now: dict, allowed, folder) -> set[str]:
    """The names of what differs. Raises ValueError that names them where `allowed` does not hold all of them."""
    found = changes(written, now)
    allowed = set(allowed or ())
    if unknown := allowed - written.keys() - now.keys():
        raise ValueError(f"resume_changed names {', '.join(sorted(unknown))}: give some of {', '.join(sorted(now))}")
    if idle := allowed - found.keys():
        raise ValueError(f"resume_changed names {', '.join(sorted(idle))}, which did not change: leave it out")
    for name in found.keys() & _FIXED.keys():
        raise ValueError(f"{folder} cannot be resumed with another {name} ({_say(*found[name])}): {_FIXED[name]}")
    if wrong := sorted(found.keys() - allowed):
        listed = "; ".join(f"{name} {_say(*found[name])}" for name in wrong)
        raise ValueError(
            f"{folder} is a checkpoint of another run: {listed}. Give what it was trained with, or allow the change: "
            f"--resume_changed {' '.join(sorted(found))}"
        )
    return set(found)


def _say(then, now) -> str:
    hashes = all(isinstance(value, str) and len(value) == 32 for value in (then, now))
    return "differs" if hashes else f"was {then}, is {now}"


def _random_at_start(name: str) -> bool:
    """Whether a weight of a PEFT model starts at random: LoRA's first factor does, while its second is zero."""
    return "lora_A" in name or "lora_embedding_A" in name


def _adapters(model) -> dict | None:
    configs = getattr(model, "peft_config", None)
    if not configs:
        return None
    names = (
        "peft_type",
        "r",
        "lora_alpha",
        "lora_dropout",
        "target_modules",
        "modules_to_save",
        "use_dora",
        "use_rslora",
    )
    return {
        adapter: {n: _plain(getattr(config, n, None)) for n in names}
        for adapter, config in sorted(configs.items())
    }  # fmt: skip


def _plain(value):
    return sorted(value) if isinstance(value, (set, list, tuple)) else getattr(value, "value", value)


def _data_digest(data) -> str:
    """32 hex digits of the pairs in their order (of a stream, the first), with the reference's log-probs where the user gave them."""
    digest = hashlib.blake2b(digest_size=16)
    keys, reference = data.examples.keys(), None if data.computed else data.examples.reference
    if reference is None:
        digest.update(keys.tobytes())
    else:
        for key, logps in zip(keys, reference.tolist(), strict=True):
            digest.update(key.tobytes() + repr(tuple(logps)).encode())
    return digest.hexdigest()

"""For users of TRL: our trainer under TRL's names, or TRL's own trainer with our head.

    from dpo_fast.integrations.trl import DPOConfig, DPOTrainer    # instead of trl's: the whole speed
    undo = patch_trl()                                             # TRL's own DPOTrainer, only its head is ours

`DPOTrainer` here takes everything that TRL 1.16's takes, in the same order, and also a `trl.DPOConfig`. `patch_trl` replaces
only the function that turns hidden states (TRL 1.16) or logits (TRL 1.8 and 1.9) into log-probs; it returns a function that
puts TRL's own back.
"""

import dataclasses
from collections.abc import Callable

import torch
from packaging.version import Version
from torch import Tensor

from ..ops import linear_token_logps, token_logps
from ..training.config import DPOConfig
from ..training.trainer import DPOTrainer as _DPOTrainer
from . import liger
from .peer import Patches, check_version, once

__all__ = ["DPOConfig", "DPOTrainer", "patch_trl"]

# 1.8 and 1.9 compute logits, 1.16 has a fused head; the versions between were not tried.
TESTED = ("==1.8.*", "==1.9.*", "==1.16.*")
_ACTIVE: dict[str, Callable[[], None]] = {}


# ---- Our trainer ----


class DPOTrainer(_DPOTrainer):
    """`dpo_fast.DPOTrainer` with TRL 1.16's arguments in TRL's order; `args` may be a `trl.DPOConfig`."""

    def __init__(
        self,
        model,
        ref_model=None,
        args=None,
        data_collator=None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        compute_metrics=None,
        callbacks=None,
        optimizers=(None, None),
        quantization_config=None,
        peft_config=None,
    ):
        super().__init__(
            model,
            ref_model=ref_model,
            args=as_config(args),
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
        )


def as_config(args) -> DPOConfig | None:
    """A `trl.DPOConfig` as ours, with every field that both have. Raises ValueError for a set field that ours lacks."""
    if args is None or isinstance(args, DPOConfig):
        return args
    known = {field.name for field in dataclasses.fields(DPOConfig) if field.init}
    values, foreign = {}, []
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        if not field.init or field.name == "remove_unused_columns":
            continue
        if field.name in known:
            values[field.name] = value
        elif value != _default(field):
            foreign.append(f"{field.name}={value!r}")
    if foreign:
        raise ValueError(f"dpo_fast cannot honour {', '.join(foreign)} of {type(args).__name__}: leave them out")
    # These are off by default in TRL and on by default here; False in a trl.DPOConfig is taken as not set.
    for name in ("padding_free", "precompute_ref_log_probs"):
        if not values.get(name):
            values.pop(name, None)
    return DPOConfig(**values)


def _default(field: dataclasses.Field):
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


# ---- TRL's trainer with our head ----


class ChunkedLogProbFunction:
    """Replaces TRL 1.16's autograd function of that name: the same arguments and outputs, on `linear_token_logps`."""

    @staticmethod
    def apply(
        hidden: Tensor,  # [N, D]
        weight: Tensor,  # [V, D]
        bias: Tensor | None,  # [V]
        targets: Tensor,  # [N]
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
    ) -> tuple[Tensor | None, ...]:
        """Log-probs [N], entropy, log_sum_sq_probs, mean_logits and is_top1 [N], None where not asked for.

        `chunk_size` has no effect on numbers. Raises ValueError for weights that ZeRO-3 has partitioned.
        """
        if hasattr(weight, "ds_id"):
            raise ValueError("patch_trl does not work under ZeRO-3: undo it, or use FSDP2")
        names = tuple(name for name in ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1") if name in outputs)
        found = linear_token_logps(
            hidden,
            weight,
            targets,
            bias=bias,
            logit_scale=logit_scale,
            softcap=final_logit_softcapping,
            temperature=temperature,
            outputs=names,
        )
        logps, statistics = found if names else (found, {})
        if "entropy" in statistics:
            statistics["entropy"] = _ForTheLog.apply(statistics["entropy"], logps)
        if "mean_logits" in statistics:
            # TRL takes the mean after the temperature.
            statistics["mean_logits"] = statistics["mean_logits"] / temperature
        return logps, *(statistics.get(name) for name in ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"))


class _ForTheLog(torch.autograd.Function):
    """The entropy, which carries no gradient here: a loss that needs one fails instead of being trained without it."""

    @staticmethod
    def forward(ctx, entropy: Tensor, logps: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        return entropy.clone()

    @staticmethod
    def backward(ctx, grad: Tensor | None):
        if grad is not None:
            raise RuntimeError("the entropy has no gradient under patch_trl: undo the patch for a loss that reads it")
        return None, None


def selective_log_softmax(logits: Tensor, index: Tensor) -> Tensor:
    """Replaces TRL 1.8's function: [..., V], [...] -> log-probs [...] in the type of logits."""
    flat = token_logps(logits.reshape(-1, logits.shape[-1]), index.reshape(-1), ignore_index=-1)
    # TRL 1.8 writes into the result.
    return flat.view(index.shape).to(logits.dtype).clone()


def patch_trl(*, any_version: bool = False) -> Callable[[], None]:
    """Replace the head of TRL's own trainers; returns a function that puts TRL's back. A second patch changes nothing.

    In TRL 1.16 it replaces `trl.trainer.utils._ChunkedLogProbFunction`, and only completion rows enter it, on every device.
    In TRL 1.8 and 1.9 it replaces `selective_log_softmax` of the DPO trainer, and Liger's loss under `use_liger_kernel`.
    Raises ImportError where TRL is not installed or its version was not tested (`any_version=True` tries it).
    """
    found = check_version("trl", *TESTED, any_version=any_version)

    def patch() -> Callable[[], None]:
        with Patches() as patches:
            if found >= Version("1.15"):
                from trl.trainer import utils

                patches.replace(utils, "_ChunkedLogProbFunction", ChunkedLogProbFunction)
                patches.replace(utils, "_use_triton", lambda device: True)  # it asks for completion rows alone
            else:
                from trl.trainer import dpo_trainer

                patches.replace(dpo_trainer, "selective_log_softmax", selective_log_softmax)
                if hasattr(dpo_trainer, "LigerFusedLinearDPOLoss"):
                    patches.replace(dpo_trainer, "LigerFusedLinearDPOLoss", liger.LigerFusedLinearDPOLoss)
        return patches.undo

    return once(_ACTIVE, "trl", patch)

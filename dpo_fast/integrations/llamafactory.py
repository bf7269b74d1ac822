"""LLaMA-Factory: its DPO workflow without logits in memory.

    from dpo_fast.integrations.llamafactory import patch_llamafactory
    undo = patch_llamafactory()            # before llamafactory's run_exp(...)

The patch replaces `get_batch_logps`, and in its CustomDPOTrainer `concatenated_forward` (the trunk runs through the model's
own forward, then the head on completion tokens) and `compute_preference_loss`. With TRL 0.24 LLaMA-Factory's `ipo` and
`hinge` silently train `sigmoid`, since the loss type never reaches TRL; here they train their own loss.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..forest.gate import base_model, output_layer, read_logit_transform
from ..forest.head import head_weights
from ..forest.paths import sum_logps
from ..losses import preference_loss
from ..ops import linear_token_logps, token_logps
from .peer import Patches, check_version, once

TESTED = ">=0.9.4,<0.9.6"
_ACTIVE: dict[str, Callable[[], None]] = {}


def get_batch_logps(
    logits: Tensor, labels: Tensor, label_pad_token_id: int = -100, ld_alpha: float | None = None
) -> tuple[Tensor, Tensor]:
    """Replaces LLaMA-Factory's: logits [2B, T, V], labels [2B, T] -> summed log-probs [2B] and their token counts [2B]."""
    if logits.shape[:-1] != labels.shape:
        raise ValueError("Logits (batchsize x seqlen) and labels must have the same shape.")
    targets = labels[:, 1:]
    tokens = token_logps(logits[:, :-1], targets, ignore_index=label_pad_token_id)
    return _summed(tokens, targets != label_pad_token_id, ld_alpha)


def _summed(tokens: Tensor, scored: Tensor, ld_alpha: float | None) -> tuple[Tensor, Tensor]:
    """Token log-probs [2B, T] -> sums [2B] and lengths [2B]; a row's completion follows its prompt, before the padding."""
    lengths = scored.sum(1)
    if ld_alpha is None:
        return tokens.sum(1), lengths
    order = torch.argsort((~scored).int(), dim=1, stable=True)  # scored tokens first
    partner = lengths.view(2, -1).flip(0).flatten()
    return sum_logps(tokens.gather(1, order), lengths, partner_lengths=partner, ld_alpha=ld_alpha), lengths


def concatenated_forward(self, model, batch: dict[str, Tensor], is_ref_model: bool = False) -> dict[str, Tensor]:
    """Replaces CustomDPOTrainer's and returns the same names; `*_logits` are one number each, the exact mean of the logits.

    Raises ValueError for soft-capped logits and sharded weights (undo the patch for these).
    """
    bare = base_model(self.accelerator.unwrap_model(model))
    head, transform = output_layer(bare), read_logit_transform(bare.config)
    weight, bias = head_weights(head)
    if transform.softcap is not None:
        raise ValueError("patch_llamafactory does not know soft-capped logits: undo it for this model")
    if hasattr(weight, "ds_id") or hasattr(weight, "full_tensor"):
        raise ValueError("patch_llamafactory does not work with sharded weights: undo it")
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    # The model computes at least one position of logits; its head would read the last hidden state.
    out = model(**inputs, return_dict=True, use_cache=False, output_hidden_states=True, logits_to_keep=1)
    hidden, labels = out.hidden_states[-1], batch["labels"]
    _check_last_position(out.logits[:, -1], hidden[:, -1], weight, bias, transform.logit_scale)
    targets = labels[:, 1:]
    tokens = linear_token_logps(
        hidden[:, :-1], weight, targets, bias=bias, logit_scale=transform.logit_scale, ignore_index=-100
    )
    logps, lengths = _summed(tokens, targets != -100, None if is_ref_model else self.ld_alpha)
    averaged = logps / lengths.clamp(min=1)
    if self.loss_type in ("ipo", "orpo", "simpo"):
        logps = averaged
    chosen, rejected = logps.chunk(2)
    with torch.no_grad():
        word, shift = weight.float().mean(0), 0.0 if bias is None else bias.float().mean()
        means = [transform.logit_scale * (h.float().mean((0, 1)) @ word + shift) for h in hidden.chunk(2)]
    return {
        "chosen_logps": chosen,
        "rejected_logps": rejected,
        "chosen_logits": means[0],
        "rejected_logits": means[1],
        "chosen_logps_avg": averaged.chunk(2)[0],
    }


def _check_last_position(logits: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float) -> None:
    """Raise ValueError unless the head on the last hidden state gives the model's own logits."""
    with torch.no_grad():
        ours = torch.nn.functional.linear(hidden, weight, bias).float() * scale
        error, size = (ours - logits.float()).abs().max(), logits.float().abs().max()
        if not error <= 2e-2 * size + 1e-4:
            raise ValueError(
                "this model's logits are not its head times its last hidden state: undo patch_llamafactory"
            )


def compute_preference_loss(
    self, policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps
):
    """Replaces CustomDPOTrainer's: losses [B], chosen and rejected rewards [B].

    For ipo, orpo and simpo the log-probs are means over tokens, as `concatenated_forward` returns them.
    """
    one = torch.ones_like(policy_chosen_logps)
    options = {"beta": self.beta, "loss_type": self.loss_type}
    if self.loss_type in ("sigmoid", "robust", "exo_pair"):
        options["label_smoothing"] = self.label_smoothing
    references = (reference_chosen_logps, reference_rejected_logps)
    if not self.finetuning_args.use_ref_model:
        references = (None, None)
        if self.loss_type == "simpo":
            options["simpo_gamma"] = self.simpo_gamma
    if self.loss_type in ("ipo", "orpo", "simpo"):
        options |= {"chosen_lengths": one, "rejected_lengths": one}
    out = preference_loss(policy_chosen_logps, policy_rejected_logps, *references, **options)
    losses = out.losses
    if self.finetuning_args.use_ref_model and self.bco_gemma > 1e-6:
        bco = self.bco_loss(policy_chosen_logps, policy_rejected_logps, *references)
        losses = (losses + bco * self.bco_gemma) / (1.0 + self.bco_gemma)
    return losses, out.chosen_rewards, out.rejected_rewards


def patch_llamafactory(*, any_version: bool = False) -> Callable[[], None]:
    """Replace the log-probs and the loss of LLaMA-Factory's DPO trainer; returns a function that undoes the patch.

    Raises ImportError where LLaMA-Factory is not installed or its version was not tested (`any_version=True` tries it).
    """
    check_version("llamafactory", TESTED, any_version=any_version)

    def patch() -> Callable[[], None]:
        from llamafactory.train import trainer_utils
        from llamafactory.train.dpo import trainer

        with Patches() as patches:
            patches.replace(trainer_utils, "get_batch_logps", get_batch_logps)
            patches.replace(trainer, "get_batch_logps", get_batch_logps)
            patches.replace(trainer.CustomDPOTrainer, "concatenated_forward", concatenated_forward)
            patches.replace(trainer.CustomDPOTrainer, "compute_preference_loss", compute_preference_loss)
        return patches.undo

    return once(_ACTIVE, "llamafactory", patch)

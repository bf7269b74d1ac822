"""torchtune's DPO loss and log-probs: `loss: {_component_: dpo_fast.integrations.torchtune.DPOLoss}` in a recipe's YAML."""

from torch import Tensor, nn

from ..loss_table import LOSSES
from ..losses import LossOptions, preference_loss, require
from ..ops import sequence_logps


class DPOLoss(nn.Module):
    """torchtune's `rlhf.loss.DPOLoss`, with every loss of `LOSSES` that needs log-probs alone.

    It takes the four tensors [B] of torchtune 0.6 (policy chosen, policy rejected, reference chosen, reference rejected),
    or the two `ChosenRejectedOutputs` of its main branch. It returns losses [B], chosen and rejected rewards [B].

    Raises ValueError for an option that cannot work, among them a loss that needs lengths, which torchtune does not give.
    """

    is_reference_free = False  # The recipes of the main branch ask; each loss without a reference needs lengths.

    def __init__(self, beta: float = 0.1, label_smoothing: float = 0.0, loss_type: str = "sigmoid"):
        super().__init__()
        self.options = {"beta": beta, "label_smoothing": label_smoothing, "loss_type": loss_type}
        given = LossOptions(**self.options).check()
        unable = [name for name, row in zip(given.names, given.rows, strict=True) if row.needs_lengths]
        able = ", ".join(name for name, row in LOSSES.items() if not row.needs_lengths)
        require(
            not unable,
            lambda: (
                f"loss_type {unable[0]!r} needs the completions' lengths, which torchtune does not give: use {able}"
            ),
        )

    def forward(self, *inputs) -> tuple[Tensor, Tensor, Tensor]:
        """Losses and rewards [B]. Raises ValueError for anything but four tensors or two `ChosenRejectedOutputs`."""
        if len(inputs) == 2 and all(hasattr(pair, "chosen_logps") for pair in inputs):
            inputs = [x for pair in inputs for x in (pair.chosen_logps, pair.rejected_logps)]
        if len(inputs) != 4:
            raise ValueError(
                f"DPOLoss takes four tensors [B] or two ChosenRejectedOutputs, got {len(inputs)} arguments"
            )
        out = preference_loss(*inputs, **self.options)
        return out.losses, out.chosen_rewards, out.rejected_rewards


def get_batch_log_probs(
    logits: Tensor, labels: Tensor, label_pad_token_id: int = -100, return_average_logprobs: bool = False
) -> Tensor:
    """The log-prob of each sequence: logits [S, T, V], labels [S, T] (not shifted) -> [S], summed or averaged.

    It is equivalent to torchtune's `rlhf.get_batch_log_probs`. Raises ValueError for shapes that do not fit.
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError("Logits (batch and sequence length dim) and labels must have the same shape.")
    return sequence_logps(
        logits[:, :-1], labels[:, 1:], ignore_index=label_pad_token_id, average=return_average_logprobs
    )

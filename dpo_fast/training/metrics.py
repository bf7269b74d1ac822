"""Training metrics: sums stay on the device, cross to the host once per log, and give true means over pairs and tokens.

`pair_table` turns one forward pass into one row of sums per pair, the trainer adds the rows up over micro-batches and
ranks, and `means` divides. The names are TRL's. A ratio of sums cannot depend on how pairs were split over batches, parts
and ranks.
"""

import torch

from ..forest.packing import PrefixForest
from ..losses import PreferenceOutput

# The columns of a table are sums, its rows are pairs.
COLUMNS = (
    "loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen",
    "logps/rejected", "logps/chosen_delta", "aux_loss", "logits/chosen", "logits/rejected", "mean_token_accuracy",
    "entropy", "pairs", "chosen_tokens", "rejected_tokens",
)  # fmt: skip
_PER_PAIR = COLUMNS[:9]
_DIVISOR = {
    **dict.fromkeys(_PER_PAIR, ("pairs",)),
    "logits/chosen": ("chosen_tokens",),
    "logits/rejected": ("rejected_tokens",),
    "mean_token_accuracy": ("chosen_tokens",),
    "entropy": ("chosen_tokens", "rejected_tokens"),
}

# The statistics that the head must return for the table.
STATISTICS = ("entropy", "mean_logits", "is_top1")


@torch.no_grad()
def pair_table(
    forest: PrefixForest,
    statistics: dict[str, torch.Tensor],
    result: PreferenceOutput,
    chosen_delta: torch.Tensor,
    aux_loss: torch.Tensor | None,
) -> torch.Tensor:
    """Float64 sums [B, len(COLUMNS)], one row per pair; statistics of tokens are summed along each completion."""
    pairs = len(result.losses)
    paths = {name: forest.gather_paths(statistics[name].double()).sum(1).view(2, pairs) for name in STATISTICS}
    lengths = forest.lengths.view(2, pairs)
    columns = {
        "loss": result.losses,
        "rewards/chosen": result.chosen_rewards,
        "rewards/rejected": result.rejected_rewards,
        "rewards/accuracies": result.chosen_rewards > result.rejected_rewards,
        "rewards/margins": result.chosen_rewards - result.rejected_rewards,
        "logps/chosen": result.chosen_logps,
        "logps/rejected": result.rejected_logps,
        "logps/chosen_delta": chosen_delta,
        "aux_loss": torch.zeros_like(chosen_delta) if aux_loss is None else aux_loss.expand(pairs),
        "logits/chosen": paths["mean_logits"][0],
        "logits/rejected": paths["mean_logits"][1],
        "mean_token_accuracy": paths["is_top1"][0],
        "entropy": paths["entropy"].sum(0),
        "pairs": torch.ones_like(chosen_delta),
        "chosen_tokens": lengths[0],
        "rejected_tokens": lengths[1],
    }
    return torch.stack([columns[name].double() for name in COLUMNS], dim=1)


def means(sums: torch.Tensor) -> dict[str, float]:
    """Names and true means from the column sums [len(COLUMNS)] of tables, which cross to the host once."""
    values = dict(zip(COLUMNS, sums.tolist(), strict=True))
    result = {}
    for name, divisor in _DIVISOR.items():
        count = sum(values[d] for d in divisor)
        result[name] = values[name] / count if count else 0.0
    return result

"""Sums, means and WPO weights per sequence or pair, from the log-probs of tokens [S, C] with one row per completion."""

import torch
from torch import Tensor

from ..losses import require, require_in


def sum_logps(
    token_logps: Tensor,
    lengths: Tensor,
    *,
    partner_lengths: Tensor | None = None,
    ld_alpha: float | None = None,
    average: bool = False,
) -> Tensor:
    """Log-probs of sequences from those of their tokens: `token_logps.sum(1)`, and `/ lengths` to average.

    Args:
        token_logps: [S, C] in nats, completion tokens first, zeros after the last one. They are summed in float32 or
            wider.
        lengths: [S] scored tokens. A length of zero gives 0, averaged or not.
        partner_lengths: [S] lengths of the other completion of each pair, used with `ld_alpha`.
        ld_alpha: in [0, 1], the weight of the tokens past min(length, partner_length) (LD-DPO, arXiv 2409.06411).
            It must be the same for policy and reference.

    Returns:
        [S]. Raises ValueError for an `ld_alpha` out of range or without `partner_lengths`.
    """
    logps = token_logps.to(torch.promote_types(token_logps.dtype, torch.float32))
    if ld_alpha is not None:
        require_in("[0, 1]", "ld_alpha", ld_alpha)
        require(
            partner_lengths is not None, lambda: "partner_lengths is None but ld_alpha needs it: give the lengths [S]"
        )
        shared = torch.minimum(lengths, partner_lengths)
        logps = torch.where(
            torch.arange(logps.shape[1], device=logps.device) < shared[:, None], logps, ld_alpha * logps
        )
    summed = logps.sum(1)
    return summed / lengths.clamp(min=1) if average else summed


def wpo_weights(token_logps: Tensor, log_sum_sq_probs: Tensor, lengths: Tensor) -> Tensor:
    """How likely each pair is under the policy (WPO, arXiv 2406.11827 eq. 2), the `pair_weights` of `preference_loss`:

        mean = (token_logps - log_sum_sq_probs).sum(1) / lengths
        weights = mean.exp().chunk(2)[0] * mean.exp().chunk(2)[1]

    Args:
        token_logps: [2B, C] in nats, the B chosen rows first; entries past a row's length are not used.
        log_sum_sq_probs: [2B, C], log of the sum over the vocabulary of the squared probabilities.
        lengths: [2B] completion tokens; an empty completion's mean is 0.

    Returns:
        [B], detached, float32 or wider.
    """
    aligned = token_logps.detach() - log_sum_sq_probs.detach()
    past = torch.arange(aligned.shape[1], device=aligned.device) >= lengths[:, None]
    mean_w, mean_l = sum_logps(aligned.masked_fill(past, 0), lengths, average=True).chunk(2)
    return torch.exp(mean_w + mean_l)

"""The truth of the tests: the ops written as their formulas, on whole logits, differentiated by autograd.

It is short enough to be believed, and it shares no function with the code that runs. Tests call it in float64.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def token_logps(
    logits: Tensor,  # [..., V]
    targets: Tensor,  # [...]
    *,
    ignore_index: int = -100,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """`logits.log_softmax(-1).gather(-1, targets)` in the shape of targets, 0 where the target is ignored."""
    z = transform_logits(logits, logit_scale, softcap, temperature)
    return -F.cross_entropy(z.flatten(0, -2), targets.flatten(), ignore_index=ignore_index, reduction="none").view(
        targets.shape
    )


def linear_token_logps(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    targets: Tensor,  # [N]
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    outputs: tuple[str, ...] = (),
) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probs [N] of the targets under a linear head, and the named statistics [N]."""
    logits = F.linear(hidden, weight, bias)
    z = transform_logits(logits, logit_scale, softcap, temperature)
    logps = token_logps(logits, targets, logit_scale=logit_scale, softcap=softcap, temperature=temperature)
    return logps, {name: STATISTICS[name](z.detach(), targets, temperature) for name in outputs}


def transform_logits(
    logits: Tensor, logit_scale: float = 1.0, softcap: float | None = None, temperature: float = 1.0
) -> Tensor:
    """Scale, then soft-cap, then temperature, in float32 or wider."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32)) * logit_scale
    return (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature


# Statistics [...] of transformed logits z [..., V] and targets [...]; ignored targets are not masked here.
STATISTICS = {
    "entropy": lambda z, targets, temperature: torch.special.entr(z.softmax(-1)).sum(-1),
    "mean_logits": lambda z, targets, temperature: (z * temperature).mean(-1),
    "is_top1": lambda z, targets, temperature: z.gather(-1, targets.clamp(min=0)[..., None])[..., 0] >= z.amax(-1),
    "log_sum_sq_probs": lambda z, targets, temperature: z.softmax(-1).square().sum(-1).log(),
}

"""The ops in plain PyTorch, whole logits in memory: the truth of every test and the back end `torch` of what has no other.

Nothing here is fast. Signatures are those of ops.py without `backend`.
"""

import torch

# Per-row statistics that `linear_token_logps` can return beside the log-probs; none carries a gradient.
OUTPUTS = ("entropy", "mean_logits", "is_top1", "log_sum_sq_probs")


def transform_logits(logits, logit_scale=1.0, softcap=None, temperature=1.0) -> torch.Tensor:
    """Scale, soft-cap, temperature, in the order models apply them: `cap * tanh(logits * scale / cap) / temperature`."""
    if logit_scale != 1.0:
        logits = logits * logit_scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    return logits if temperature == 1.0 else logits / temperature


def token_logps(logits, targets, *, ignore_index=-100, temperature=1.0) -> torch.Tensor:
    """[..., V], [...] -> [...]: `logits.log_softmax(-1).gather(-1, targets)`, 0 where the target is ignored."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    scored = targets != ignore_index
    logps = torch.log_softmax(logits.to(wide) / temperature, dim=-1)
    picked = logps.gather(-1, targets.masked_fill(~scored, 0)[..., None])[..., 0]
    return torch.where(scored, picked, 0.0)


def linear_token_logps(
    hidden, weight, targets, *, bias=None, logit_scale=1.0, softcap=None, temperature=1.0, outputs=()
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """[N, D], [V, D], [N] -> log-probs [N] and the named statistics [N]."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    raw = torch.nn.functional.linear(hidden, weight, bias).to(wide)
    logits = transform_logits(raw, logit_scale, softcap, temperature)
    logps = torch.log_softmax(logits, dim=-1)
    picked = logps.gather(-1, targets[:, None])[:, 0]
    with torch.no_grad():
        stats = {
            "entropy": lambda: -(logps.exp() * logps.clamp_min(torch.finfo(wide).min)).sum(-1),
            "mean_logits": lambda: (logits * temperature).mean(-1),
            "is_top1": lambda: picked >= logps.amax(-1),
            "log_sum_sq_probs": lambda: torch.logsumexp(2 * logps, dim=-1),
        }
        return picked, {name: stats[name]() for name in outputs}

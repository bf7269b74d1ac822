"""Inputs of the Triton kernels, plain torch in their place, and the rule by which the two are compared.

The kernels run on CUDA tensors, or on the CPU where TRITON_INTERPRET=1 was set before triton was imported.
"""

import pytest
import torch
from op_tools import INTERPRETED

from dpo_fast import reference

DEVICE = "cpu" if INTERPRETED else "cuda"
on_device = (lambda test: test) if INTERPRETED else pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FLOOR = {torch.float32: 1e-5, torch.bfloat16: 1e-3, torch.float16: 1e-3}
PLAIN = {"scale": 1.0, "softcap": None, "temperature": 1.0}


def data(n, v, dtype, seed=0, spread=2.0, ignored=True):
    rng = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(n, v, generator=rng, dtype=torch.float64)
    targets = torch.randint(v, (n,), generator=rng)
    if ignored:
        targets[1::3] = -100
    return logits.to(dtype).to(DEVICE), targets.to(DEVICE)


def plain_torch(logits, targets, transform, wide):
    """Logits as a leaf of type `wide`, their log-probs and statistics, 0 where the target is ignored."""
    leaf = logits.detach().to(wide).requires_grad_()
    x = reference.transform_logits(leaf, transform["scale"], transform["softcap"], transform["temperature"])
    log_probs = x.log_softmax(-1)
    scored = targets != -100
    picked = log_probs.gather(-1, targets.masked_fill(~scored, 0)[:, None])[:, 0]
    with torch.no_grad():
        probs = log_probs.exp()
        stats = {
            "entropy": -(probs * log_probs.clamp_min(torch.finfo(wide).min)).sum(-1),
            "mean_logits": (x * transform["temperature"]).mean(-1),
            "is_top1": picked >= log_probs.amax(-1),
            "log_sum_sq_probs": (probs * probs).sum(-1).log(),
            "lse": x.logsumexp(-1),
        }
        stats = {name: torch.where(scored, value, torch.zeros_like(value)) for name, value in stats.items()}
    return leaf, torch.where(scored, picked, 0.0), stats


def close(ours, plain, truth, dtype, name=""):
    """The rule: relative to the norm of the float64 result, over the finite entries; infinite ones must agree."""
    truth = truth.double()
    finite = truth.isfinite()
    assert ours.shape == truth.shape, name
    assert torch.equal(ours[~finite].double(), truth[~finite]), name
    size = truth[finite].norm().clamp_min(1e-30)

    def error(x):
        return ((x.double() - truth)[finite].norm() / size).item()

    # A norm of 0 asks for exact zeros.
    assert error(ours) <= 2 * error(plain) + FLOOR[dtype], (name, error(ours), error(plain))

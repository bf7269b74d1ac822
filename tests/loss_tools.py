"""Names of losses by what they take, random pairs for each, and the gradient of a loss with respect to its log-probs."""

import math

import torch

from dpo_fast.losses import preference_loss

words = str.split
LOSS_NAMES = words(
    "sigmoid sigmoid_norm hinge ipo exo_pair nca_pair robust bco_pair sppo_hard aot aot_unpaired apo_zero apo_down "
    "discopop sft simpo orpo"
)
REFERENCE_FREE = {"sft", "simpo", "orpo"}
OVER_BATCH = {"aot", "aot_unpaired"}
MARGIN = set(words("sigmoid hinge exo_pair robust aot discopop"))
F_LOSSES = words("sigmoid sigmoid_norm hinge ipo exo_pair robust discopop")
SMOOTHED = {"sigmoid": 0.1, "exo_pair": 0.01, "robust": 0.1, "aot": 0.1, "aot_unpaired": 0.1, "simpo": 0.1}


def options(name):
    """The loss, smoothed where that has an effect (exo_pair needs it)."""
    return {"loss_type": name, "label_smoothing": SMOOTHED.get(name, 0.0)}


def batch(name, pairs=6, seed=0, dtype=torch.float64):
    """Log-probs and lengths of `pairs` ragged pairs as keyword arguments; no reference where the loss takes none."""
    rng = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 12, (2, pairs), generator=rng)
    policy, reference = -torch.rand(2, 2, pairs, generator=rng, dtype=dtype) * lengths * 3
    out = {"chosen_logps": policy[0], "rejected_logps": policy[1]}
    if name not in REFERENCE_FREE:
        out |= {"ref_chosen_logps": reference[0], "ref_rejected_logps": reference[1]}
    return out | {"chosen_lengths": lengths[0], "rejected_lengths": lengths[1]}


def grads(data, weight=1.0, **kwargs):
    """The loss and its gradient [2, B] with respect to both log-probs."""
    leaves = [data[key].detach().clone().requires_grad_() for key in ("chosen_logps", "rejected_logps")]
    out = preference_loss(
        *leaves, **{k: v for k, v in data.items() if k not in ("chosen_logps", "rejected_logps")}, **kwargs
    )
    g = torch.autograd.grad(out.loss * weight, leaves, allow_unused=True)
    return out, torch.stack([torch.zeros_like(x) if gx is None else gx for x, gx in zip(leaves, g, strict=True)])


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def rows(data):
    """One tuple of Python floats per pair."""
    keys = [
        "chosen_logps",
        "rejected_logps",
        "ref_chosen_logps",
        "ref_rejected_logps",
        "chosen_lengths",
        "rejected_lengths",
    ]
    return list(zip(*(data[key].tolist() for key in keys if key in data), strict=True))

"""Losses of extreme margins, divergences, empty completions and certain tokens are finite, and are the formula's limits."""

import math

import pytest
import torch
from loss_tools import F_LOSSES, LOSS_NAMES, REFERENCE_FREE, batch, grads, options, sigmoid

# The losses at log-ratios (-M, M) and (M, -M) of chosen and rejected, with beta 0.1, lengths 10 and a reference of -2M.
EXTREMES = {
    "sigmoid": lambda M: (0.2 * M, 0),
    "sigmoid_norm": lambda M: (0.02 * M, 0),
    "hinge": lambda M: (1 + 0.2 * M, 0),
    "ipo": lambda M: ((0.2 * M + 5) ** 2, (0.2 * M - 5) ** 2),
    "exo_pair": lambda M: (-math.log(0.01), -math.log(0.99)),
    "nca_pair": lambda M: (0.15 * M, 0.05 * M),
    "robust": lambda M: (0.9 * 0.2 * M / 0.8, -0.1 * 0.2 * M / 0.8),
    "bco_pair": lambda M: (0.2 * M, 0),
    "sppo_hard": lambda M: (2 * (M + 5) ** 2, 2 * (M - 5) ** 2),
    "aot": lambda M: (0.2 * M, 0),
    "aot_unpaired": lambda M: (0.2 * M, 0),
    "apo_zero": lambda M: (2, 0),
    "apo_down": lambda M: (1, 1),
    "discopop": lambda M: (0.2 * M, 0),
    "sft": lambda M: (0.3 * M, 0.1 * M),
    "simpo": lambda M: (0.02 * M + 0.5, 0),
    "orpo": lambda M: (0.3 * M + 0.02 * M, 0.1 * M),
}


@pytest.mark.parametrize("name", LOSS_NAMES)
@pytest.mark.parametrize(("dtype", "M"), [(torch.float32, 1e4), (torch.bfloat16, 8192.0), (torch.float16, 8192.0)])
def test_extreme_margins(name, dtype, M):
    smoothed = {"exo_pair": 0.01, "robust": 0.1}.get(name, 0.0)
    for side, want in zip((-1, 1), EXTREMES[name](M), strict=True):
        data = {
            "chosen_logps": torch.tensor([-2 * M + side * M], dtype=dtype),
            "rejected_logps": torch.tensor([-2 * M - side * M], dtype=dtype),
            "chosen_lengths": torch.tensor([10]),
            "rejected_lengths": torch.tensor([10]),
        }
        if name not in REFERENCE_FREE:
            data |= {"ref_chosen_logps": torch.tensor([-2 * M], dtype=dtype)}
            data |= {"ref_rejected_logps": torch.tensor([-2 * M], dtype=dtype)}
        out, grad = grads(data, loss_type=name, label_smoothing=smoothed)
        assert out.losses.dtype == torch.float32
        torch.testing.assert_close(out.losses.item(), float(want), rtol=1e-6, atol=1e-30)
        assert grad.isfinite().all()


@pytest.mark.parametrize("name", F_LOSSES)
@pytest.mark.parametrize("f", ["forward_kl", "js_divergence", "alpha_divergence"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_divergences_never_give_nan(name, f, dtype):
    ratio = torch.tensor([-1e4, -200.0, -60.0, 0.0, 60.0, 1e4], dtype=dtype)
    chosen, rejected = (r.flatten() for r in torch.meshgrid(ratio, ratio, indexing="ij"))
    n = torch.full((36,), 5)
    data = {"chosen_logps": chosen, "rejected_logps": rejected, "chosen_lengths": n, "rejected_lengths": n}
    out, grad = grads(data, **options(name), f_divergence_type=f)
    assert not out.losses.isnan().any()
    assert not grad.isnan().any()
    # The square of exp(60) lies outside float32.
    if name != "ipo" or dtype == torch.float64:
        assert out.losses.isfinite().all()
        assert grad.isfinite().all()


@pytest.mark.parametrize("tau", [1e-3, 0.05, 1.0, 3.0])
def test_discopop_is_finite(tau):
    margin = torch.tensor([-1e5, -1e3, -30.0, 0.0, 30.0, 1e3, 1e5])
    zero = torch.zeros(7)
    out, grad = grads({"chosen_logps": margin, "rejected_logps": zero}, loss_type="discopop", discopop_tau=tau)
    assert out.losses.isfinite().all()
    assert grad.isfinite().all()
    m = sigmoid(-3.0 / tau) if tau > 0.01 else 0.0
    torch.testing.assert_close(out.losses[2].item(), (1 - m) * math.log1p(math.exp(3)) + m * math.exp(3))


@pytest.mark.parametrize("name", LOSS_NAMES)
def test_empty_completions(name):
    """A completion without a token has log-prob 0 and length 0; nothing becomes infinite."""
    data = batch(name, pairs=3, dtype=torch.float32)
    data["chosen_lengths"][0] = data["rejected_lengths"][0] = data["rejected_lengths"][1] = 0
    data["chosen_logps"][0] = data["rejected_logps"][0] = data["rejected_logps"][1] = 0.0
    out, grad = grads(data, **options(name))
    assert out.losses.isfinite().all()
    assert grad.isfinite().all()
    assert out.chosen_rewards.isfinite().all()
    alone, grad = grads({k: v[:1] for k, v in data.items()}, **options(name))
    assert alone.losses.isfinite().all()
    assert grad.isfinite().all()


def test_certain_tokens_in_orpo():
    near = torch.tensor([0.0, -1e-8, -1e-3, -1e4])
    n = torch.ones(4, dtype=torch.int64)
    for rejected in (near, near.flip(0)):
        data = {"chosen_logps": near, "rejected_logps": rejected, "chosen_lengths": n, "rejected_lengths": n}
        out, grad = grads(data, loss_type="orpo")
        assert out.losses.isfinite().all()
        assert grad.isfinite().all()

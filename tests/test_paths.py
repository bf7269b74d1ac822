"""Sums of token log-probs per sequence, with LD-DPO's weights, and WPO's weights per pair."""

import math

import pytest
import torch

from dpo_fast.forest.paths import sum_logps, wpo_weights


def test_sum_logps():
    tokens = torch.tensor([[-1.0, -2.0, -4.0], [-8.0, 0.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    n, partner = torch.tensor([3, 1, 0]), torch.tensor([1, 3, 2])
    assert sum_logps(tokens, n).tolist() == [-7.0, -8.0, 0.0]
    assert sum_logps(tokens, n, average=True).tolist() == [-7.0 / 3, -8.0, 0.0]
    assert sum_logps(tokens, n, partner_lengths=partner, ld_alpha=0.5).tolist() == [-4.0, -8.0, 0.0]
    assert sum_logps(tokens, n, partner_lengths=partner, ld_alpha=0.0).tolist() == [-1.0, -8.0, 0.0]
    assert sum_logps(tokens, n, partner_lengths=partner, ld_alpha=1.0).tolist() == [-7.0, -8.0, 0.0]
    got = sum_logps(tokens, n, partner_lengths=partner, ld_alpha=0.5, average=True)
    assert got.tolist() == [-4.0 / 3, -8.0, 0.0]
    leaf = tokens.clone().requires_grad_()
    weights = torch.tensor([1.0, 10.0, 100.0])
    (sum_logps(leaf, n, partner_lengths=partner, ld_alpha=0.25) * weights).sum().backward()
    assert leaf.grad[0].tolist() == [1.0, 0.25, 0.25]
    assert leaf.grad[1, 0].item() == 10.0


def test_sum_logps_adds_in_float32():
    tokens = torch.full((1, 1024), -1.0, dtype=torch.bfloat16)
    got = sum_logps(tokens, torch.tensor([1024]))
    assert got.dtype == torch.float32
    assert got.item() == -1024.0
    assert sum_logps(torch.zeros(2, 0), torch.zeros(2, dtype=torch.int64), average=True).tolist() == [0.0, 0.0]


def test_wpo_weights():
    tokens = torch.tensor([[-1.0, -3.0], [-2.0, 7.0], [-0.5, 7.0], [7.0, 7.0]], dtype=torch.float64, requires_grad=True)
    norms = torch.tensor([[-0.5, -0.5], [-1.5, 9.0], [-0.25, 9.0], [9.0, 9.0]], dtype=torch.float64)
    got = wpo_weights(tokens, norms, torch.tensor([2, 1, 1, 0]))
    assert not got.requires_grad
    want = [math.exp(-1.5) * math.exp(-0.25), math.exp(-0.5)]
    torch.testing.assert_close(got.tolist(), want, rtol=1e-14, atol=0)


def test_refused_ld_alpha_of_sums():
    tokens, n = torch.zeros(2, 3), torch.tensor([3, 2])
    with pytest.raises(ValueError, match=r"^partner_lengths is None"):
        sum_logps(tokens, n, ld_alpha=0.5)
    with pytest.raises(ValueError, match=r"^ld_alpha is 2"):
        sum_logps(tokens, n, partner_lengths=n, ld_alpha=2)

"""Gradients of the losses against finite differences, and what must not change them: sides, order, the cut of a batch."""

import math
import re

import pytest
import torch
from loss_tools import F_LOSSES, LOSS_NAMES, MARGIN, OVER_BATCH, batch, grads, options, rows

from dpo_fast.loss_table import F_DIVERGENCES, LOSSES
from dpo_fast.losses import LossOptions, preference_loss

WITH_DIVERGENCES = [(name, "reverse_kl") for name in LOSS_NAMES]
WITH_DIVERGENCES += [(name, f) for name in F_LOSSES for f in F_DIVERGENCES if f != "reverse_kl"]


@pytest.mark.parametrize(("name", "f"), WITH_DIVERGENCES)
def test_gradcheck(name, f):
    data = batch(name, pairs=4, seed=3)
    rest = {k: v for k, v in data.items() if k not in ("chosen_logps", "rejected_logps")}

    def per_pair(chosen, rejected):
        return preference_loss(chosen, rejected, **rest, **options(name), f_divergence_type=f).losses

    leaves = [data[key].clone().requires_grad_() for key in ("chosen_logps", "rejected_logps")]
    assert torch.autograd.gradcheck(per_pair, leaves)


@pytest.mark.parametrize(("name", "f"), WITH_DIVERGENCES)
def test_margin_losses_have_opposite_derivatives(name, f):
    """dL/dchosen_logps + dL/drejected_logps is 0 for every pair where the table says so, and nowhere else."""
    assert LossOptions(name, f_divergence_type=f).margin_only == (name in MARGIN and f == "reverse_kl")
    weights = None if LOSSES[name].over_batch or LOSSES[name].token_mean else torch.rand(6, dtype=torch.float64) + 0.5
    for seed in range(5):
        data = batch(name, seed=seed)
        grad = grads(data, **options(name), f_divergence_type=f, pair_weights=weights)[1]
        largest = grad.abs().amax()
        assert largest > 0
        if LossOptions(name, f_divergence_type=f).margin_only:
            assert grad.sum(0).abs().amax() <= 1e-12 * largest
        else:
            assert grad.sum(0).abs().amax() > 1e-2 * largest


def test_several_losses_are_a_margin_loss_where_each_is():
    assert LossOptions(["sigmoid", "hinge"]).margin_only
    assert not LossOptions(["sigmoid", "sft"]).margin_only
    assert not LossOptions("sigmoid", f_divergence_type="js_divergence").margin_only
    with pytest.raises(ValueError, match="loss_type is 'sigmod'"):
        _ = LossOptions("sigmod").margin_only


def test_only_the_loss_carries_a_gradient():
    data = {k: v.requires_grad_() if "logps" in k else v for k, v in batch("sigmoid").items()}
    out = preference_loss(**data)
    assert out.loss.requires_grad
    assert out.losses.requires_grad
    for key in ("chosen_rewards", "rejected_rewards"):
        assert not getattr(out, key).requires_grad, key


# L(margin) - L(-margin) as a function of the margin (x = beta * delta; for ipo the difference of the averages)
ANTISYMMETRIC = {
    "sigmoid": lambda x: -0.8 * x,  # e = 0.1
    "robust": lambda x: -x / 0.8,
    "hinge": lambda x: max(0, 1 - x) - max(0, 1 + x),
    "exo_pair": lambda x: math.log(0.01 / 0.99) * math.tanh(x / 2),
    "sigmoid_norm": lambda x: -x,
    "ipo": lambda x: -2 * (x / 0.2) / 0.2,
}


@pytest.mark.parametrize("name", ANTISYMMETRIC)
def test_swapping_the_sides_negates_the_margin(name):
    data = batch(name)
    sides = {"chosen": "rejected", "rejected": "chosen"}
    swapped = {k: data[re.sub("chosen|rejected", lambda m: sides[m[0]], k)] for k in data}
    one, two = (preference_loss(**d, beta=0.2, **options(name)) for d in (data, swapped))
    assert torch.equal(one.chosen_rewards, two.rejected_rewards)
    assert torch.equal(one.rejected_rewards, two.chosen_rewards)
    normed = name in ("ipo", "sigmoid_norm")
    x = [
        0.2 * ((w - rw) / (nw if normed else 1) - (v - rl) / (nl if normed else 1))
        for w, v, rw, rl, nw, nl in rows(data)
    ]
    want = [ANTISYMMETRIC[name](v) for v in x]
    torch.testing.assert_close((one.losses - two.losses).tolist(), want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", LOSS_NAMES)
def test_order_of_pairs_does_not_matter(name):
    data, order = batch(name), torch.tensor([4, 2, 0, 5, 1, 3])
    one, grad = grads(data, **options(name))
    two, permuted = grads({k: v[order] for k, v in data.items()}, **options(name))
    torch.testing.assert_close(two.loss, one.loss)
    torch.testing.assert_close(permuted, grad[:, order])
    want = one.losses if name in OVER_BATCH else one.losses[order]
    torch.testing.assert_close(two.losses, want)


def split_grad(name, sizes, **kwargs):
    data, parts, start = batch(name), [], 0
    for size in sizes:
        part = {k: v[start : start + size] for k, v in data.items()}
        parts.append(grads(part, weight=size / 6, **options(name), **kwargs)[1])
        start += size
    return torch.cat(parts, 1)


@pytest.mark.parametrize("name", LOSS_NAMES)
def test_splitting_a_batch(name):
    """The parts' gradients are the whole's, but for the losses whose row says that they are not."""
    data = batch(name)
    whole = grads(data, **options(name))[1]
    mean = data["chosen_lengths"].double().mean()
    for given in (mean, mean.item()):
        parts = split_grad(name, (1, 3, 2), mean_chosen_length=given)
        assert torch.allclose(parts, whole, rtol=1e-12, atol=1e-15) != LOSSES[name].over_batch
    if LOSSES[name].token_mean:
        assert not torch.allclose(split_grad(name, (1, 3, 2)), whole, rtol=1e-3)


def test_one_graph_without_a_host_read():
    """torch.compile captures the whole function: nothing in it reads a tensor's value."""
    data = batch("sigmoid")
    loss_types = ["sigmoid", "ipo", "discopop", "sft"]
    compiled = torch.compile(
        lambda: preference_loss(**data, loss_type=loss_types).losses, fullgraph=True, backend="eager"
    )
    torch.testing.assert_close(compiled(), preference_loss(**data, loss_type=loss_types).losses)

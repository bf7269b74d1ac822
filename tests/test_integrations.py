"""Losses in other people's shapes against theirs: modules, Cut Cross Entropy's and torchtune's signatures, patches and undo."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from dpo_fast import dpo_loss
from dpo_fast.integrations import peer
from dpo_fast.integrations.cross_entropy import linear_cross_entropy
from dpo_fast.integrations.torch import DPOLoss, LinearDPOLoss
from dpo_fast.integrations.torchtune import DPOLoss as TuneLoss
from dpo_fast.integrations.torchtune import get_batch_log_probs

D, V = 8, 23


def batch(seed=0, pairs=3, length=7, dtype=torch.float64):
    rng = torch.Generator().manual_seed(seed)
    hidden = torch.randn(2 * pairs, length, D, generator=rng, dtype=dtype)
    weight = torch.randn(V, D, generator=rng, dtype=dtype)
    targets = torch.randint(V, (2 * pairs, length), generator=rng)
    targets[torch.rand(targets.shape, generator=rng) < 0.4] = -100
    targets[1] = -100
    ref = torch.randn(2 * pairs, generator=rng, dtype=dtype)
    return hidden.requires_grad_(), weight.requires_grad_(), targets, ref


# ---- torch ----


@pytest.mark.parametrize("options", [{"beta": 0.3}, {"loss_type": "hinge"}, {"loss_type": "ipo", "beta": 0.5}])
def test_modules(options):
    hidden, weight, targets, ref = batch()
    theirs = dpo_loss(hidden @ weight.t(), targets, ref, **options)
    want = torch.autograd.grad(theirs.loss, (hidden, weight))
    for out in (
        DPOLoss(**options)(hidden @ weight.t(), targets, ref),
        LinearDPOLoss(**options)(hidden, weight, targets, ref),
    ):
        torch.testing.assert_close(out.loss, theirs.loss, rtol=1e-10, atol=0)
        for a, b in zip(torch.autograd.grad(out.loss, (hidden, weight)), want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_modules_refuse_at_construction():
    with pytest.raises(ValueError, match=r"beta is -1"):
        DPOLoss(beta=-1)
    with pytest.raises(ValueError, match=r"label_smoothing is 0\.1 but has no effect"):
        LinearDPOLoss(loss_type="hinge", label_smoothing=0.1)
    assert repr(DPOLoss(beta=0.2)) == "DPOLoss(beta=0.2)"


# ---- Cut Cross Entropy's signature ----


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shift", [0, True, 2])
def test_linear_cross_entropy(softcap, reduction, shift):
    e, c, targets, _ = batch(1)
    found = linear_cross_entropy(e, c, targets, softcap=softcap, reduction=reduction, shift=shift)
    logits = e @ c.t()
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    n = int(shift)
    logits, labels = logits[:, : logits.shape[1] - n], targets[:, n:]
    want = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction=reduction)
    want = want.view(labels.shape) if reduction == "none" else want
    torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-12)
    grad = torch.randn(found.shape, dtype=found.dtype)
    for a, b in zip(torch.autograd.grad(found, (e, c), grad), torch.autograd.grad(want, (e, c), grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_linear_cross_entropy_refuses():
    e, c, targets, _ = batch(1)
    with pytest.raises(ValueError, match="reduction is 'avg'"):
        linear_cross_entropy(e, c, targets, reduction="avg")
    with pytest.raises(ValueError, match="filter_eps is 'low'"):
        linear_cross_entropy(e, c, targets, filter_eps="low")
    with pytest.raises(ValueError, match="targets must be"):
        linear_cross_entropy(e, c, targets[:, 1:])


# ---- torchtune ----


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_torchtune_loss(smoothing):
    """The four tensors of 0.6 and the two outputs of the main branch, against the formula of its docstring."""
    four = torch.randn(4, 5, dtype=torch.float64)
    chosen, rejected, ref_chosen, ref_rejected = four
    delta = 0.1 * ((chosen - rejected) - (ref_chosen - ref_rejected))
    want = -F.logsigmoid(delta) * (1 - smoothing) - F.logsigmoid(-delta) * smoothing
    loss = TuneLoss(beta=0.1, label_smoothing=smoothing)
    losses, chosen_rewards, rejected_rewards = loss(*four)
    torch.testing.assert_close(losses, want)
    torch.testing.assert_close(chosen_rewards, 0.1 * (chosen - ref_chosen))
    torch.testing.assert_close(rejected_rewards, 0.1 * (rejected - ref_rejected))
    policy, reference = (
        SimpleNamespace(chosen_logps=a, rejected_logps=b) for a, b in ((chosen, rejected), (ref_chosen, ref_rejected))
    )
    torch.testing.assert_close(loss(policy, reference)[0], want)
    assert not loss.is_reference_free  # The main branch's recipes ask before they run the reference.
    for number in (2, 3):
        with pytest.raises(ValueError, match=f"got {number} arguments"):
            loss(*four[:number])


def test_torchtune_refuses_at_construction():
    with pytest.raises(ValueError, match="loss_type 'ipo' needs the completions' lengths"):
        TuneLoss(loss_type=["sigmoid", "ipo"])
    assert TuneLoss(loss_type=["sigmoid", "hinge"])(*torch.randn(4, 5))[0].shape == (5,)


@pytest.mark.parametrize("average", [False, True])
def test_torchtune_log_probs(average):
    hidden, weight, labels, _ = batch(2)
    logits = (hidden @ weight.t()).detach().requires_grad_()
    found = get_batch_log_probs(logits, labels, return_average_logprobs=average)
    targets = labels[:, 1:]
    tokens = logits[:, :-1].log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    scored = targets != -100
    want = (tokens * scored).sum(1) / (scored.sum(1).clamp(min=1) if average else 1)
    torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-12)
    grad = torch.randn_like(found)
    a, b = (torch.autograd.grad(x, logits, grad, retain_graph=True)[0] for x in (found, want))
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match="same shape"):
        get_batch_log_probs(logits, targets)


# ---- Patches ----


def test_patches_are_undone_as_one():
    owner = SimpleNamespace(__name__="peer", a=1, b=2)
    with peer.Patches() as patches:
        assert patches.replace(owner, "a", 10) == 1
        patches.replace(owner, "b", 20)
    assert (owner.a, owner.b) == (10, 20)
    patches.undo()
    patches.undo()
    assert (owner.a, owner.b) == (1, 2)


def test_an_undo_out_of_order_is_told_and_may_be_repeated():
    owner, active = SimpleNamespace(__name__="peer", a=1, b=2), {}

    def patch():
        with peer.Patches() as patches:
            patches.replace(owner, "a", 10)
            patches.replace(owner, "b", 20)
        return patches.undo

    undo = peer.once(active, "x", patch)
    owner.a = 100
    with pytest.raises(RuntimeError, match=r"peer\.a was replaced again after this patch: undo that first, then this"):
        undo()
    assert (owner.a, owner.b) == (100, 20)
    owner.a = 10
    undo()
    undo()
    assert (owner.a, owner.b) == (1, 2)


def test_a_patch_that_fails_leaves_nothing_behind():
    owner = SimpleNamespace(__name__="peer", a=1)

    def patch():
        with peer.Patches() as patches:
            patches.replace(owner, "a", math.nan)
            patches.replace(owner, "c", 3)

    with pytest.raises(ImportError, match="peer has no c"):
        patch()
    assert owner.a == 1


def test_patching_twice_is_patching_once():
    active, calls = {}, []

    def patch():
        calls.append("patched")
        return lambda: calls.append("undone")

    first, second = peer.once(active, "x", patch), peer.once(active, "x", patch)
    first()
    second()
    assert calls == ["patched", "undone"]
    peer.once(active, "x", patch)()
    assert calls == ["patched", "undone"] * 2


def test_versions():
    with pytest.raises(ImportError, match=r"no-such-peer is not installed: pip install 'no-such-peer>=1'"):
        peer.check_version("no-such-peer", ">=1")
    untested = (
        r"torch .* is installed and dpo_fast was tested with torch==0\.4 or <1: pip install 'torch<1', .*any_version"
    )
    with pytest.raises(ImportError, match=untested):
        peer.check_version("torch", "==0.4", "<1")
    assert peer.check_version("torch", "<1", ">=2") == peer.check_version("torch", ">=2")
    assert peer.check_version("torch", "<1", any_version=True) == peer.check_version("torch", ">=2")

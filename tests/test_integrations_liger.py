"""Liger's preference losses and ours in the same calls: losses, every number beside them, and all gradients."""

import pytest
import torch

liger = pytest.importorskip("liger_kernel.chunked_loss", reason="pip install liger-kernel==0.8.5")
from liger_kernel.chunked_loss import functional  # noqa: E402

from dpo_fast.integrations import liger as ours  # noqa: E402

B, T, D, V = 3, 9, 8, 31
DPO_TYPES = sorted(ours.LigerFusedLinearDPOLoss._SUPPORTED_LOSS_TYPES)


def inputs(dtype=torch.float32, bias=True, seed=0):
    """As keyword arguments of a call, leaves with a gradient; a prompt of ignored tokens in every row."""
    rng = torch.Generator().manual_seed(seed)

    def leaf(*shape, scale=1.0):
        return (torch.randn(*shape, generator=rng) * scale).to(dtype).requires_grad_()

    target = torch.randint(V, (2 * B, T), generator=rng)
    for row in range(2 * B):
        target[row, : 1 + row % 4] = -100
    target[2, -2:] = -100
    call = {"_input": leaf(2 * B, T, D), "lin_weight": leaf(V, D), "target": target}
    call["bias"] = leaf(V) if bias else None
    reference = {"ref_input": leaf(2 * B, T, D).detach(), "ref_weight": leaf(V, D).detach()}
    reference["ref_bias"] = leaf(V).detach() if bias else None
    return call, reference


def run(loss, call, grad=1.7):
    leaves = [x for x in (call["_input"], call["lin_weight"], call["bias"]) if x is not None]
    value, numbers = loss(**call)
    return value.detach(), numbers, torch.autograd.grad(value * grad, leaves)


def compare(mine, theirs, call, rtol=1e-4):
    value, numbers, gradients = run(mine, call)
    their_value, their_numbers, their_gradients = run(theirs, call)
    assert len(numbers) == len(their_numbers)
    torch.testing.assert_close(value, their_value.reshape(()), rtol=rtol, atol=1e-6)
    for k, (a, b) in enumerate(zip(numbers, their_numbers, strict=True)):
        assert not a.requires_grad, k
        torch.testing.assert_close(a, b.detach().reshape(a.shape), rtol=rtol, atol=2e-5, msg=lambda m, k=k: f"{k}: {m}")
    for a, b in zip(gradients, their_gradients, strict=True):
        size = b.abs().max().item()
        torch.testing.assert_close(a, b, rtol=0, atol=rtol * size)


def smoothing(name):
    return {"exo_pair": 0.1, "robust": 0.2}.get(name, 0.0)


@pytest.mark.parametrize("loss_type", DPO_TYPES)
@pytest.mark.parametrize(
    "options",
    [{}, {"average_log_prob": True}, {"compute_nll_loss": True, "alpha": 0.7}, {"use_ref_model": False, "beta": 0.5}],
)
@pytest.mark.parametrize("bias", [True, False])
def test_dpo(loss_type, options, bias):
    call, reference = inputs(bias=bias)
    if options.get("use_ref_model", True):
        call |= reference
    options = {"loss_type": loss_type, "label_smoothing": smoothing(loss_type), **options}
    compare(ours.LigerFusedLinearDPOLoss(**options), liger.LigerFusedLinearDPOLoss(compiled=False, **options), call)


@pytest.mark.parametrize("name", ["CPO", "SimPO", "ORPO"])
@pytest.mark.parametrize("options", [{}, {"compute_nll_loss": False, "beta": 0.4}])
def test_without_a_reference(name, options):
    call, _ = inputs(seed=1)
    name = f"LigerFusedLinear{name}Loss"
    compare(getattr(ours, name)(**options), getattr(liger, name)(compiled=False, **options), call)


def test_label_smoothing_and_options_of_cpo_and_simpo():
    call, _ = inputs(seed=2)
    for name, options in (
        ("CPO", {"label_smoothing": 0.2, "average_log_prob": True, "alpha": 0.3}),
        ("SimPO", {"label_smoothing": 0.1, "gamma": 0.9, "alpha": 2.0}),
    ):
        name = f"LigerFusedLinear{name}Loss"
        compare(getattr(ours, name)(**options), getattr(liger, name)(compiled=False, **options), call)


def test_orpo_scores_another_target():
    call, _ = inputs(seed=3)
    call["nll_target"] = torch.randint(V, (2 * B, T))
    compare(ours.LigerFusedLinearORPOLoss(), liger.LigerFusedLinearORPOLoss(compiled=False), call)


@pytest.mark.parametrize("name", ["dpo", "cpo", "simpo", "orpo"])
def test_functional_forms_take_liger_s_order(name):
    call, reference = inputs(seed=4)
    first = (call["_input"], call["lin_weight"], call["target"], call["bias"])
    rest = {
        "dpo": (*reference.values(), -100, 0.3, True, False, True, True, 1, "hinge", 0.0, 0.05, 0.6),
        "cpo": (-100, 0.3, 0.6, 0.1, True, False, True, 1),
        "simpo": (-100, 0.3, 0.6, 0.1, True, False, 0.2, 1),
        "orpo": (-100, 0.3, True, None, False, 1),
    }[name]
    value, _ = getattr(ours, f"liger_fused_linear_{name}")(*first, *rest)
    theirs, _ = getattr(functional, f"liger_fused_linear_{name}")(*first, *rest)
    torch.testing.assert_close(value, theirs.reshape(()), rtol=1e-4, atol=1e-6)


def test_sigmoid_honours_label_smoothing():
    """The one stated difference: Liger leaves it out in silence."""
    call, reference = inputs()
    losses = [ours.LigerFusedLinearDPOLoss(label_smoothing=e)(**call, **reference)[0] for e in (0.0, 0.5)]
    assert (losses[0] - losses[1]).abs() > 1e-3


def test_refusals():
    with pytest.raises(ValueError, match="Unsupported loss_type: ipo"):
        ours.LigerFusedLinearDPOLoss(loss_type="ipo")
    with pytest.raises(ValueError, match=r"label_smoothing is 0\.0"):
        ours.LigerFusedLinearDPOLoss(loss_type="exo_pair")
    call, _ = inputs()
    with pytest.raises(ValueError, match="needs ref_input and ref_weight"):
        ours.LigerFusedLinearDPOLoss()(**call)
    call["target"] = call["target"][:-1]
    with pytest.raises(ValueError, match=r"_input must be \[2B, T, D\]"):
        ours.LigerFusedLinearCPOLoss()(**call)

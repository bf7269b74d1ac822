"""Loss and gradient in one pass: which tensors carry a gradient, how often, and what it costs in memory and products."""

import math

import pytest
import torch
from op_tools import (  # noqa: F401 - poison is a fixture
    LENGTHS,
    fields,
    options_of,
    pairs,
    poison,
    ref_for,
    small_tiles,
)
from torch.utils._python_dispatch import TorchDispatchMode

from dpo_fast import dpo_loss, linear_dpo_loss, reference
from dpo_fast.loss_table import FUSED
from dpo_fast.ops import head as head_ops
from dpo_fast.ops import logits as logits_ops
from dpo_fast.ops.torch_library import pack_numbers

pytestmark = pytest.mark.usefixtures("poison")
V, D = 37, 5
NAMES = ("hidden", "weight", "bias")


def test_the_losses_of_the_one_launch_are_the_issue_s():
    expected = (
        "sigmoid sigmoid_norm hinge ipo exo_pair nca_pair robust bco_pair sppo_hard apo_zero apo_down discopop simpo"
    )
    assert list(FUSED) == expected.split()


def test_a_target_without_probability(backend):
    logits, targets, cu = pairs(LENGTHS, V, packed=True, dtype=torch.float32)
    logits[2, targets[2]] = -math.inf
    x = logits.requires_grad_()
    out = dpo_loss(x, targets, ref_for("sigmoid", 8), cu_seqlens=cu, backend=backend)
    (g,) = torch.autograd.grad(out.loss, x)
    assert out.chosen_logps[0] == -math.inf
    assert g.isfinite().all()


# ---- Which tensors carry a gradient ----


def fused(op, inputs):
    """An op of the one pass on logits, or on hidden states with a frozen or a trained head."""
    if op == "dpo_loss":
        return dpo_loss(inputs["logits"], inputs["targets"])
    weight = inputs["weight"] if op == "trained" else inputs["weight"].detach()
    return linear_dpo_loss(inputs["hidden"], weight, inputs["targets"])


def fused_inputs():
    logits, targets, _ = pairs(LENGTHS, V, dtype=torch.float32)
    hidden = torch.randn(*targets.shape, D, generator=torch.Generator().manual_seed(1))
    leaves = {"logits": logits, "hidden": hidden, "weight": torch.randn(V, D)}
    return {name: x.requires_grad_() for name, x in leaves.items()} | {"targets": targets}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("op", ["dpo_loss", "frozen", "trained"])
def test_a_gradient_that_the_one_pass_does_not_have_is_an_error(op, compiled):
    torch._dynamo.reset()
    function = torch.compile(fused, backend="aot_eager", fullgraph=True) if compiled else fused
    function(op, fused_inputs()).loss.backward()
    for name in ("losses", "chosen_logps", "rejected_logps"):
        out = function(op, fused_inputs())
        assert not out.chosen_rewards.requires_grad
        assert not out.rejected_rewards.requires_grad
        with pytest.raises(RuntimeError, match=r"only `loss` .* carries a gradient.*sft_weight.*linear_sequence_logps"):
            (out.loss - 0.1 * getattr(out, name).mean()).backward()


def test_by_way_of_autograd_all_but_the_rewards_carry_a_gradient():
    x, targets, _ = pairs(LENGTHS, V, dtype=torch.float16)
    out = dpo_loss(x.requires_grad_(), targets)
    assert [name for name in out.__dataclass_fields__ if not getattr(out, name).requires_grad] == [
        "chosen_rewards",
        "rejected_rewards",
    ]
    (ours,) = torch.autograd.grad(out.loss - 0.1 * out.chosen_logps.mean(), x)
    wide = x.detach().double().requires_grad_()
    expected = reference.dpo_loss(wide, targets)
    (theirs,) = torch.autograd.grad(expected["loss"] - 0.1 * expected["chosen_logps"].mean(), wide)
    torch.testing.assert_close(ours.double(), theirs, rtol=2e-3, atol=1e-5)


def test_gradients_add_up_over_two_losses():
    x, targets, _ = pairs(LENGTHS, V, dtype=torch.float32)
    x.requires_grad_()
    for factor in (1.0, 0.5):
        (dpo_loss(x, targets).loss * factor).backward()
    (expected,) = torch.autograd.grad(dpo_loss(x, targets).loss, x)
    torch.testing.assert_close(x.grad, 1.5 * expected)


def head_batch(lengths=LENGTHS, v=V, *, packed=False, dtype=torch.float64, bias=True, seed=0):
    hidden, targets, cu = pairs(lengths, v, packed=packed, dtype=dtype, width=D, seed=seed, scale=1.0)
    rng = torch.Generator().manual_seed(seed + 1)
    leaves = {"hidden": hidden, "weight": torch.randn(v, D, generator=rng, dtype=torch.float64).to(dtype)}
    if bias:
        leaves["bias"] = torch.randn(v, generator=rng, dtype=torch.float64).to(dtype)
    return leaves, targets, cu


def run_head(function, leaves, targets, ref, cu, needs=NAMES, loss_grad=1.0, **options):
    leaves = {k: x.detach().requires_grad_(k in needs) for k, x in leaves.items()}
    dtype = torch.promote_types(leaves["hidden"].dtype, torch.float32)
    ref = None if ref is None else ref.to(dtype)
    wanted = {k: x for k, x in leaves.items() if k in needs}
    out = function(leaves["hidden"], leaves["weight"], targets, ref, bias=leaves.get("bias"), cu_seqlens=cu, **options)
    assert out.loss.requires_grad == bool(wanted)
    return fields(out, loss_grad, **wanted)


@pytest.mark.parametrize("needs", [(), ("hidden",), NAMES])
def test_head_autocast(needs):
    leaves, targets, _ = head_batch(dtype=torch.float32, bias=False)
    half = {k: x.bfloat16() for k, x in leaves.items()}
    plain = run_head(linear_dpo_loss, half, targets, None, None, needs=needs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = run_head(linear_dpo_loss, leaves, targets, None, None, needs=needs)
    assert all(torch.equal(cast[k], plain[k].float()) for k in plain)


def test_head_under_no_grad():
    leaves, targets, cu = head_batch(packed=True)
    expected = run_head(linear_dpo_loss, leaves, targets, None, cu)
    leaves = {k: x.requires_grad_() for k, x in leaves.items()}
    with torch.no_grad():
        out = linear_dpo_loss(leaves["hidden"], leaves["weight"], targets, bias=leaves["bias"], cu_seqlens=cu)
    torch.testing.assert_close(out.loss, expected["loss"])


# ---- Memory and products ----

# No transform and no ld_alpha; a loss's own numbers, and its weight.
PLAIN = pack_numbers(1.0, None, 1.0, None, 0.1, 0.0, 0.5, 0.05, 0.5, 0.0, 1.0)


class Allocated(TorchDispatchMode):
    """Entries of the largest tensor that an op returned in memory of its own."""

    def __init__(self):
        super().__init__()
        self.numel, self.gemms, self.wide = 0, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.gemms += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor) and x.numel():
                self.numel = max(self.numel, x.untyped_storage().nbytes() // x.element_size())
        return out


def test_a_shifted_slice_is_not_copied(monkeypatch):
    whole = torch.randn(4, 6, 64)
    targets = torch.randint(64, (4, 5))
    small_tiles(monkeypatch, 2 * 64 * 4)
    arguments = None, None, None, None, None, PLAIN, "sigmoid", "reverse_kl,tokens", -100, "torch", False
    with Allocated() as mode:
        rows, _ = logits_ops.flat_rows(whole[:, :-1], targets, -100)
        assert rows.data_ptr() == whole.data_ptr()
    with Allocated() as mode:
        logits_ops._dpo_loss.function(whole[:, :-1], targets, *arguments)
    assert mode.numel == whole.numel()
    copy = whole[:, :-1].contiguous()
    with Allocated() as mode:
        logits_ops.dpo_loss_.function(copy, targets, *arguments)
    assert mode.numel == copy.numel()


def few_rows(monkeypatch, rows, v=V, itemsize=8):
    small_tiles(monkeypatch, rows * v * itemsize)


def head_arguments(leaves, targets, cu, needs, workspace_bytes, name="sigmoid"):
    loss = PLAIN, name, "reverse_kl,tokens", -100
    tensors = leaves["hidden"], leaves["weight"], targets, leaves.get("bias"), cu, None, None, None, None
    return *tensors, *loss, "", needs, workspace_bytes, "torch", False


@pytest.mark.parametrize(
    ("needs", "kept", "gemms"),
    [
        ([True, False, False], 0, 2),
        ([True, True, False], 1000, 3),
        ([False, True, False], 1000, 2),
        ([True, True, False], 0, 4),
    ],
)
def test_head_matrix_products(needs, kept, gemms):
    """One chunk: frozen two products, trained three, four where nothing is kept."""
    leaves, targets, cu = head_batch([(0, 4)] * 2, packed=True, bias=False)
    with Allocated() as mode:
        head_ops._linear_dpo_loss.function(*head_arguments(leaves, targets, cu, needs, kept * V * 8))
    assert mode.gemms == gemms


@pytest.mark.parametrize("pairs_kept", [1, 2, 3])
def test_head_groups_of_whole_pairs_take_three_products_each(pairs_kept):
    leaves, targets, cu = head_batch([(0, 4)] * 12, packed=True, bias=False)
    with Allocated() as mode:
        head_ops._linear_dpo_loss.function(
            *head_arguments(leaves, targets, cu, [True, True, False], pairs_kept * 8 * V * 8)
        )
    assert mode.gemms == 3 * 6 // pairs_kept


def test_head_holds_a_tile_and_the_workspace(monkeypatch):
    lengths, v, rows = [(0, 8)] * 16, 256, 8
    few_rows(monkeypatch, rows, v)
    leaves, targets, cu = head_batch(lengths, v, packed=True)
    for needs, kept in (([True, False, False], 0), ([True] * 3, 16), ([True] * 3, 40), ([True] * 3, 3)):
        with Allocated() as mode:
            head_ops._linear_dpo_loss.function(*head_arguments(leaves, targets, cu, needs, kept * v * 8))
        assert mode.numel == max(rows, kept // 16 * 16 or kept) * v

"""`dpo_loss` and `linear_dpo_loss` against whole logits in float64: every loss, both layouts, extremes, memory."""

import itertools
import math

import pytest
import torch
from op_tools import (  # noqa: F401 - poison is autouse
    FLOORS,
    HALF,
    assert_within_rule,
    double,
    fields,
    pairs,
    poison,
    small_tiles,
    truth,
)
from torch.utils._python_dispatch import TorchDispatchMode

from dpo_fast import dpo_loss, linear_dpo_loss
from dpo_fast.backends import resolve
from dpo_fast.loss_table import FUSED, LOSSES
from dpo_fast.losses import LossOptions
from dpo_fast.ops import head as head_ops
from dpo_fast.ops import logits as logits_ops
from dpo_fast.ops.torch_library import pack_numbers

pytestmark = pytest.mark.usefixtures("poison")

# (prompt, completion) of four pairs: ragged, one token, no prompt.
LENGTHS = [(2, 3), (0, 1), (1, 4), (3, 2), (2, 2), (0, 5), (1, 1), (3, 3)]
V = 37
OPTIONS = {
    "exo_pair": {"label_smoothing": 0.1},
    "robust": {"label_smoothing": 0.2},
    "aot": {"label_smoothing": 0.1},
    "discopop": {"discopop_tau": 0.2},
    "simpo": {"label_smoothing": 0.1, "simpo_gamma": 0.3, "beta": 1.5},
}
MIXED = {
    "smoothed": {"label_smoothing": 0.2},
    "two": {"loss_type": ["sigmoid", "sft"], "loss_weights": [0.7, 0.4]},
    "three": {"loss_type": ["hinge", "ipo", "sft"], "beta": 0.3},
    "with aot": {"loss_type": ["sigmoid", "aot_unpaired"]},
    "weighted": {"pair_weights": torch.tensor([0.2, 1.5, 1.0, 3.0])},
    "twice": {"loss_weights": [2.0]},
    "forward_kl": {"f_divergence_type": "forward_kl", "loss_type": "hinge"},
    "alpha": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
    "js": {"f_divergence_type": "js_divergence", "loss_type": "discopop"},
}


def ref_for(loss_type, count, seed=5):
    if LossOptions(loss_type).reference_free:
        return None
    return -4 * torch.rand(count, generator=torch.Generator().manual_seed(seed))


def options_of(name):
    return {"loss_type": name, **OPTIONS.get(name, {})}


def check(logits, targets, ref, cu, *, loss_grad=1.0, floor=None, backend=None, **options):
    """Values and gradient by the rule; returns our results."""

    def run(function, x, **more):
        x = x.detach().requires_grad_()
        ref_x = None if ref is None else ref.to(torch.promote_types(x.dtype, torch.float32))
        own = {k: v.to(x.dtype) if k == "pair_weights" and x.dtype == torch.float64 else v for k, v in options.items()}
        return fields(function(x, targets, ref_x, cu_seqlens=cu, **own, **more), loss_grad, logits=x)

    ours = run(dpo_loss, logits, backend=backend)
    assert ours["dlogits"].dtype == logits.dtype
    assert all(x.dtype == torch.float32 for k, x in ours.items() if k != "dlogits" and logits.dtype != torch.float64)
    assert_within_rule(ours, run(truth, logits), run(truth, logits.double()), floor or FLOORS[logits.dtype])
    return ours


# ---- dpo_loss: values and gradient ----


def test_the_losses_of_the_one_launch_are_the_issue_s():
    expected = (
        "sigmoid sigmoid_norm hinge ipo exo_pair nca_pair robust bco_pair sppo_hard apo_zero apo_down discopop simpo"
    )
    assert list(FUSED) == expected.split()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss(name, packed, backend):
    logits, targets, cu = pairs(LENGTHS, V, packed=packed, dtype=torch.float32)
    check(logits, targets, ref_for(name, 8), cu, backend=backend, loss_grad=-1.7, **options_of(name))


@pytest.mark.parametrize("name", MIXED)
def test_mixtures_weights_and_divergences(name, backend):
    logits, targets, cu = pairs(LENGTHS, V, packed=True, dtype=torch.float32)
    check(logits, targets, ref_for("sigmoid", 8), cu, backend=backend, loss_grad=3.0, **MIXED[name])


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["sigmoid", "ipo", "aot", "simpo"])
def test_half_precision(name, packed, dtype, backend):
    logits, targets, cu = pairs(LENGTHS, 257, packed=packed, dtype=dtype)
    # A factor that is no power of two rounds a gradient that was rounded before.
    check(logits, targets, ref_for(name, 8), cu, backend=backend, loss_grad=2.0, **options_of(name))
    check(logits, targets, ref_for(name, 8), cu, backend=backend, loss_grad=2.5, floor=2**-8, **options_of(name))


@pytest.mark.parametrize("name", ["sigmoid", "aot", "orpo"])
def test_float64(name):
    logits, targets, cu = pairs(LENGTHS, V)
    check(logits, targets, ref_for(name, 8), cu, **options_of(name))


def test_without_a_reference(backend):
    logits, targets, _ = pairs(LENGTHS, V, dtype=torch.float32)
    check(logits, targets, None, None, backend=backend)


def test_a_loss_scale_reaches_float16_gradients(backend):
    """Unscaled, most of this gradient is below the smallest float16."""
    logits, targets, cu = pairs(LENGTHS, 4001, packed=True, dtype=torch.float16)
    ours = check(logits, targets, ref_for("sigmoid", 8), cu, backend=backend, loss_grad=65536.0)
    assert ours["dlogits"][2:4].ne(0).float().mean() > 0.9


def test_mean_chosen_length():
    logits, targets, _ = pairs(LENGTHS, V)
    for length in (2.5, torch.tensor(2.5, dtype=torch.float64)):
        check(logits, targets, None, None, loss_type="orpo", mean_chosen_length=length)


# ---- Ignored targets, sizes, extremes ----


@pytest.mark.parametrize("name", ["sigmoid", "ipo", "simpo", "sft"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("which", ["a sequence", "a pair", "all"])
def test_ignored_sequences(which, packed, name, backend):
    logits, targets, cu = pairs(LENGTHS, V, packed=packed, dtype=torch.float32)
    rows = targets.view(-1) if packed else targets
    bounds = cu if packed else torch.arange(9)
    for s in {"a sequence": [1], "a pair": [2, 6], "all": range(8)}[which]:
        rows[bounds[s] : bounds[s + 1]] = -100
    # What is not scored is not read either.
    logits[targets == -100] = math.nan
    out = check(logits.nan_to_num(7.0), targets, ref_for(name, 8), cu, backend=backend, **options_of(name))
    x = logits.clone().requires_grad_()
    read = fields(dpo_loss(x, targets, ref_for(name, 8), cu_seqlens=cu, backend=backend, **options_of(name)), logits=x)
    assert all(torch.equal(read[k], out[k]) for k in out)
    assert read["dlogits"][targets == -100].eq(0).all()


@pytest.mark.parametrize("packed", [False, True])
def test_other_ignore_index(packed, backend):
    logits, targets, cu = pairs(LENGTHS, V, packed=packed, dtype=torch.float32)
    x, y = (logits.clone().requires_grad_() for _ in range(2))
    ref = ref_for("sigmoid", 8)
    one = fields(dpo_loss(x, targets, ref, cu_seqlens=cu, backend=backend), logits=x)
    moved = targets.masked_fill(targets == -100, 5)
    # Target 5 occurs too: there it is ignored.
    targets = targets.masked_fill(targets == 5, -100)
    one = fields(dpo_loss(x, targets, ref, cu_seqlens=cu, backend=backend), logits=x)
    two = fields(dpo_loss(y, moved, ref, cu_seqlens=cu, backend=backend, ignore_index=5), logits=y)
    assert all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.parametrize("lengths", [[(0, 1)] * 2, [(0, 4), (1, 2)], [(0, 1), (4, 0)]])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("v", [1, 2, 130])
def test_one_pair(v, packed, lengths, backend):
    logits, targets, cu = pairs(lengths, v, packed=packed, dtype=torch.float32)
    check(logits, targets, torch.tensor([-1.0, -2.0]), cu, backend=backend)


def test_empty_sequences_of_a_packed_batch(backend):
    logits, targets, cu = pairs([(0, 0), (0, 3), (0, 2), (0, 0)], V, packed=True, dtype=torch.float32)
    check(logits, targets, ref_for("sigmoid", 4), cu, backend=backend)


def test_masked_words(backend):
    """-inf logits; one target is masked itself."""
    logits, targets, cu = pairs(LENGTHS, V, packed=True, dtype=torch.float32)
    targets[targets >= 0] = targets[targets >= 0].clamp(min=4)
    logits[:, :4] = -math.inf
    ours = check(logits, targets, ref_for("sigmoid", 8), cu, backend=backend)
    assert ours["dlogits"][:, :4].eq(0).all()
    logits[2, targets[2]] = -math.inf
    x = logits.requires_grad_()
    out = dpo_loss(x, targets, ref_for("sigmoid", 8), cu_seqlens=cu, backend=backend)
    (g,) = torch.autograd.grad(out.loss, x)
    assert out.chosen_logps[0] == -math.inf
    assert g.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peaked(dtype, backend):
    """Probabilities of 1 and of 1e-26."""
    logits, targets, cu = pairs(LENGTHS, V, packed=True, dtype=dtype)
    logits[torch.arange(len(logits)), targets.clamp(min=0)] += 60.0 * (torch.arange(len(logits)) % 3 - 1).to(dtype)
    check(logits, targets, ref_for("sigmoid", 8), cu, backend=backend)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("sign", [-1, 1])
def test_margins_of_ten_thousand(sign, name, backend):
    logits, targets, cu = pairs(LENGTHS, V, packed=True, dtype=torch.float32)
    ref = sign * 1e4 * torch.tensor([1.0] * 4 + [-1.0] * 4)
    ref = None if LossOptions(name).reference_free else ref
    if ref is None:
        logits[: cu[4]] *= 0
        logits[torch.arange(len(logits)), targets.clamp(min=0)] -= sign * 40.0
    x = check(logits, targets, ref, cu, backend=backend, **options_of(name))
    assert all(t.isfinite().all() for t in x.values())


# ---- Memory and bits ----


def strided(layout):
    """Logits that are no [S * T, V] as they lie, with targets and what a copy of them would be."""
    whole, targets, _ = pairs([(1, 4), (0, 5), (2, 3), (4, 1)], 41, dtype=torch.float32)
    view = {
        "shifted": whole[:, :-1],
        "words": whole[..., :33],
        "both": whole[:, 1:, :33],
        "transposed": whole.transpose(0, 1).contiguous().transpose(0, 1),
        "every second word": whole[..., ::2],
        "every second row": whole[:, ::2],
        "expanded": whole[:, :1].expand(-1, 5, -1),
        "one row": whole[:, 2:3],
    }[layout]
    targets = targets[:, : view.shape[1]].clamp(max=view.shape[-1] - 1)
    targets[:, -1] = 3
    return view, targets


LAYOUTS = ["shifted", "words", "both", "transposed", "every second word", "every second row", "expanded", "one row"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_of_any_stride(layout, backend):
    view, targets = strided(layout)
    assert not view.is_contiguous()
    ref = ref_for("sigmoid", 4)
    results = []
    for x in (view.detach(), view.detach().contiguous()):
        assert x.stride() == (view if x is not view else x).stride() or x.is_contiguous()
        x.requires_grad_()
        results.append(fields(dpo_loss(x, targets, ref, backend=backend), 1.5, logits=x))
    for name, x in results[0].items():
        torch.testing.assert_close(x, results[1][name], rtol=1e-6, atol=1e-7, msg=name)


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
        logits_ops.dpo_loss.function(whole[:, :-1], targets, *arguments)
    assert mode.numel == whole.numel()
    copy = whole[:, :-1].contiguous()
    with Allocated() as mode:
        logits_ops.dpo_loss_.function(copy, targets, *arguments)
    assert mode.numel == copy.numel()


@pytest.mark.parametrize("name", ["sigmoid", "aot", "sft"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_inplace(dtype, packed, name, backend):
    logits, targets, cu = pairs(LENGTHS, V, packed=packed, dtype=dtype)
    ref = ref_for(name, 8)
    results = []
    for inplace in (False, True):
        leaf = logits.clone().requires_grad_()
        x = leaf * 1.0
        out = dpo_loss(x, targets, ref, cu_seqlens=cu, backend=backend, inplace=inplace, **options_of(name))
        before = x.detach().clone()
        results.append(fields(out, 2.0, leaf=leaf))
        if inplace:
            assert torch.equal(x.detach(), results[-1]["dleaf"])
            torch.testing.assert_close(before * 2.0, results[-1]["dleaf"], rtol=0, atol=0)
        else:
            assert torch.equal(x.detach(), logits)
    for key, x in results[0].items():
        if dtype == torch.float32:
            assert torch.equal(x, results[1][key]), key
        else:
            # Without inplace it takes two launches, and the gradient is rounded once.
            torch.testing.assert_close(x, results[1][key], rtol=2e-3, atol=1e-6)


def test_inplace_takes_the_rows_of_a_wider_memory(backend):
    wide = torch.randn(12, 40)
    keep = wide[:, V:].clone()
    leaf = wide[:, :V].clone().requires_grad_()
    targets = torch.randint(V, (12,))
    cu = torch.tensor([0, 5, 12], dtype=torch.int32)
    expected = fields(dpo_loss(leaf, targets, cu_seqlens=cu, backend=backend), leaf=leaf)
    x = wide[:, :V].requires_grad_()
    ours = fields(dpo_loss(x, targets, cu_seqlens=cu, backend=backend, inplace=True), leaf=x)
    for key, y in ours.items():
        # Rows at other addresses may be summed in another order.
        torch.testing.assert_close(y, expected[key], rtol=1e-5, atol=1e-6, msg=key)
    assert torch.equal(wide[:, :V].detach(), ours["dleaf"])
    assert torch.equal(wide[:, V:], keep)


@pytest.mark.parametrize("words", [V, 1])
def test_inplace_takes_padded_rows_with_gaps(words, backend):
    """`logits[..., :V]` of a wider tensor, whose gradient backward multiplies where it lies."""
    wide = torch.randn(4, 3, 40)
    keep = wide[..., words:].clone()
    targets = torch.randint(words, (4, 3))
    leaf = wide[..., :words].clone().requires_grad_()
    expected = fields(dpo_loss(leaf, targets, backend=backend), -0.5, leaf=leaf)
    x = wide[..., :words].requires_grad_()
    ours = fields(dpo_loss(x, targets, backend=backend, inplace=True), -0.5, leaf=x)
    for key, y in ours.items():
        # Rows at other addresses may be summed in another order.
        torch.testing.assert_close(y, expected[key], rtol=1e-5, atol=1e-6, msg=key)
    assert torch.equal(x.detach(), ours["dleaf"])
    assert torch.equal(wide[..., words:], keep)


@pytest.mark.parametrize("bad", [V, -1, -99, 2**40])
def test_launchers_and_targets_outside_the_vocabulary(bad, backend):
    """A GPU does not look at targets: such a row, and the pair that holds it, are NaN, and no other is touched."""
    launch = resolve(backend, "cpu")
    logits = torch.randn(7, V)
    targets = torch.tensor([3, -100, bad, 5, 0, 1, 2])
    cu = torch.tensor([0, 1, 3, 5, 7], dtype=torch.int32)
    fine = targets.clone()
    fine[2] = -100
    transform = {"scale": 1.5, "softcap": 4.0, "temperature": 0.7, "outputs": ("entropy", "is_top1")}
    plain = {**transform, "outputs": ()}
    forward = [launch.logps_fwd(logits, t, **transform) for t in (targets, fine)]
    residuals = [logits.clone(), logits.clone()]
    residual = [launch.residual_(x, t, **transform) for x, t in zip(residuals, (targets, fine), strict=True)]
    plain.pop("outputs")
    grads = [
        launch.logps_bwd(logits, t, lse, torch.ones(7), **plain, out=torch.empty_like(logits))
        for t, (_, lse, _) in zip((targets, fine), forward, strict=True)
    ]
    others = torch.tensor([0, 1, 3, 4, 5, 6])
    for mine, other in ((forward[0][0], forward[1][0]), (residual[0][0], residual[1][0]), residuals, grads):
        assert mine[2].isnan().all()
        assert torch.equal(mine[others], other[others])
        assert (mine[1] == 0).all()
    assert not forward[0][2]["is_top1"][2]
    options = {"loss_type": "sigmoid", "beta": 0.1, "label_smoothing": 0.0, "discopop_tau": 0.05, "simpo_gamma": 0.5}
    losses, _, out = launch.dpo_fused(logits, targets, cu, None, 0.5, **options, out=torch.empty_like(logits))
    assert losses.isnan().tolist() == [False, True]
    assert out.isnan().any(1).tolist() == [False, False, True, False, False, True, True]


@pytest.mark.parametrize("kept", [False, True])
def test_residual_ignores_rows(kept, backend):
    """An ignored row is not read, even where it holds NaN; its log-prob, statistics and gradient are 0."""
    launch = resolve(backend, "cpu")
    logits = torch.randn(5, V)
    targets = torch.tensor([3, 9, 9, 5, 0])
    index = -100 if kept else 9
    targets[targets == 9] = index
    expected = logits.clone()
    seen = torch.tensor([0, 3, 4])
    rows = expected[seen]
    logps, stats = launch.residual_(rows, targets[seen], outputs=("entropy", "is_top1"))
    logits[1:3] = torch.nan
    found, found_stats = launch.residual_(logits, targets, ignore_index=index, outputs=("entropy", "is_top1"))
    assert torch.equal(found[seen], logps)
    assert torch.equal(logits[seen], rows)
    assert (found[1:3] == 0).all()
    assert (logits[1:3] == 0).all()
    for name, x in found_stats.items():
        assert torch.equal(x[seen], stats[name])
        assert (x[1:3] == 0).all()


def test_inplace_is_noticed_by_whoever_saved_the_logits():
    leaf = torch.randn(4, 3, V).requires_grad_()
    x = leaf.exp()
    out = dpo_loss(x, torch.randint(V, (4, 3)), inplace=True)
    with pytest.raises(RuntimeError, match="inplace operation"):
        out.loss.backward()


@pytest.mark.parametrize("name", ["sigmoid", "aot"])
def test_same_bits_twice(name, backend):
    logits, targets, cu = pairs(LENGTHS, V, packed=True, dtype=torch.float32)
    results = []
    for _ in range(2):
        x = logits.clone().requires_grad_()
        out = dpo_loss(x, targets, ref_for(name, 8), cu_seqlens=cu, backend=backend, **options_of(name))
        results.append(fields(out, logits=x))
    assert all(torch.equal(x, results[1][k]) for k, x in results[0].items())


def test_without_gradients_nothing_is_overwritten(backend):
    logits, targets, cu = pairs(LENGTHS, V, packed=True, dtype=torch.float32)
    x = logits.clone().requires_grad_()
    expected = fields(dpo_loss(x, targets, cu_seqlens=cu, backend=backend))
    for inplace in (False, True):
        with torch.no_grad():
            out = dpo_loss(x, targets, cu_seqlens=cu, backend=backend, inplace=inplace)
        bare = dpo_loss(logits, targets, cu_seqlens=cu, backend=backend, inplace=inplace)
        assert torch.equal(x.detach(), logits)
        for result in (out, bare):
            assert not result.loss.requires_grad
            for k, y in fields(result).items():
                torch.testing.assert_close(y, expected[k], rtol=1e-6, atol=1e-6)


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
@pytest.mark.parametrize("name", ["losses", "chosen_logps", "rejected_logps"])
@pytest.mark.parametrize("op", ["dpo_loss", "frozen", "trained"])
def test_a_gradient_that_the_one_pass_does_not_have_is_an_error(op, name, compiled):
    torch._dynamo.reset()
    function = torch.compile(fused, backend="aot_eager", fullgraph=True) if compiled else fused
    out = function(op, fused_inputs())
    out.loss.backward()
    out = function(op, fused_inputs())
    assert not out.chosen_rewards.requires_grad
    assert not out.rejected_rewards.requires_grad
    with pytest.raises(RuntimeError, match=r"only `loss` .* carries a gradient.*sft_weight.*linear_sequence_logps"):
        (out.loss - 0.1 * getattr(out, name).mean()).backward()


@pytest.mark.parametrize("op", ["dpo_loss", "frozen", "trained"])
def test_a_second_derivative_is_refused(op):
    """Also where another term has one: what of it comes from the op would be missing in silence."""
    inputs = fused_inputs()
    leaf = inputs["logits" if op == "dpo_loss" else "hidden"]
    (g,) = torch.autograd.grad(fused(op, inputs).loss + leaf.pow(3).sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        g.square().sum().backward()


def test_by_way_of_autograd_all_but_the_rewards_carry_a_gradient():
    x, targets, _ = pairs(LENGTHS, V, dtype=torch.float16)
    out = dpo_loss(x.requires_grad_(), targets)
    assert [name for name in out.__dataclass_fields__ if not getattr(out, name).requires_grad] == [
        "chosen_rewards",
        "rejected_rewards",
    ]
    (ours,) = torch.autograd.grad(out.loss - 0.1 * out.chosen_logps.mean(), x)
    wide = x.detach().double().requires_grad_()
    expected = truth(wide, targets)
    (theirs,) = torch.autograd.grad(expected.loss - 0.1 * expected.chosen_logps.mean(), wide)
    torch.testing.assert_close(ours.double(), theirs, rtol=2e-3, atol=1e-5)


def test_backward_runs_once():
    """Its gradient was multiplied in place; to say so is better than to hand out a wrong one."""
    x, targets, _ = pairs(LENGTHS, V, dtype=torch.float32)
    loss = dpo_loss(x.requires_grad_(), targets).loss * 2.0
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradients_add_up_over_two_losses():
    x, targets, _ = pairs(LENGTHS, V, dtype=torch.float32)
    x.requires_grad_()
    for factor in (1.0, 0.5):
        (dpo_loss(x, targets).loss * factor).backward()
    (expected,) = torch.autograd.grad(dpo_loss(x, targets).loss, x)
    torch.testing.assert_close(x.grad, 1.5 * expected)


# ---- linear_dpo_loss ----

D = 5
NAMES = ("hidden", "weight", "bias")
TRANSFORM = {"logit_scale": 0.6, "softcap": 4.0}


def head_batch(lengths=LENGTHS, v=V, *, packed=False, dtype=torch.float64, bias=True, seed=0):
    hidden, targets, cu = pairs(lengths, v, packed=packed, dtype=dtype, width=D, seed=seed, scale=1.0)
    rng = torch.Generator().manual_seed(seed + 1)
    leaves = {"hidden": hidden, "weight": torch.randn(v, D, generator=rng, dtype=torch.float64).to(dtype)}
    if bias:
        leaves["bias"] = torch.randn(v, generator=rng, dtype=torch.float64).to(dtype)
    return leaves, targets, cu


def linear_truth(hidden, weight, targets, ref, *, bias=None, **options):
    return truth(torch.nn.functional.linear(hidden, weight, bias), targets, ref, **options)


def run_head(function, leaves, targets, ref, cu, needs=NAMES, loss_grad=1.0, **options):
    leaves = {k: x.detach().requires_grad_(k in needs) for k, x in leaves.items()}
    dtype = torch.promote_types(leaves["hidden"].dtype, torch.float32)
    ref = None if ref is None else ref.to(dtype)
    wanted = {k: x for k, x in leaves.items() if k in needs}
    out = function(leaves["hidden"], leaves["weight"], targets, ref, bias=leaves.get("bias"), cu_seqlens=cu, **options)
    assert out.loss.requires_grad == bool(wanted)
    return fields(out, loss_grad, **wanted)


def check_head(batch, ref, *, workspace_bytes=None, backend=None, **options):
    leaves, targets, cu = batch
    own = {} if workspace_bytes is None else {"workspace_bytes": workspace_bytes}
    dtype = leaves["hidden"].dtype
    ours = run_head(linear_dpo_loss, leaves, targets, ref, cu, backend=backend, **own, **options)
    assert all(ours[f"d{k}"].dtype == leaves[k].dtype for k in leaves if f"d{k}" in ours)
    plain = run_head(linear_truth, leaves, targets, ref, cu, **options)
    exact = run_head(linear_truth, {k: x.double() for k, x in leaves.items()}, targets, ref, cu, **options)
    assert_within_rule(ours, plain, exact, FLOORS[dtype])
    return ours


def few_rows(monkeypatch, rows, v=V, itemsize=8):
    small_tiles(monkeypatch, rows * v * itemsize)


@pytest.mark.parametrize("needs", [("hidden",), NAMES])
@pytest.mark.parametrize("name", LOSSES)
def test_head_every_loss(monkeypatch, name, needs, backend):
    few_rows(monkeypatch, 3, itemsize=4)
    batch = head_batch(packed=True, dtype=torch.float32)
    options = {**options_of(name), "needs": needs, "loss_grad": -1.7, "workspace_bytes": 12 * V * 4}
    check_head(batch, ref_for(name, 8), backend=backend, **options)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kept", [0, 7, 12, 1000])
@pytest.mark.parametrize("needs", [n for k in range(1, 4) for n in itertools.combinations(NAMES, k)])
def test_head_every_subset_of_gradients(monkeypatch, needs, kept, packed):
    """Workspaces of no row, of part of a pair, of a few pairs, of everything."""
    few_rows(monkeypatch, 4)
    options = {"needs": needs, "loss_grad": 2.0, "workspace_bytes": kept * V * 8 + 5, **TRANSFORM}
    check_head(head_batch(packed=packed), ref_for("sigmoid", 8), **options)


@pytest.mark.parametrize("name", MIXED)
def test_head_mixtures_weights_and_divergences(monkeypatch, name):
    few_rows(monkeypatch, 4)
    options = dict(MIXED[name])
    if "pair_weights" in options:
        options["pair_weights"] = options["pair_weights"].double()
    check_head(head_batch(), ref_for("sigmoid", 8), workspace_bytes=12 * V * 8, **options)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("needs", [("hidden",), NAMES])
@pytest.mark.parametrize("kept", [0, 50, 1000])
@pytest.mark.parametrize("transform", [{}, TRANSFORM])
def test_head_precision(monkeypatch, transform, kept, needs, dtype, backend):
    few_rows(monkeypatch, 9, 257, 4)
    batch = head_batch([(p, 5 * c) for p, c in LENGTHS], v=257, dtype=dtype)
    options = {"needs": needs, "workspace_bytes": kept * 257 * dtype.itemsize, **transform}
    check_head(batch, ref_for("sigmoid", 8), loss_grad=0.5, backend=backend, **options)


@pytest.mark.parametrize("needs", [("hidden",), NAMES])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("which", [[1], [2, 6], range(8)])
def test_head_ignored_sequences(monkeypatch, which, packed, needs):
    few_rows(monkeypatch, 4)
    leaves, targets, cu = head_batch(packed=packed)
    bounds = cu if packed else torch.arange(9)
    for s in which:
        targets[bounds[s] : bounds[s + 1]] = -100
    for name in ("sigmoid", "simpo", "aot"):
        options = {**options_of(name), "needs": needs, "workspace_bytes": 12 * V * 8}
        ours = check_head((leaves, targets, cu), ref_for(name, 8), **options)
        assert ours["dhidden"][targets == -100].eq(0).all()


@pytest.mark.parametrize("needs", [("hidden",), NAMES])
@pytest.mark.parametrize("lengths", [[(0, 1)] * 2, [(0, 4), (1, 2)], [(0, 1), (4, 0)]])
def test_head_one_pair(lengths, needs, backend):
    for v in (1, 2, 130):
        batch = head_batch(lengths, v, dtype=torch.float32)
        check_head(batch, torch.tensor([-1.0, -2.0]), needs=needs, backend=backend)


@pytest.mark.parametrize("needs", [("hidden",), NAMES])
def test_head_non_contiguous(needs):
    leaves, targets, _ = head_batch()
    strided = {
        "hidden": leaves["hidden"].transpose(0, 2).contiguous().transpose(0, 2),
        "weight": leaves["weight"].t().contiguous().t(),
        "bias": leaves["bias"].repeat_interleave(2)[::2],
    }
    one, two = (run_head(linear_dpo_loss, x, targets, None, None, needs=needs) for x in (leaves, strided))
    assert_within_rule(two, one, one, 1e-12)


@pytest.mark.parametrize("needs", [("hidden",), NAMES])
def test_head_margins_of_ten_thousand(needs):
    ref = 1e4 * torch.tensor([1.0, -1.0, 1.0, -1.0, -1.0, 1.0, -1.0, 1.0])
    for name in ("sigmoid", "ipo", "hinge"):
        ours = check_head(head_batch(), ref, needs=needs, **options_of(name))
        assert all(x.isfinite().all() for x in ours.values())


@pytest.mark.parametrize("needs", [("hidden",), NAMES])
@pytest.mark.parametrize("kept", [0, 12, 1000])
def test_head_same_bits_twice(monkeypatch, needs, kept, backend):
    few_rows(monkeypatch, 4, itemsize=4)
    leaves, targets, cu = head_batch(packed=True, dtype=torch.float32)
    options = {"needs": needs, "workspace_bytes": kept * V * 4, "backend": backend}
    one, two = (run_head(linear_dpo_loss, leaves, targets, None, cu, **options) for _ in range(2))
    assert all(torch.equal(one[k], two[k]) for k in one)


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
        head_ops.linear_dpo_loss.function(*head_arguments(leaves, targets, cu, needs, kept * V * 8))
    assert mode.gemms == gemms


@pytest.mark.parametrize("pairs_kept", [1, 2, 3])
def test_head_groups_of_whole_pairs_take_three_products_each(pairs_kept):
    leaves, targets, cu = head_batch([(0, 4)] * 12, packed=True, bias=False)
    with Allocated() as mode:
        head_ops.linear_dpo_loss.function(
            *head_arguments(leaves, targets, cu, [True, True, False], pairs_kept * 8 * V * 8)
        )
    assert mode.gemms == 3 * 6 // pairs_kept


def test_head_holds_a_tile_and_the_workspace(monkeypatch):
    lengths, v, rows = [(0, 8)] * 16, 256, 8
    few_rows(monkeypatch, rows, v)
    leaves, targets, cu = head_batch(lengths, v, packed=True)
    for needs, kept in (([True, False, False], 0), ([True] * 3, 16), ([True] * 3, 40), ([True] * 3, 3)):
        with Allocated() as mode:
            head_ops.linear_dpo_loss.function(*head_arguments(leaves, targets, cu, needs, kept * v * 8))
        assert mode.numel == max(rows, kept // 16 * 16 or kept) * v


# ---- Refusals ----


def logits_call(**change):
    call = {"logits": torch.zeros(4, 3, 6), "targets": torch.zeros(4, 3, dtype=torch.int64)}
    return {**call, **change}


def packed_call(**change):
    cu = torch.tensor([0, 3, 6, 9, 12], dtype=torch.int32)
    call = {"logits": torch.zeros(12, 6), "targets": torch.zeros(12, dtype=torch.int64), "cu_seqlens": cu}
    return {**call, **change}


REFUSALS = [
    (
        logits_call(logits=torch.zeros(4, 6)),
        r"targets must be int64 \[4\], one for each row of logits, got torch.int64 \[4, 3\]",
    ),
    (
        logits_call(logits=torch.zeros(4, 3, 6, 1)),
        r"logits must be floating-point \[N, V\] or \[S, T, V\], got .* \[4, 3, 6, 1\]",
    ),
    (logits_call(logits=torch.zeros(4, 3, 6, dtype=torch.int32)), "logits must be floating-point .* got torch.int32"),
    (logits_call(logits=torch.zeros(4, 3, 0)), "logits must have V >= 1 words"),
    (logits_call(targets=torch.zeros(4, 3)), r"targets must be int64 \[4, 3\].* got torch.float32"),
    (logits_call(targets=torch.zeros(4, 2, dtype=torch.int64)), r"got torch.int64 \[4, 2\]"),
    (logits_call(targets=torch.full((4, 3), 6)), r"targets lie in \[6, 6\], outside the vocabulary \[0, 6\)"),
    (logits_call(targets=torch.full((4, 3), -1)), r"outside the vocabulary \[0, 6\) and are not ignore_index=-100"),
    (
        logits_call(logits=torch.zeros(3, 3, 6), targets=torch.zeros(3, 3, dtype=torch.int64)),
        "logits must hold 2B sequences, the B chosen and then the B rejected, B >= 1, got 3",
    ),
    (logits_call(logits=torch.zeros(0, 3, 6), targets=torch.zeros(0, 3, dtype=torch.int64)), "B >= 1, got 0"),
    (logits_call(ref_logps=torch.zeros(2)), r"ref_logps must be floating-point \[4\] on cpu, got torch.float32 \[2\]"),
    (logits_call(ref_logps=torch.zeros(4, dtype=torch.int64)), "ref_logps must be floating-point"),
    (logits_call(pair_weights=torch.zeros(4)), r"pair_weights must be floating-point \[2\]"),
    (logits_call(loss_type="dpo"), "loss_type is 'dpo': give one or more of sigmoid"),
    (logits_call(loss_type="simpo", ref_logps=torch.zeros(4)), "loss_type 'simpo' takes no ref_logps"),
    (logits_call(loss_type="hinge", label_smoothing=0.1), "label_smoothing is 0.1 but has no effect"),
    (logits_call(beta=0.0), "beta is 0.0"),
    (logits_call(loss_type="sft", mean_chosen_length=0.0), "mean_chosen_length is 0.0"),
    (logits_call(backend="cuda"), "backend is 'cuda': give one of csrc, triton, torch"),
    (packed_call(cu_seqlens=None), r"logits of shape \[12, 6\] is packed: give cu_seqlens"),
    (
        packed_call(cu_seqlens=torch.tensor([0, 3, 6, 9, 12])),
        r"cu_seqlens must be int32 \[S \+ 1\], got torch.int64 \[5\]",
    ),
    (
        packed_call(cu_seqlens=torch.tensor([0, 6, 9, 12], dtype=torch.int32)),
        "cu_seqlens must hold 2B sequences.* got 3",
    ),
    (
        packed_call(cu_seqlens=torch.tensor([0, 3, 6, 9, 11], dtype=torch.int32)),
        r"go up from 0 to the 12 rows, got \[0, 3, 6, 9, 11\]",
    ),
    (packed_call(cu_seqlens=torch.tensor([1, 3, 6, 9, 12], dtype=torch.int32)), "cu_seqlens must go up from 0"),
    (packed_call(cu_seqlens=torch.tensor([0, 6, 3, 9, 12], dtype=torch.int32)), "cu_seqlens must go up from 0"),
    (
        logits_call(cu_seqlens=torch.tensor([0, 3, 6], dtype=torch.int32)),
        r"cu_seqlens goes with packed logits \[N, ...\]",
    ),
    (
        logits_call(logits=torch.zeros(4, 4, 6)[:, 1:], inplace=True),
        "inplace=True needs logits whose rows follow each other",
    ),
    (logits_call(logits=torch.zeros(1, 1, 6).expand(4, 3, 6), inplace=True), "inplace=True needs logits whose rows"),
    (
        {
            "logits": torch.zeros(6).expand(2, 6),
            "targets": torch.zeros(2, dtype=torch.int64),
            "cu_seqlens": torch.tensor([0, 1, 2], dtype=torch.int32),
            "inplace": True,
        },
        "inplace=True needs logits whose rows",
    ),
    (logits_call(logits=torch.zeros(4, 3, 6, device="meta")), "targets are on cpu and logits on meta: move one"),
]


@pytest.mark.parametrize(("call", "message"), REFUSALS)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        dpo_loss(**call)


def test_an_unknown_option():
    with pytest.raises(TypeError, match="are no options of a loss: loss_type, "):
        dpo_loss(**logits_call(tau=0.1))


@pytest.mark.parametrize(("call", "message"), REFUSALS[6:26])
def test_refusals_where_a_gradient_is_taken(call, message):
    with pytest.raises(ValueError, match=message):
        dpo_loss(**{**call, "logits": call["logits"].requires_grad_()})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(4, 5)}, "hidden of shape .* is packed: give cu_seqlens"),
        ({"hidden": torch.zeros(3)}, r"hidden must be \[N, D\] or \[S, T, D\] and weight \[V, D\]"),
        ({"weight": torch.zeros(6, 4)}, r"got \(4, 3, 5\) and \(6, 4\)"),
        ({"weight": torch.zeros(6, 5, dtype=torch.float64)}, "cast one of them"),
        ({"bias": torch.zeros(5)}, r"bias must be \[6\], got \(5,\)"),
        ({"targets": torch.full((4, 3), 6)}, r"outside the vocabulary \[0, 6\)"),
        ({"softcap": -1.0}, "softcap must be above 0"),
        ({"logit_scale": math.nan}, "logit_scale must be finite"),
        ({"ref_logps": torch.zeros(3)}, r"ref_logps must be floating-point \[4\]"),
        ({"hidden": torch.zeros(3, 3, 5), "targets": torch.zeros(3, 3, dtype=torch.int64)}, "2B sequences.* got 3"),
        ({"weight": torch.zeros(6, 5, device="meta")}, "weight and hidden are on different devices"),
    ],
)
@pytest.mark.parametrize("trained", [False, True])
def test_head_refusals(change, message, trained):
    call = {
        "hidden": torch.zeros(4, 3, 5),
        "weight": torch.zeros(6, 5),
        "targets": torch.zeros(4, 3, dtype=torch.int64),
    }
    assert linear_dpo_loss(**call).losses.shape == (2,)
    call |= change
    call["hidden"].requires_grad_(trained)
    if "hidden" in change and change["hidden"].ndim == 2:
        call["targets"] = call["targets"][:, 0]
    with pytest.raises(ValueError, match=message):
        linear_dpo_loss(**call)

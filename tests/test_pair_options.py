"""What dpo_loss and linear_dpo_loss take beside a loss (soft labels, ld_alpha, an sft term, averages, the reference's hidden
states): what they refuse, what they do not read, and a policy equal to its reference. Values are rows of the table of ops.
"""

import pytest
import torch
import torch.nn.functional as F
from op_tools import pairs

from dpo_fast import dpo_loss, linear_dpo_loss, linear_sequence_logps, preference_loss, reference
from dpo_fast.ops import scored, sequence_logps

LENGTHS = [(2, 5), (0, 3), (1, 6), (3, 1), (2, 2), (4, 4), (0, 7), (1, 2)]
V, D, B = 13, 6, 4


def batch(packed, seed=0):
    hidden, targets, cu = pairs(LENGTHS, V, packed=packed, width=D, seed=seed)
    rng = torch.Generator().manual_seed(seed + 1)
    weight, bias = torch.randn(V, D, generator=rng).double(), torch.randn(V, generator=rng).double()
    return {"hidden": hidden, "weight": weight, "bias": bias}, targets, cu


def scored_logps(logits, targets, cu, **transform):
    """The log-probs of each sequence's scored tokens, a list of tensors."""
    logps = reference.token_logps(logits, targets, **transform)
    rows = zip(logps, targets, strict=True)
    if cu is not None:
        rows = [(logps[a:b], targets[a:b]) for a, b in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True)]
    return [x[t != -100] for x, t in rows]


@pytest.mark.parametrize("drop", [True, False])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("average", [False, True])
def test_linear_sequence_logps(monkeypatch, average, trained, packed, drop):
    """Both ways of leaving ignored rows out: dropped (on a CPU) and masked (on a GPU); what they hold is not read."""
    monkeypatch.setattr(scored, "drops_rows", lambda x: drop)
    leaves, targets, cu = batch(packed)
    wide = {k: x.clone().requires_grad_() for k, x in leaves.items()}
    found = scored_logps(F.linear(*wide.values()), targets, cu)
    expected = torch.stack([x.mean() if average else x.sum() for x in found])
    grad = torch.arange(1.0, 2 * B + 1).double()
    wanted = ["hidden", "weight", "bias"] if trained else ["hidden"]
    grads = torch.autograd.grad(expected, [wide[k] for k in wanted], grad)
    leaves["hidden"][targets == -100] = torch.nan
    leaves = {k: x.requires_grad_(k in wanted) for k, x in leaves.items()}
    ours, stats = linear_sequence_logps(
        leaves["hidden"], leaves["weight"], targets, bias=leaves["bias"], cu_seqlens=cu, average=average,
        outputs=("entropy",), workspace_bytes=7 * V * 8,
    )  # fmt: skip
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    assert stats["entropy"].isfinite().all()
    for x, y in zip(torch.autograd.grad(ours, [leaves[k] for k in wanted], grad), grads, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("drop", [True, False])
@pytest.mark.parametrize("trained", [False, True])
def test_hidden_states_of_ignored_rows_are_not_read(monkeypatch, trained, drop):
    monkeypatch.setattr(scored, "drops_rows", lambda x: drop)
    leaves, targets, _ = batch(False)
    wide = {k: x.clone().requires_grad_() for k, x in leaves.items()}
    ref = {f"ref_{k}": x.detach() for k, x in wide.items()}
    loss = reference.linear_dpo_loss(**wide, targets=targets, **ref)["loss"]
    grads = torch.autograd.grad(loss, list(wide.values()))
    leaves["hidden"][targets == -100] = torch.nan
    leaves = {k: x.requires_grad_(trained or k == "hidden") for k, x in leaves.items()}
    given = {"ref_hidden": leaves["hidden"], "ref_weight": leaves["weight"], "ref_bias": leaves["bias"]}
    out = linear_dpo_loss(leaves["hidden"], leaves["weight"], targets, bias=leaves["bias"], **given)
    wanted = [x for x in leaves.values() if x.requires_grad]
    for x, y in zip(torch.autograd.grad(out.loss, wanted), grads, strict=False):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("length", [64, 512])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_policy_and_reference_have_a_margin_of_exactly_zero(dtype, trained, length):
    rng = torch.Generator().manual_seed(0)
    hidden, weight = (3 * torch.randn(n, 16, generator=rng).to(dtype) for n in (4 * length, 97))
    hidden = hidden.view(4, length, 16)
    targets = torch.randint(97, (4, length), generator=rng)
    targets[:, : length // 7] = -100
    args = hidden.requires_grad_(), weight.requires_grad_(trained), targets
    with torch.no_grad():
        ref = linear_sequence_logps(*args)
    for given in ({"ref_logps": ref}, {"ref_hidden": hidden, "ref_weight": weight}):
        out = linear_dpo_loss(*args, **given)
        assert not (out.chosen_rewards - out.rejected_rewards).any()
    assert torch.equal(linear_sequence_logps(*args), ref)
    logits = (hidden @ weight.t()).detach().requires_grad_()
    for packed in (False, True):
        rows, flat = (logits.flatten(0, 1), targets.flatten()) if packed else (logits, targets)
        cu = torch.arange(5, dtype=torch.int32) * length if packed else None
        with torch.no_grad():
            ref = sequence_logps(rows, flat, cu_seqlens=cu)
        out = dpo_loss(rows, flat, ref, cu_seqlens=cu)
        assert not (out.chosen_rewards - out.rejected_rewards).any()


def call(**change):
    found = {"hidden": torch.zeros(4, 3, 5), "weight": torch.zeros(6, 5), "targets": torch.zeros(4, 3).long()}
    return {**found, **change}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ref_weight": torch.zeros(6, 5)}, "no effect without ref_hidden"),
        ({"ref_hidden": torch.zeros(4, 3, 5)}, "ref_hidden is given without ref_weight"),
        (
            {"ref_hidden": torch.zeros(4, 2, 5), "ref_weight": torch.zeros(6, 5)},
            r"ref_hidden must have the rows of hidden, \[4, 3\]",
        ),
        (
            {"ref_hidden": torch.zeros(4, 3, 5), "ref_weight": torch.zeros(6, 5), "ref_logps": torch.zeros(4)},
            "both given",
        ),
        (
            {"ref_hidden": torch.zeros(4, 3, 5), "ref_weight": torch.zeros(6, 5), "loss_type": "simpo"},
            "takes no ref_hidden",
        ),
        ({"label_smoothing": torch.zeros(4)}, r"label_smoothing must be floating-point \[2\]"),
        ({"label_smoothing": torch.tensor([0.0, 1.5])}, "a value of label_smoothing is 1.5: give a number in"),
        ({"label_smoothing": torch.tensor([0.0, torch.nan])}, "a value of label_smoothing is nan"),
        ({"label_smoothing": torch.tensor([0.0, 0.5]), "loss_type": "robust"}, r"give a number in \[0, 0.5\)"),
        ({"label_smoothing": torch.zeros(2), "loss_type": "hinge"}, "no effect with loss_type"),
        ({"label_smoothing": torch.zeros(2), "loss_type": "aot"}, "compares quantiles"),
        ({"sft_weight": -1.0}, "sft_weight is -1.0"),
        ({"sft_mean": "pairs"}, "no effect without sft_weight"),
        ({"sft_weight": 1.0, "sft_mean": "rows"}, "give one of tokens, pairs"),
        ({"sft_weight": 1.0, "pair_weights": torch.ones(2)}, "pair_weights cannot weigh"),
        ({"sft_weight": 1.0, "ld_alpha": 0.5}, "counts all tokens alike"),
        ({"ld_alpha": 1.5}, "ld_alpha is 1.5"),
        ({"average_log_prob": True, "loss_type": "ipo"}, "divides by lengths itself"),
        ({"temperature": 0.0}, "temperature must be above 0"),
    ],
)
@pytest.mark.parametrize("gradient", [False, True])
def test_refusals(change, message, gradient):
    arguments = call(**change)
    arguments["hidden"].requires_grad_(gradient)
    with pytest.raises(ValueError, match=message):
        linear_dpo_loss(**arguments)


def test_soft_labels_of_preference_loss_are_checked_and_equal_a_number():
    logps = torch.randn(2, 4, generator=torch.Generator().manual_seed(0)).double()
    same = preference_loss(*logps, label_smoothing=torch.full((4,), 0.2).double())
    torch.testing.assert_close(same.losses, preference_loss(*logps, label_smoothing=0.2).losses, rtol=1e-7, atol=0)
    with pytest.raises(ValueError, match=r"a value of label_smoothing is 2\.0"):
        preference_loss(*logps, label_smoothing=torch.full((4,), 2.0))
    with pytest.raises(ValueError, match=r"label_smoothing is no \[B\] tensor"):
        preference_loss(*logps, label_smoothing=torch.zeros(3))


def test_a_term_of_the_log_probs_of_preference_loss_has_its_gradient():
    chosen = torch.zeros(3, requires_grad=True)
    out = preference_loss(chosen, torch.zeros(3))
    (out.loss - 0.5 * out.chosen_logps.mean()).backward()
    torch.testing.assert_close(chosen.grad, torch.full((3,), (-0.05 - 0.5) / 3))


def test_the_error_of_a_slice_in_place_names_a_form_that_works():
    logits = torch.randn(2, 5, 7)
    labels = torch.randint(7, (2, 5))
    with pytest.raises(ValueError, match=r"give the whole: dpo_loss\(logits, F.pad\(labels\[:, 1:\], \(0, 1\), value="):
        dpo_loss(logits[:, :-1], labels[:, 1:], inplace=True)
    expected = dpo_loss(logits[:, :-1], labels[:, 1:]).loss
    leaf = logits.clone().requires_grad_()
    out = dpo_loss(leaf * 1.0, F.pad(labels[:, 1:], (0, 1), value=-100), inplace=True)
    torch.testing.assert_close(out.loss.detach(), expected)

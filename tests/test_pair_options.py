"""What dpo_loss and linear_dpo_loss take beside a loss (soft labels, ld_alpha, an sft term, averages, the reference's hidden
states, a transform of the logits, statistics), and linear_sequence_logps: against float64 autograd on whole logits, sequence
by sequence.
"""

import pytest
import torch
import torch.nn.functional as F
from op_tools import back_ends, pairs

from dpo_fast import dpo_loss, linear_dpo_loss, linear_sequence_logps, linear_token_logps, preference_loss, reference
from dpo_fast.ops import head, sequence_logps

LENGTHS = [(2, 5), (0, 3), (1, 6), (3, 1), (2, 2), (4, 4), (0, 7), (1, 2)]
V, D, B = 13, 6, 4
SOFT = torch.tensor([0.0, 0.1, 0.25, 0.4], dtype=torch.float64)
INNER = torch.tensor([0.02, 0.1, 0.25, 0.4], dtype=torch.float64)
LS = F.logsigmoid


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


def expected_loss(found, ref, *, e=0.0, name="sigmoid", beta=0.1, ld_alpha=None, sft=None, average=False, weights=None):
    """The loss, one pair at a time; `found` and `ref` are lists of the sequences' token log-probs."""
    losses = []
    for i in range(B):
        chosen, rejected, shared = found[i], found[B + i], min(len(found[i]), len(found[B + i]))

        def total(x, shared=shared):
            x = x if ld_alpha is None else torch.cat([x[:shared], ld_alpha * x[shared:]])
            return x.sum() / len(x) if average else x.sum()

        x = beta * (total(chosen) - total(rejected) - total(ref[i]) + total(ref[B + i]))
        eps = e[i] if isinstance(e, torch.Tensor) else torch.tensor(e, dtype=torch.float64)
        loss = {
            "sigmoid": lambda x, e: -(1 - e) * LS(x) - e * LS(-x),
            "robust": lambda x, e: (-(1 - e) * LS(x) + e * LS(-x)) / (1 - 2 * e),
            "exo_pair": lambda x, e: x.sigmoid() * (LS(x) - (1 - e).log()) + (-x).sigmoid() * (LS(-x) - e.log()),
        }[name](x, eps)
        if sft == "pairs":
            loss = loss - 0.3 * chosen.mean()
        if sft == "tokens":
            loss = loss - 0.3 * chosen.sum() * B / sum(len(x) for x in found[:B])
        losses.append(loss if weights is None else loss * weights[i])
    return torch.stack(losses).mean()


CASES = {
    "soft": ({"label_smoothing": SOFT}, {"e": SOFT}),
    "soft robust": ({"loss_type": "robust", "label_smoothing": SOFT}, {"name": "robust", "e": SOFT}),
    "soft exo_pair": ({"loss_type": "exo_pair", "label_smoothing": INNER}, {"name": "exo_pair", "e": INNER}),
    "soft and weighed": ({"label_smoothing": SOFT, "pair_weights": 1 + SOFT}, {"e": SOFT, "weights": 1 + SOFT}),
    "sft tokens": ({"sft_weight": 0.3}, {"sft": "tokens"}),
    "sft pairs": ({"sft_weight": 0.3, "sft_mean": "pairs"}, {"sft": "pairs"}),
    "ld_alpha": ({"ld_alpha": 0.4}, {"ld_alpha": 0.4}),
    "ld_alpha 0": ({"ld_alpha": 0.0}, {"ld_alpha": 0.0}),
    "average": ({"average_log_prob": True, "beta": 2.0}, {"average": True, "beta": 2.0}),
    "average and sft": (
        {"average_log_prob": True, "sft_weight": 0.3},
        {"average": True, "sft": "tokens"},
    ),
    "transform": ({"logit_scale": 0.7, "softcap": 4.0, "temperature": 1.3}, {}),
}


def truth(leaves, targets, cu, options, expected, ref):
    wide = {k: x.detach().double().requires_grad_() for k, x in leaves.items()}
    transform = {k: options[k] for k in ("logit_scale", "softcap", "temperature") if k in options}
    logits = F.linear(wide["hidden"], wide["weight"], wide["bias"])
    ref_logits = F.linear(ref["hidden"].double(), ref["weight"].double(), ref["bias"].double())
    found, theirs = (scored_logps(x, targets, cu, **transform) for x in (logits, ref_logits))
    loss = expected_loss(found, theirs, **expected)
    return loss.detach(), torch.autograd.grad(loss, list(wide.values()))


def typed(options, dtype):
    return {k: x.to(dtype) if isinstance(x, torch.Tensor) else x for k, x in options.items()}


@pytest.mark.parametrize("kept", [0, 9, 1000])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_head_with_the_reference_s_hidden_states(name, packed, kept):
    options, expected = CASES[name]
    leaves, targets, cu = batch(packed)
    ref, _, _ = batch(packed, seed=7)
    loss, grads = truth(leaves, targets, cu, options, expected, ref)
    leaves = {k: x.requires_grad_() for k, x in leaves.items()}
    out, stats = linear_dpo_loss(
        leaves["hidden"], leaves["weight"], targets, bias=leaves["bias"], cu_seqlens=cu, outputs=("entropy", "is_top1"),
        ref_hidden=ref["hidden"], ref_weight=ref["weight"], ref_bias=ref["bias"], workspace_bytes=kept * V * 8,
        **typed(options, torch.float64),
    )  # fmt: skip
    torch.testing.assert_close(out.loss.detach(), loss, rtol=1e-11, atol=1e-12)
    for ours, theirs in zip(torch.autograd.grad(out.loss, list(leaves.values())), grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    transform = {k: options[k] for k in ("logit_scale", "softcap", "temperature") if k in options}
    _, alone = linear_token_logps(
        leaves["hidden"].detach(), leaves["weight"], targets, bias=leaves["bias"], outputs=("entropy", "is_top1"),
        **transform,
    )  # fmt: skip
    for key, x in stats.items():
        assert x.shape == targets.shape
        torch.testing.assert_close(x, alone[key])
        assert not x[targets == -100].any()


@pytest.mark.parametrize("backend", back_ends())
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_on_logits_in_every_back_end(name, packed, backend):
    options, expected = CASES[name]
    leaves, targets, cu = batch(packed)
    ref, _, _ = batch(packed, seed=7)
    transform = {k: options[k] for k in ("logit_scale", "softcap", "temperature") if k in options}
    logits = F.linear(*leaves.values()).float().requires_grad_()
    theirs = scored_logps(F.linear(*ref.values()), targets, cu, **transform)
    if "ld_alpha" in options:
        count = [min(len(theirs[i % B]), len(theirs[B + i % B])) for i in range(2 * B)]
        sums = [x[:n].sum() + options["ld_alpha"] * x[n:].sum() for x, n in zip(theirs, count, strict=True)]
    else:
        sums = [x.mean() if "average_log_prob" in options else x.sum() for x in theirs]
    ref_logps = torch.stack(sums).float()
    out = dpo_loss(logits, targets, ref_logps, cu_seqlens=cu, backend=backend, **typed(options, torch.float32))
    wide = logits.detach().double().requires_grad_()
    loss = expected_loss(scored_logps(wide, targets, cu, **transform), theirs, **expected)
    torch.testing.assert_close(out.loss.double(), loss, rtol=1e-5, atol=1e-6)
    (ours,), (exact,) = torch.autograd.grad(out.loss, logits), torch.autograd.grad(loss, wide)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        plain = dpo_loss(logits, targets, ref_logps, cu_seqlens=cu, backend=backend, **typed(options, torch.float32))
    torch.testing.assert_close(plain.loss, out.loss.detach(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("drop", [True, False])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("average", [False, True])
def test_linear_sequence_logps(monkeypatch, average, trained, packed, drop):
    """Both ways of leaving ignored rows out: dropped (on a CPU) and masked (on a GPU); what they hold is not read."""
    monkeypatch.setattr(head, "drops_rows", lambda x: drop)
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
    monkeypatch.setattr(head, "drops_rows", lambda x: drop)
    leaves, targets, _ = batch(False)
    ref, _, _ = batch(False)
    _, grads = truth(leaves, targets, None, {}, {}, ref)
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

"""Preference losses: TRL's own numbers and direct formulas."""

import json
import math
from pathlib import Path

import pytest
import torch
from loss_tools import LOSS_NAMES, REFERENCE_FREE, SMOOTHED, batch, grads, options, rows, sigmoid, words

from dpo_fast.forest.paths import sum_logps, wpo_weights
from dpo_fast.losses import preference_loss

FIXTURE = Path(__file__).parent / "fixtures" / "trl_losses.json"


@pytest.fixture(scope="module")
def trl():
    data = json.loads(FIXTURE.read_text())
    inputs = {k: torch.tensor(v, dtype=torch.float64 if "log" in k else None) for k, v in data["inputs"].items()}
    mask = inputs["completion_mask"][:, 1:].bool()
    # Completion tokens come first: a stable sort on "is no completion token".
    order = torch.sort((~mask).int(), dim=1, stable=True).indices
    return inputs | {"cases": data["cases"], "mask": mask, "order": order}


def left(trl, tokens):
    """[8, C] with the completion tokens first, then zeros: the layout of `sum_logps`."""
    return (tokens * trl["mask"]).gather(1, trl["order"])


CASES = words(
    "sigmoid hinge ipo nca_pair bco_pair sppo_hard aot aot_unpaired apo_zero apo_down discopop sft sigmoid_norm "
    "sigmoid_ls0.1 robust_ls0.1 exo_pair_1e-3 aot_ls0.1 sigmoid_beta0.5 sigmoid_forward_kl sigmoid_js_divergence "
    "sigmoid_alpha_divergence ipo_forward_kl ipo_js_divergence ipo_alpha_divergence sigmoid_ld0.5 ipo_ld0.5 "
    "sigmoid_wpo mpo"
)


def test_every_case_of_the_fixture_is_tested(trl):
    assert set(trl["cases"]) == set(CASES)


@pytest.mark.parametrize("case", CASES)
def test_matches_trl(trl, case):
    want = trl["cases"][case]
    args = dict(want["args"])
    if case == "sigmoid_ls0.1":
        # TRL ignores label_smoothing with sigmoid: its value is that of e = 0. Ours: test_conservative_dpo.
        assert want["loss"] == trl["cases"]["sigmoid"]["loss"]
        del args["label_smoothing"]
    ld, wpo, f = args.pop("ld", None), args.pop("w", False), args.pop("f", None)
    if f is not None:
        args["f_divergence_type"] = f
    lengths = trl["mask"].sum(1)
    partner = lengths.roll(len(lengths) // 2)
    tokens = trl["policy_logps"].clone().requires_grad_()
    logps = sum_logps(left(trl, tokens), lengths, partner_lengths=partner, ld_alpha=ld).chunk(2)
    refs = sum_logps(left(trl, trl["ref_logps"]), lengths, partner_lengths=partner, ld_alpha=ld).chunk(2)
    if args["loss_type"] == "sft":
        refs = (None, None)
    weights = wpo_weights(left(trl, tokens), left(trl, trl["log_sum_sq_probs"]), lengths) if wpo else None
    chosen_lengths, rejected_lengths = lengths.chunk(2)
    out = preference_loss(
        *logps, *refs, chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths, pair_weights=weights, **args
    )

    # TRL works in float32 for alpha_divergence and takes log(e) in float32 for exo_pair.
    rtol = 2e-6 if f == "alpha_divergence" else 1e-7 if case.startswith("exo") else 1e-12
    torch.testing.assert_close(out.loss.item(), want["loss"], rtol=rtol, atol=0)
    torch.testing.assert_close(out.losses.mean(), out.loss)
    grad = torch.autograd.grad(out.loss, tokens)[0]
    # TRL's gradient is defined at prompt positions too.
    want_grad = torch.tensor(want["grad"], dtype=torch.float64) * trl["mask"]
    torch.testing.assert_close(grad, want_grad, rtol=rtol, atol=rtol * want_grad.abs().max().item())
    metrics = {"logps/chosen": out.chosen_logps.mean(), "logps/rejected": out.rejected_logps.mean()}
    if args["loss_type"] != "sft":  # TRL's sft takes a reference for its metrics; ours does not
        metrics |= {
            "rewards/chosen": out.chosen_rewards.mean(),
            "rewards/rejected": out.rejected_rewards.mean(),
            "rewards/margins": (out.chosen_rewards - out.rejected_rewards).mean(),
            "rewards/accuracies": (out.chosen_rewards > out.rejected_rewards).double().mean(),
        }
    for key, value in metrics.items():
        torch.testing.assert_close(value.item(), want["metrics"][key], rtol=rtol, atol=1e-12, msg=key)


@pytest.mark.parametrize("e", [0.0, 0.1, 0.5, 1.0])
def test_conservative_dpo(e):
    data = batch("sigmoid")
    x = [0.3 * ((w - rw) - (v - rl)) for w, v, rw, rl, _, _ in rows(data)]
    want = [-(1 - e) * math.log(sigmoid(v)) - e * math.log(sigmoid(-v)) for v in x]
    slope = [0.3 * (sigmoid(v) - (1 - e)) / len(x) for v in x]
    out, grad = grads(data, loss_type="sigmoid", beta=0.3, label_smoothing=e)
    torch.testing.assert_close(out.losses.tolist(), want, rtol=1e-12, atol=0)
    torch.testing.assert_close(grad[0].tolist(), slope, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(grad[1], -grad[0])


@pytest.mark.parametrize("e", [0.0, 0.2])
def test_simpo(e):
    data = batch("simpo")
    x = [2.0 * (w / nw) - 2.0 * (v / nl) - 0.7 for w, v, nw, nl in rows(data)]
    want = [-(1 - e) * math.log(sigmoid(v)) - e * math.log(sigmoid(-v)) for v in x]
    out = preference_loss(**data, loss_type="simpo", beta=2.0, simpo_gamma=0.7, label_smoothing=e)
    torch.testing.assert_close(out.losses.tolist(), want, rtol=1e-12, atol=0)
    rewards = [[2.0 * w / nw, 2.0 * v / nl] for w, v, nw, nl in rows(data)]
    got = torch.stack([out.chosen_rewards, out.rejected_rewards], 1).tolist()
    torch.testing.assert_close(got, rewards, rtol=1e-12, atol=0)


def test_orpo():
    data = batch("orpo")
    mean = sum(nw for _, _, nw, _ in rows(data)) / len(rows(data))
    want = []
    for w, v, nw, nl in rows(data):
        p, q = math.exp(w / nw), math.exp(v / nl)
        odds_ratio = (p / (1 - p)) / (q / (1 - q))
        want.append(-w / mean - 0.2 * math.log(sigmoid(math.log(odds_ratio))))
    out = preference_loss(**data, loss_type="orpo", beta=0.2)
    torch.testing.assert_close(out.losses.tolist(), want, rtol=1e-12, atol=0)
    tokens = sum(nw for _, _, nw, _ in rows(data))
    nll = -sum(w for w, _, _, _ in rows(data)) / tokens
    odds = sum(v + w / mean for v, (w, _, _, _) in zip(want, rows(data), strict=True)) / len(want)
    torch.testing.assert_close(out.loss.item(), nll + odds, rtol=1e-12, atol=0)
    torch.testing.assert_close(out.chosen_rewards.tolist(), [0.2 * w / nw for w, _, nw, _ in rows(data)])


def test_rewards_without_reference():
    data = batch("sft")
    logps, simpo = data["chosen_logps"], data["chosen_logps"] / data["chosen_lengths"]
    for loss_type, want in (
        ("sigmoid", logps),
        ("sft", logps),
        (["simpo", "sft"], simpo),
        (["simpo", "apo_zero"], logps),
    ):
        out = preference_loss(**data, loss_type=loss_type, beta=0.3)
        torch.testing.assert_close(out.chosen_rewards, 0.3 * want, msg=str(loss_type))


def test_no_reference_is_a_reference_of_zero():
    for name in set(LOSS_NAMES) - REFERENCE_FREE:
        data = batch(name)
        zeros = torch.zeros(6, dtype=torch.float64)
        want = preference_loss(**data | {"ref_chosen_logps": zeros, "ref_rejected_logps": zeros}, **options(name))
        got = preference_loss(**data | {"ref_chosen_logps": None, "ref_rejected_logps": None}, **options(name))
        torch.testing.assert_close(got.losses, want.losses, rtol=0, atol=0)


@pytest.mark.parametrize("name", sorted(set(LOSS_NAMES) - {"sigmoid_norm", "ipo", "sft", "simpo", "orpo"}))
def test_zero_margin(name):
    """Policy equal to reference: ln 2 for the logistic losses, the formula's value at 0 for the others."""
    e, ln2 = SMOOTHED.get(name, 0.0), math.log(2)
    want = {
        "hinge": 1.0,
        "exo_pair": -ln2 - 0.5 * math.log(1 - e) - 0.5 * math.log(e or 1),
        "nca_pair": 2 * ln2,
        "bco_pair": 2 * ln2,
        "sppo_hard": 50.0,
        "apo_zero": 1.0,
        "apo_down": 1.0,
        "discopop": 0.5 * ln2 + 0.5,
    }.get(name, ln2)
    logps = torch.tensor([-3.0, -700.0, 0.0], dtype=torch.float64)
    out = preference_loss(logps, 2 * logps, logps, 2 * logps, **options(name))
    torch.testing.assert_close(out.losses, torch.full_like(logps, want), rtol=1e-14, atol=0)
    assert not (out.chosen_rewards > out.rejected_rewards).any()


def test_several_losses_add_up():
    data = batch("sigmoid")
    parts = [preference_loss(**data, loss_type=name).losses for name in ("hinge", "nca_pair")]
    both = preference_loss(**data, loss_type=["hinge", "nca_pair"], loss_weights=[0.5, -2.0])
    torch.testing.assert_close(both.losses, 0.5 * parts[0] - 2.0 * parts[1])
    torch.testing.assert_close(preference_loss(**data, loss_type=("hinge", "nca_pair")).losses, parts[0] + parts[1])


def test_pair_weights():
    data, weights = batch("sigmoid"), torch.tensor([0.0, 1.0, 2.0, 0.5, 3.0, 1.0], dtype=torch.float64)
    plain, got = (preference_loss(**data, pair_weights=v) for v in (None, weights))
    torch.testing.assert_close(got.losses, plain.losses * weights)
    torch.testing.assert_close(got.loss, (plain.losses * weights).sum() / 6)


SCORES = [
    ("reverse_kl", 0.5, lambda d: d),
    ("forward_kl", 0.5, lambda d: 1 - math.exp(-d)),
    ("js_divergence", 0.5, lambda d: math.log(2 / (1 + math.exp(-d)))),
    ("alpha_divergence", 0.3, lambda d: (math.exp(-0.7 * d) - 1) / -0.7),
    ("alpha_divergence", 2.0, lambda d: math.exp(d) - 1),
    ("alpha_divergence", 1.0, lambda d: d),
    ("alpha_divergence", 1 + 2e-6, lambda d: d + 1e-6 * d * d),
]


@pytest.mark.parametrize(("f", "alpha", "score"), SCORES)
def test_divergences(f, alpha, score):
    data = batch("hinge")
    want = [max(0.0, 1 - 0.01 * (score(w - rw) - score(v - rv))) for w, v, rw, rv, _, _ in rows(data)]
    given = {"loss_type": "hinge", "beta": 0.01, "f_divergence_type": f, "f_alpha_divergence_coef": alpha}
    out = preference_loss(**data, **given)
    torch.testing.assert_close(out.losses.tolist(), want, rtol=1e-9, atol=0)
    torch.testing.assert_close(out.chosen_rewards.tolist(), [0.01 * (r[0] - r[2]) for r in rows(data)])


def test_alpha_near_one_in_float32():
    """exp(x) - 1 would lose every digit here."""
    data = {k: v.float() if "logps" in k else v for k, v in batch("sigmoid").items()}
    want = preference_loss(**data).losses
    near = preference_loss(**data, f_divergence_type="alpha_divergence", f_alpha_divergence_coef=1 + 2e-6).losses
    torch.testing.assert_close(near, want, rtol=1e-4, atol=0)

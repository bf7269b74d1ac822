"""Preference losses: TRL's own numbers, direct formulas, symmetries, extremes, and every refusal."""

import json
import math
import re
from pathlib import Path

import pytest
import torch

from dpo_fast.forest.paths import sum_logps, wpo_weights
from dpo_fast.loss_table import F_DIVERGENCES, LOSSES
from dpo_fast.losses import LossOptions, preference_loss

FIXTURE = Path(__file__).parent / "fixtures" / "trl_losses.json"
words = str.split
LOSS_NAMES = words(
    "sigmoid sigmoid_norm hinge ipo exo_pair nca_pair robust bco_pair sppo_hard aot aot_unpaired apo_zero apo_down "
    "discopop sft simpo orpo"
)
REFERENCE_FREE = {"sft", "simpo", "orpo"}
OVER_BATCH = {"aot", "aot_unpaired"}
MARGIN = set(words("sigmoid hinge exo_pair robust aot discopop"))
F_LOSSES = words("sigmoid sigmoid_norm hinge ipo exo_pair robust discopop")
SMOOTHED = {"sigmoid": 0.1, "exo_pair": 0.01, "robust": 0.1, "aot": 0.1, "aot_unpaired": 0.1, "simpo": 0.1}


def options(name):
    """The loss, smoothed where that has an effect (exo_pair needs it)."""
    return {"loss_type": name, "label_smoothing": SMOOTHED.get(name, 0.0)}


def batch(name, pairs=6, seed=0, dtype=torch.float64):
    """Log-probs and lengths of `pairs` ragged pairs as keyword arguments; no reference where the loss takes none."""
    rng = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 12, (2, pairs), generator=rng)
    policy, reference = -torch.rand(2, 2, pairs, generator=rng, dtype=dtype) * lengths * 3
    out = {"chosen_logps": policy[0], "rejected_logps": policy[1]}
    if name not in REFERENCE_FREE:
        out |= {"ref_chosen_logps": reference[0], "ref_rejected_logps": reference[1]}
    return out | {"chosen_lengths": lengths[0], "rejected_lengths": lengths[1]}


def grads(data, weight=1.0, **kwargs):
    """The loss and its gradient [2, B] with respect to both log-probs."""
    leaves = [data[key].detach().clone().requires_grad_() for key in ("chosen_logps", "rejected_logps")]
    out = preference_loss(
        *leaves, **{k: v for k, v in data.items() if k not in ("chosen_logps", "rejected_logps")}, **kwargs
    )
    g = torch.autograd.grad(out.loss * weight, leaves, allow_unused=True)
    return out, torch.stack([torch.zeros_like(x) if gx is None else gx for x, gx in zip(leaves, g, strict=True)])


# ---- TRL's numbers ----


@pytest.fixture(scope="module")
def trl():
    data = json.loads(FIXTURE.read_text())
    inputs = {k: torch.tensor(v, dtype=torch.float64 if "log" in k else None) for k, v in data["inputs"].items()}
    mask = inputs["completion_mask"][:, 1:].bool()
    # completion tokens first: a stable sort on "is no completion token"
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

    # TRL works in float32 for alpha_divergence and takes log(e) in float32 for exo_pair
    rtol = 2e-6 if f == "alpha_divergence" else 1e-7 if case.startswith("exo") else 1e-12
    torch.testing.assert_close(out.loss.item(), want["loss"], rtol=rtol, atol=0)
    torch.testing.assert_close(out.losses.mean(), out.loss)
    grad = torch.autograd.grad(out.loss, tokens)[0]
    # TRL's gradient is defined at prompt positions too
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


# ---- direct formulas ----


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def rows(data):
    """One tuple of Python floats per pair."""
    keys = [
        "chosen_logps",
        "rejected_logps",
        "ref_chosen_logps",
        "ref_rejected_logps",
        "chosen_lengths",
        "rejected_lengths",
    ]
    return list(zip(*(data[key].tolist() for key in keys if key in data), strict=True))


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


# ---- gradients and symmetries ----


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


# ---- extremes ----

# Losses at (dw, dl) = (-M, M) and (M, -M) with beta 0.1, lengths 10, reference -2M
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
    # the square of exp(60) and more lies outside float32
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


# ---- sums of token log-probs ----


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


# ---- options ----


def test_table():
    assert list(LOSSES) == LOSS_NAMES
    assert {name for name in LOSSES if LossOptions(name).reference_free} == REFERENCE_FREE
    assert {name for name, row in LOSSES.items() if row.over_batch} == OVER_BATCH
    assert {name for name, row in LOSSES.items() if row.label_smoothing} == set(SMOOTHED)
    assert {name for name, row in LOSSES.items() if row.f_divergence} == {*F_LOSSES, "sft"}
    assert {n for n, row in LOSSES.items() if row.needs_lengths} == {"ipo", "sigmoid_norm", *REFERENCE_FREE}
    assert LossOptions(["sft", "simpo"]).reference_free
    assert not LossOptions(["sft", "sigmoid"]).reference_free


def test_valid_options():
    assert LossOptions().check().names == ["sigmoid"]
    mpo = ["sigmoid", "bco_pair", "sft"]
    assert LossOptions(mpo, loss_weights=[0.8, 0.2, 1]).check().weights == [0.8, 0.2, 1.0]
    assert LossOptions(mpo, label_smoothing=0.1).check().weights == [1.0] * 3
    assert LossOptions(["ipo", "sft"], f_divergence_type="forward_kl").check().names == ["ipo", "sft"]
    assert LossOptions("ipo").check(ld_alpha=0.5, pair_weights=True).weights == [1.0]


REFUSED_OPTIONS = [
    ("loss_type", {"loss_type": "dpo"}),
    ("loss_type", {"loss_type": []}),
    ("loss_type", {"loss_type": ["sigmoid", "kto_pair"]}),
    ("loss_weights", {"loss_weights": [1.0, 2.0]}),
    ("loss_weights", {"loss_type": ["sigmoid", "ipo"], "loss_weights": [1.0]}),
    ("loss_weights", {"loss_weights": [math.nan]}),
    ("beta", {"beta": 0.0}),
    ("beta", {"beta": -0.1}),
    ("beta", {"beta": math.nan}),
    ("beta", {"beta": math.inf}),
    ("label_smoothing", {"label_smoothing": -0.1}),
    ("label_smoothing", {"label_smoothing": 1.1}),
    ("label_smoothing", {"loss_type": "robust", "label_smoothing": 0.5}),
    ("label_smoothing", {"loss_type": "exo_pair"}),
    ("label_smoothing", {"loss_type": "exo_pair", "label_smoothing": 1.0}),
    ("label_smoothing", {"loss_type": ["sigmoid", "robust"], "label_smoothing": 0.6}),
    *[("label_smoothing", {"loss_type": n, "label_smoothing": 0.1}) for n in LOSS_NAMES if n not in SMOOTHED],
    ("discopop_tau", {"discopop_tau": 0.1}),
    ("discopop_tau", {"loss_type": "discopop", "discopop_tau": 0.0}),
    ("simpo_gamma", {"simpo_gamma": 1.0}),
    ("simpo_gamma", {"loss_type": "simpo", "simpo_gamma": -1.0}),
    ("f_divergence_type", {"f_divergence_type": "kl"}),
    ("f_divergence_type", {"loss_type": "sft", "f_divergence_type": "js_divergence"}),
    ("f_divergence_type", {"loss_type": ["sigmoid", "bco_pair"], "f_divergence_type": "js_divergence"}),
    *[
        ("f_divergence_type", {"loss_type": n, "f_divergence_type": "js_divergence"})
        for n in LOSS_NAMES
        if n not in F_LOSSES
    ],
    ("f_alpha_divergence_coef", {"f_alpha_divergence_coef": 0.7}),
    ("f_alpha_divergence_coef", {"f_divergence_type": "forward_kl", "f_alpha_divergence_coef": 0.7}),
    ("f_alpha_divergence_coef", {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": math.nan}),
]


@pytest.mark.parametrize(("argument", "given"), REFUSED_OPTIONS)
def test_refused_options(argument, given):
    with pytest.raises(ValueError, match=rf"^{argument} is "):
        LossOptions(**given).check()
    data = {k: v for k, v in batch("sigmoid").items() if not k.startswith("ref_")}
    with pytest.raises(ValueError, match=rf"^{argument} is "):
        preference_loss(**data, **given)


@pytest.mark.parametrize("name", ["sft", "orpo", "aot", "aot_unpaired"])
def test_refused_pair_weights(name):
    with pytest.raises(ValueError, match=r"^pair_weights cannot"):
        LossOptions(["sigmoid", name]).check(pair_weights=True)
    with pytest.raises(ValueError, match=r"^pair_weights cannot"):
        preference_loss(**batch(name), loss_type=name, pair_weights=torch.ones(6))


@pytest.mark.parametrize(("name", "ld_alpha"), [("sft", 0.5), ("orpo", 0.5), ("sigmoid", -0.1), ("sigmoid", 1.1)])
def test_refused_ld_alpha(name, ld_alpha):
    with pytest.raises(ValueError, match=r"^ld_alpha is"):
        LossOptions(name).check(ld_alpha=ld_alpha)


def test_refused_ld_alpha_of_sums():
    tokens, n = torch.zeros(2, 3), torch.tensor([3, 2])
    with pytest.raises(ValueError, match=r"^partner_lengths is None"):
        sum_logps(tokens, n, ld_alpha=0.5)
    with pytest.raises(ValueError, match=r"^ld_alpha is 2"):
        sum_logps(tokens, n, partner_lengths=n, ld_alpha=2)


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("sigmoid", {"rejected_logps": torch.zeros(5)}, "^rejected_logps is no"),
        ("sigmoid", {"chosen_logps": torch.zeros(6, 1)}, "^chosen_logps is no"),
        ("sigmoid", {"chosen_logps": torch.zeros(0)}, "^chosen_logps is no"),
        ("sigmoid", {"ref_chosen_logps": torch.zeros(6, 1)}, "^ref_chosen_logps is no"),
        ("sigmoid", {"ref_rejected_logps": torch.zeros(1)}, "^ref_rejected_logps is no"),
        ("ipo", {"chosen_lengths": torch.ones(1)}, "^chosen_lengths is no"),
        ("ipo", {"rejected_lengths": torch.ones(1)}, "^rejected_lengths is no"),
        ("sigmoid", {"pair_weights": torch.ones(1)}, "^pair_weights is no"),
        ("sigmoid", {"ref_chosen_logps": None}, "ref_chosen_logps .* one is None"),
        ("sigmoid", {"ref_rejected_logps": None}, "ref_rejected_logps one is None"),
        *[
            (n, {"ref_chosen_logps": torch.zeros(6), "ref_rejected_logps": torch.zeros(6)}, "no ref_chosen_logps")
            for n in sorted(REFERENCE_FREE)
        ],
        *[(n, {"chosen_lengths": None}, "needs chosen_lengths") for n in ("ipo", "sigmoid_norm", "simpo", "orpo")],
        *[(n, {"rejected_lengths": None}, "needs rejected_lengths") for n in ("ipo", "sigmoid_norm", "simpo", "orpo")],
        ("sft", {"chosen_lengths": None}, "needs mean_chosen_length: .*chosen_lengths"),
        ("sft", {"mean_chosen_length": 0.0}, "^mean_chosen_length is 0"),
    ],
)
def test_refused_data(name, changed, message):
    with pytest.raises(ValueError, match=message):
        preference_loss(**batch(name) | changed, **options(name))


def test_lengths_are_data():
    """Lengths that no loss reads are taken in silence, and sft makes do with the mean length."""
    data = batch("sft")
    want = preference_loss(**data, loss_type="sft").losses
    mean = data.pop("chosen_lengths").double().mean()
    del data["rejected_lengths"]
    torch.testing.assert_close(preference_loss(**data, loss_type="sft", mean_chosen_length=mean).losses, want)
    preference_loss(**batch("sigmoid"), mean_chosen_length=mean)


def test_one_graph_without_a_host_read():
    """torch.compile captures the whole function: nothing in it reads a tensor's value."""
    data = batch("sigmoid")
    loss_types = ["sigmoid", "ipo", "discopop", "sft"]
    compiled = torch.compile(
        lambda: preference_loss(**data, loss_type=loss_types).losses, fullgraph=True, backend="eager"
    )
    torch.testing.assert_close(compiled(), preference_loss(**data, loss_type=loss_types).losses)

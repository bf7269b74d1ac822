"""The table of losses, the options that each of them takes, and every refusal of options and data."""

import math

import pytest
import torch
from loss_tools import F_LOSSES, LOSS_NAMES, OVER_BATCH, REFERENCE_FREE, SMOOTHED, batch, options

from dpo_fast.loss_table import LOSSES
from dpo_fast.losses import LossOptions, preference_loss


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

"""The column p_chosen, from the rows to the weights after a step: label smoothing or weight of each pair, or nothing."""

import copy

import pytest
import torch

pytest.importorskip("transformers")

import tiny
from trainer_tools import LR, config, train, weights

from dpo_fast import DPOTrainer

LS = torch.nn.functional.logsigmoid
CHANCES = [1.0, 0.9, 0.5, 0.75, 0.6, 0.95, 0.8, 0.7]


def rows():
    return [{**row, "p_chosen": p} for row, p in zip(tiny.pairs(8), CHANCES, strict=True)]


def expected_weights(model, ref, what, beta=0.1):
    """Weights after one SGD step on the mean over pairs of conservative DPO with e = 1 - p, or of p times DPO."""
    model, pairs = copy.deepcopy(model), tiny.pairs(8)
    with torch.no_grad():
        ref_chosen, ref_rejected = tiny.pair_logps(ref, pairs)
    chosen, rejected = tiny.pair_logps(model, pairs)
    x, p = beta * (chosen - ref_chosen - rejected + ref_rejected), torch.tensor(CHANCES, dtype=torch.float64)
    losses = {
        "smoothing": -p * LS(x) - (1 - p) * LS(-x),
        "weight": -p * LS(x),
        "ignore": -LS(x),
    }[what]
    losses.mean().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= LR * parameter.grad
    return weights(model), losses.mean().item()


@pytest.mark.parametrize("precompute", [True, False])
@pytest.mark.parametrize("given", [None, "smoothing", "weight", "ignore"])
def test_a_step(tmp_path, given, precompute):
    model, ref = tiny.llama(), tiny.llama(seed=1)
    expected, loss = expected_weights(model, ref, given or "smoothing")
    options = {} if given is None else {"label_noise": given}
    trainer = train(
        tmp_path, model, rows(), trainer_options={"ref_model": ref}, precompute_ref_log_probs=precompute,
        per_device_train_batch_size=3, gradient_accumulation_steps=3, max_tokens_per_batch=60, **options,
    )  # fmt: skip
    moved = (expected - weights(tiny.llama())).norm()
    assert (weights(trainer.model) - expected).norm() < 1e-6 * moved  # reference log-probs travel in float32
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss, rel=1e-6)


def missing(rows):
    rows[3].pop("p_chosen")
    return rows


REFUSALS = [
    ({"loss_type": ["hinge"]}, rows, "label_smoothing per pair has no effect.*or set label_noise to weight or ignore"),
    ({"loss_type": ["aot"]}, rows, "compares quantiles.*or set label_noise to"),
    ({"loss_type": ["robust"]}, rows, r"a value of label_smoothing is 0\.5.*or set label_noise"),
    ({"label_smoothing": 0.1}, rows, "exclude each other"),
    ({"label_smoothing": 0.1, "label_noise": "smoothing"}, rows, "exclude each other"),
    ({"label_noise": "noise"}, rows, "is not one of smoothing, weight, ignore"),
    ({"label_noise": "weight", "loss_type": ["sigmoid", "sft"]}, rows, "pair_weights cannot weigh"),
    ({}, lambda: missing(rows()), "train row 3 has no p_chosen and others have one"),
    ({}, lambda: [{**rows()[0], "p_chosen": 1.2}], r"train row 0: p_chosen is 1\.2: give a number in \[0, 1\]"),
    ({}, lambda: [{**rows()[0], "p_chosen": "high"}], "p_chosen is 'high'"),
    ({"label_noise": "weight"}, lambda: tiny.pairs(4), "has no effect: no row of the data has a p_chosen"),
]


@pytest.mark.parametrize(("options", "data", "message"), REFUSALS)
def test_refusals(tmp_path, options, data, message):
    with pytest.raises(ValueError, match=message):
        DPOTrainer(tiny.llama(), args=config(tmp_path, **options), train_dataset=data())


@pytest.mark.parametrize("options", [{"loss_type": ["hinge"]}, {"label_smoothing": 0.1}])
def test_ignored_it_goes_with_every_loss(tmp_path, options):
    args = config(tmp_path, label_noise="ignore", **options)
    trainer = DPOTrainer(tiny.llama(), args=args, train_dataset=missing(rows()))
    assert "p_chosen" not in trainer.train_dataset[0]


def test_text_rows_keep_it():
    from dpo_fast.data.sources import normalise_rows

    found = normalise_rows([{"prompt": "a", "chosen": "b", "rejected": "c", "p_chosen": 0.7}])
    assert found.rows[0]["p_chosen"] == 0.7
    ranked = [{"prompt": "a", "completions": ["b", "c"], "ranks": [1, 2], "p_chosen": 0.7}]
    with pytest.raises(ValueError, match="this row ranks several completions"):
        normalise_rows(ranked)

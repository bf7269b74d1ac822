"""Evaluation: true means over pairs, rows that come after training, streams, and what a run decides by its metrics."""

import math

import pytest
import torch

pytest.importorskip("transformers")

import tiny
from trainer_tools import config, train

from dpo_fast import DPOTrainer
from dpo_fast.losses import preference_loss


def test_evaluation_is_a_true_mean_and_counts_every_pair_once(tmp_path):
    rows, start, ref = tiny.pairs(7, seed=3), tiny.llama(), tiny.llama(seed=1)
    args = config(tmp_path, per_device_eval_batch_size=3)
    trainer = DPOTrainer(start, ref, args, train_dataset=tiny.pairs(4), eval_dataset=rows)
    got = trainer.evaluate()
    with torch.no_grad():
        logps = [*tiny.pair_logps(start, rows), *tiny.pair_logps(ref, rows)]
    want = preference_loss(*logps)
    assert got["eval_loss"] == pytest.approx(want.loss.item(), rel=1e-6)
    margins = (want.chosen_rewards - want.rejected_rewards).mean().item()
    assert got["eval_rewards/margins"] == pytest.approx(margins, rel=1e-5)
    by_name = trainer.evaluate({"a": trainer.eval_dataset, "b": trainer.train_dataset})
    assert by_name["eval_a_loss"] == pytest.approx(want.loss.item(), rel=1e-6)
    assert "eval_b_loss" in by_name


def test_rows_given_to_evaluate_after_training_are_compared_with_the_start(tmp_path):
    """The start weights of a model with a name are loaded again, also by a resumed run that has no step left."""
    rows, start, folder = tiny.pairs(3, seed=5), tiny.llama(attention_dropout=0.1), str(tmp_path / "model")
    start.save_pretrained(folder)
    options = {"model_init_kwargs": {"dtype": "float64"}, "save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    trainer = train(tmp_path, folder, tiny.pairs(8), **options)
    with torch.no_grad():
        want = preference_loss(*tiny.pair_logps(trainer.model.eval(), rows), *tiny.pair_logps(start.eval(), rows)).loss
    assert abs(want - math.log(2)) > 1e-3
    assert trainer.evaluate(rows)["eval_loss"] == pytest.approx(want.item(), rel=1e-6)
    again = DPOTrainer(folder, args=config(tmp_path, **options), train_dataset=tiny.pairs(8))
    again.train(resume_from_checkpoint=True)
    assert again.evaluate(rows)["eval_loss"] == pytest.approx(want.item(), rel=1e-6)
    trainer.save_model(folder)
    with pytest.raises(ValueError, match="does not hold the weights that this run began with"):
        trainer.evaluate(tiny.pairs(2, seed=6))


def test_a_start_that_cannot_be_loaded_again_is_said_before_training(tmp_path, caplog):
    trainer = DPOTrainer(tiny.llama(), args=config(tmp_path), train_dataset=tiny.pairs(8))
    rows = tiny.pairs(2, seed=5)
    assert trainer.evaluate(rows)["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert "no name to load it from" not in caplog.text
    trainer.train()
    assert "no name to load it from again" in caplog.text
    with pytest.raises(ValueError, match="as eval_dataset at construction"):
        trainer.evaluate(rows)


def test_streamed_rows_are_evaluated_and_not_trained_on(tmp_path):
    """Evaluation reads all rows anyway; a schedule needs their number."""
    datasets = pytest.importorskip("datasets")
    rows = tiny.pairs(3, seed=3)
    stream = datasets.IterableDataset.from_generator(lambda: iter(rows))
    trainer = DPOTrainer(
        tiny.llama(), tiny.llama(seed=1), config(tmp_path), train_dataset=tiny.pairs(4), eval_dataset={"a": stream}
    )
    want = trainer.evaluate(rows)["eval_loss"]
    assert (
        trainer.evaluate(stream)["eval_loss"] == trainer.evaluate()["eval_a_loss"] == want != pytest.approx(math.log(2))
    )
    with pytest.raises(ValueError, match="train data is streamed"):
        DPOTrainer(tiny.llama(), args=config(tmp_path), train_dataset=stream)
    with pytest.raises(ValueError, match="`train_dataset` is required"):
        DPOTrainer(tiny.llama(), args=config(tmp_path))


def test_best_checkpoint_and_early_stopping(tmp_path):
    from transformers import EarlyStoppingCallback

    trainer = train(
        tmp_path, tiny.llama(), tiny.pairs(8), max_steps=6, eval_strategy="steps", eval_steps=1, save_strategy="steps",
        save_steps=1, load_best_model_at_end=True, metric_for_best_model="eval_loss", learning_rate=1e-9,
        save_total_limit=2,
        trainer_options={"eval_dataset": tiny.pairs(4, seed=9), "callbacks": [EarlyStoppingCallback(2, 1.0)]},
    )  # fmt: skip
    assert trainer.state.global_step == 3  # nothing improves by 1.0, so it stops two evaluations after the first
    assert trainer.state.best_model_checkpoint is not None
    kept = sorted(p.name for p in (tmp_path / "run").glob("checkpoint-*"))
    assert len(kept) == 2


def test_pairs_without_a_reference_are_not_taken_for_a_uniform_one(tmp_path):
    from dpo_fast.data.pairs import PairDataset

    trainer = DPOTrainer(tiny.llama(), args=config(tmp_path), train_dataset=tiny.pairs(4))
    with pytest.raises(ValueError, match="no reference log-probs"):
        trainer.evaluate(PairDataset(tiny.pairs(2, seed=5)))

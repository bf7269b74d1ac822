"""Values that would waste a run are errors when the options are made; the output of a run is readable."""

import pytest

pytest.importorskip("transformers")

import tiny
from test_resume_agrees import options

from dpo_fast import DPOConfig, DPOTrainer
from dpo_fast.training.screen import log_line

WRONG = [
    ({"gradient_accumulation_steps": -1}, "gradient_accumulation_steps is -1: give a finite number at least 1"),
    ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps is 0"),
    ({"num_train_epochs": 0, "max_steps": -1}, "num_train_epochs is 0: nothing would be trained"),
    ({"num_train_epochs": float("nan"), "max_steps": -1}, "num_train_epochs is nan"),
    ({"max_steps": 0}, "max_steps is 0"),
    ({"max_steps": -5}, "max_steps is -5"),
    ({"learning_rate": 0}, "learning_rate is 0: give a finite number above 0"),
    ({"learning_rate": -1e-5}, "learning_rate is -1e-05"),
    ({"learning_rate": float("inf")}, "learning_rate is inf"),
    ({"weight_decay": -0.1}, "weight_decay is -0.1"),
    ({"max_grad_norm": -1.0}, "max_grad_norm is -1.0"),
    ({"max_grad_norm": float("nan")}, "max_grad_norm is nan"),
    ({"adam_beta1": 1.0}, "adam_beta1 is 1.0"),
    ({"save_steps": -2}, "save_steps is -2"),
    ({"save_steps": 0}, "save_steps is 0"),
    ({"logging_steps": -1}, "logging_steps is -1"),
    ({"eval_strategy": "steps", "eval_steps": -3}, "eval_steps is -3"),
    ({"save_total_limit": 0}, "save_total_limit is 0"),
    ({"per_device_train_batch_size": 0}, "per_device_train_batch_size is 0"),
    (
        {"load_best_model_at_end": True, "save_strategy": "no"},
        "load_best_model_at_end has no effect without evaluation",
    ),
    ({"save_strategy": "best", "metric_for_best_model": "loss"}, "save_strategy=best has no effect"),
    ({"metric_for_best_model": "accuracy"}, "'accuracy'.* one of .*rewards/accuracies"),
    ({"metric_for_best_model": "margin"}, "give rewards/margins"),
    ({"on_nan": "ignore"}, "on_nan is 'ignore': give stop or skip"),
    ({"on_nan": "skip", "fp16": True, "bf16": False}, "on_nan=skip has no effect with fp16"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[f"{i}-{next(iter(c))}" for i, (c, _) in enumerate(WRONG)])
def test_a_value_without_use_is_an_error(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message) as error:
        DPOConfig(**options(tmp_path, **changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"max_grad_norm": 0.0},
        {"save_steps": 0.5},
        {"warmup_steps": 0.1},
        {"max_steps": -1, "num_train_epochs": 0.25},
        {"eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "eval_helpful_rewards/margins"},
        {"remove_unused_columns": True},
    ],
)
def test_values_of_use_are_taken(tmp_path, changes):
    DPOConfig(**options(tmp_path, **changes))


def test_what_cannot_be_given_is_refused_by_name(tmp_path):
    args = DPOConfig(**options(tmp_path))
    for name in ("compute_metrics", "data_collator"):
        with pytest.raises(ValueError, match=name):
            DPOTrainer(tiny.llama(), args=args, train_dataset=tiny.pairs(4), **{name: object()})
    # TRL's own script hands on None as the 12th argument.
    DPOTrainer(tiny.llama(), None, args, None, tiny.pairs(4), None, None, None, None, (None, None), None, None)
    with pytest.raises(ValueError, match="nothing to train on"):
        DPOTrainer(tiny.llama(), args=args, eval_dataset=tiny.pairs(4)).train()


def test_a_log_is_one_line():
    logs = {
        "loss": 0.69314,
        "rewards/margins": 0.25,
        "rewards/accuracies": 0.5,
        "perf/tokens_per_second": 1234.5,
        "x": 1,
    }
    assert log_line(logs, 10, 100) == "step 10/100: loss 0.6931, margin 0.2500, accuracy 50.0%, tokens/s 1,234"
    evaluated = {"eval_a_loss": 0.5, "eval_a_rewards/margins": 1.0, "eval_a_runtime": 3.0}
    assert log_line(evaluated, 10, 100) == "step 10/100, eval_a: loss 0.5000, margin 1.0000"
    assert log_line({"train_loss": 0.5, "train_runtime": 3.0, "rewards/margins": 1.0}, 10, 100) is None
    assert log_line({"loss": 0.5, "aux_loss": 1.0}, 10, 100) == "step 10/100: loss 0.5000"


def test_the_steps_after_the_last_log_are_logged(tmp_path):
    """Three steps and a log every two, then a run shorter than logging_steps: every step is in one log."""
    args = DPOConfig(**options(tmp_path, max_steps=3, logging_steps=2, save_strategy="no"))
    run = DPOTrainer(tiny.llama(), args=args, train_dataset=tiny.pairs(16))
    run.train()
    assert [row["step"] for row in run.state.log_history if "rewards/margins" in row] == [2, 3]
    args = DPOConfig(**options(tmp_path, max_steps=2, logging_steps=500, save_strategy="no"))
    run = DPOTrainer(tiny.llama(), args=args, train_dataset=tiny.pairs(16), eval_dataset=tiny.pairs(4, seed=2))
    assert run.evaluate()["eval_num_tokens"] == 0
    run.train()
    (row,) = [row for row in run.state.log_history if "rewards/margins" in row]
    assert row["num_tokens"] == run.evaluate()["eval_num_tokens"] > 0
    assert {"loss", "grad_norm", "learning_rate"} <= row.keys()


def test_rewards_of_sft_alone_are_beside_a_reference(tmp_path):
    """As in TRL: the loss takes none, the metrics do."""
    args = DPOConfig(**options(tmp_path, loss_type=["sft"], max_steps=1, save_strategy="no"))
    start, ref, rows = tiny.llama(), tiny.llama(seed=1), tiny.pairs(4)
    want = [
        0.1 * (a - b).mean().item()
        for a, b in zip(tiny.pair_logps(start, rows), tiny.pair_logps(ref, rows), strict=True)
    ]
    run = DPOTrainer(start, ref, args, train_dataset=rows)
    run.train()
    got = run.state.log_history[0]
    assert [got["rewards/chosen"], got["rewards/rejected"]] == pytest.approx(want, rel=1e-5)


def test_the_card_names_what_a_stranger_asks(tmp_path):
    args = DPOConfig(**options(tmp_path, save_strategy="no", beta=0.25))
    run = DPOTrainer(tiny.llama(), args=args, train_dataset=tiny.pairs(8), eval_dataset=tiny.pairs(2, seed=4))
    run.train()
    run.evaluate()
    run.save_model(tmp_path / "out")
    _, head, text = (tmp_path / "out/README.md").read_text().split("---\n", 2)
    yaml = pytest.importorskip("yaml")
    assert yaml.safe_load(head) == {
        "library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["dpo_fast", "dpo"],
    }  # fmt: skip
    for row in ("| beta | 0.25 |", "| pairs per step | 4 |", "| steps | 4 |", "| pairs | 8 |", "| eval_loss | "):
        assert row in text
    assert run.model.model_tags == ["dpo_fast", "dpo"]


def test_a_push_uploads_the_model_and_its_card(tmp_path, monkeypatch):
    """transformers' own code pushes; the hub is a stand-in that remembers what it was sent."""
    import transformers.trainer as module

    sent = []

    class Hub:
        def create_repo(self, name, **kwargs):
            return type("Repo", (), {"repo_id": f"someone/{name}"})()

        def upload_folder(self, **kwargs):
            from pathlib import Path

            sent.append((kwargs["repo_id"], {p.name for p in Path(kwargs["folder_path"]).iterdir()}))

    monkeypatch.setattr(module, "hf_api", lambda *_: Hub())
    args = DPOConfig(**options(tmp_path, save_strategy="no", hub_model_id="polite"))
    run = DPOTrainer(tiny.llama(), args=args, train_dataset=tiny.pairs(4))
    run.push_to_hub()
    ((name, files),) = sent
    monkeypatch.setattr(Hub, "upload_folder", lambda *_, **__: [][0])
    with pytest.raises(OSError, match=r"the model was not uploaded; it is in .*run \(IndexError"):
        run.push_to_hub()
    monkeypatch.setattr(Hub, "create_repo", lambda *_, **__: [][0])
    with pytest.raises(OSError, match=r"push_to_hub: polite cannot be made on the hub \(IndexError"):
        DPOTrainer(
            tiny.llama(),
            args=DPOConfig(**options(tmp_path, hub_model_id="polite", push_to_hub=True)),
            train_dataset=tiny.pairs(4),
        )
    assert name == "someone/polite"
    assert {"model.safetensors", "config.json", "README.md"} <= files


def test_tensorboard_writes_into_the_output_folder(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.chdir(tmp_path)
    args = DPOConfig(**options(tmp_path / "a", save_strategy="no", max_steps=1, report_to="tensorboard"))
    run = DPOTrainer(tiny.llama(), args=args, train_dataset=tiny.pairs(4), eval_dataset=tiny.pairs(4))
    run.evaluate()  # its log is the first
    run.train()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]
    assert list((tmp_path / "a/run").rglob("events.out.tfevents*"))


def test_tokens_saved_name_their_base(tmp_path):
    rows = tiny.pairs(4)
    args = DPOConfig(**options(tmp_path, max_steps=1, save_strategy="no", gradient_accumulation_steps=1))
    run = DPOTrainer(tiny.llama(), args=args, train_dataset=rows)
    (batch,) = run.get_batch_samples(iter(run.get_train_dataloader()), 1, "cpu")[0]
    picked = [rows[i] for part in batch["parts"] for i in part.index.tolist()]
    lengths = [len(r["prompt_ids"]) + len(r[side]) for r in picked for side in ("chosen_ids", "rejected_ids")]
    computed = sum(part.forest.rows for part in batch["parts"])
    totals = run.throughput.totals()
    assert totals["tokens_saved"] == pytest.approx(1 - computed / sum(lengths))
    assert totals["tokens_saved_of_padded"] == pytest.approx(1 - computed / (len(lengths) * max(lengths)))

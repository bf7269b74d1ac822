"""The trainer's gradient, metrics and reference, against float64 sums over single unshared sequences."""

import copy
import json
import math
import re

import pytest
import torch

pytest.importorskip("transformers")

import tiny

from dpo_fast import DPOConfig, DPOTrainer
from dpo_fast.losses import preference_loss

LR = 0.05


def config(folder, **changes) -> DPOConfig:
    defaults = {
        "output_dir": str(folder / "run"), "ref_cache_dir": str(folder / "ref"), "report_to": "none", "use_cpu": True,
        "bf16": False, "optim": "sgd", "learning_rate": LR, "lr_scheduler_type": "constant", "max_grad_norm": 0.0,
        "max_steps": 1, "logging_steps": 1, "save_strategy": "no", "per_device_train_batch_size": 8,
        "gradient_checkpointing": False, "disable_tqdm": True,
    }  # fmt: skip
    if changes.get("precompute_ref_log_probs") is False or changes.get("loss_type") in (["orpo"], ["simpo"]):
        del defaults["ref_cache_dir"]  # refused where it has no effect
    return DPOConfig(**{**defaults, **changes})


def train(folder, model, rows, *, trainer_options=None, **changes) -> DPOTrainer:
    trainer = DPOTrainer(model, args=config(folder, **changes), train_dataset=rows, **(trainer_options or {}))
    trainer.train()
    return trainer


def weights(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def expected_step(model, rows, ref=None, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights after one SGD step on the mean loss of all rows, and that loss, without any of dpo_fast's model code."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        ref_logps = (None, None) if ref is None else tiny.pair_logps(ref, rows)
    lengths = [torch.tensor([len(r[k]) for r in rows]) for k in ("chosen_ids", "rejected_ids")]
    chosen, rejected = tiny.pair_logps(model, rows)
    loss = preference_loss(
        chosen, rejected, *ref_logps, chosen_lengths=lengths[0], rejected_lengths=lengths[1], **options
    ).loss
    loss.backward()
    with torch.no_grad():
        for p in model.parameters():
            p -= LR * p.grad
    return weights(model), loss.detach()


# How eight pairs become one optimizer step.
SPLITS = {
    "one batch": {},
    "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    "uneven": {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 3},
    "split": {"max_tokens_per_batch": 60},
    "split and accumulated": {
        "max_tokens_per_batch": 60,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
    },
    "unshared": {"share": "none"},
    "prompt": {"share": "prompt"},
    "checkpointed": {"gradient_checkpointing": True},
}
LOSSES = {
    "sigmoid": {},
    "ipo": {"loss_type": ["ipo"]},
    "mpo": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "orpo": {"loss_type": ["orpo"]},
    "simpo": {"loss_type": ["simpo"]},
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("split", SPLITS)
def test_step_is_the_mean_gradient_however_the_batch_is_split(tmp_path, loss, split):
    rows, start = tiny.pairs(8), tiny.llama()
    ref = None if loss in ("orpo", "simpo") else tiny.llama(seed=1)
    want, want_loss = expected_step(start, rows, ref, **LOSSES[loss])
    options = {} if ref is None else {"trainer_options": {"ref_model": ref}}
    trainer = train(tmp_path, copy.deepcopy(start), rows, **LOSSES[loss], **SPLITS[split], **options)
    moved = (want - weights(start)).norm()
    assert (weights(trainer.model) - want).norm() < 1e-6 * moved  # reference log-probs travel in float32
    assert trainer.state.log_history[0]["loss"] == pytest.approx(want_loss.item(), rel=1e-6)


def test_splitting_really_splits(tmp_path):
    trainer = DPOTrainer(tiny.llama(), args=config(tmp_path, max_tokens_per_batch=60), train_dataset=tiny.pairs(8))
    parts = next(iter(trainer.get_train_dataloader()))["parts"]
    assert len(parts) > 2
    assert sum(p.pairs for p in parts) == 8
    assert max(p.forest.rows for p in parts) <= 60


@pytest.mark.parametrize("mode", ["cached", "online"])
def test_reference_modes_agree_and_start_at_ln_2(tmp_path, mode, caplog):
    rows = tiny.pairs(8)
    trainer = train(tmp_path, tiny.llama(dtype=torch.float32), rows, precompute_ref_log_probs=mode == "cached")
    assert trainer.setup.reference == {"cached": "cached", "online": "model"}[mode]
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert "differ before the first step" not in caplog.text
    assert (trainer.ref_model is None) == (mode == "cached")


def test_a_wrong_start_is_said(tmp_path, caplog, monkeypatch):
    from dpo_fast.training import trainer as module

    real = module.precompute
    monkeypatch.setattr(module, "precompute", lambda *args: real(*args) - [0.0, 0.5])
    train(tmp_path, tiny.llama(), tiny.pairs(4))
    assert "differ before the first step" in caplog.text


def test_metrics_are_true_means_with_trls_names(tmp_path):
    rows, start, ref = tiny.pairs(8), tiny.llama(), tiny.llama(seed=1)
    trainer = train(
        tmp_path, copy.deepcopy(start), rows, per_device_train_batch_size=3, gradient_accumulation_steps=3,
        trainer_options={"ref_model": ref},
    )  # fmt: skip
    logs = trainer.state.log_history[0]
    trl = {
        "loss", "grad_norm", "learning_rate", "entropy", "num_tokens", "logits/chosen", "logits/rejected",
        "logps/chosen", "logps/rejected", "rewards/chosen", "rewards/rejected", "rewards/accuracies",
        "rewards/margins", "mean_token_accuracy",
    }  # fmt: skip
    ours = {
        "perf/tokens_per_second",
        "perf/pairs_per_second",
        "perf/tokens_saved",
        "logps/chosen_delta",
        "perf/tokens_saved_of_padded",
    }
    assert set(logs) == trl | ours | {"epoch", "step"}
    with torch.no_grad():
        chosen, rejected = tiny.pair_logps(start, rows)
        ref_chosen, ref_rejected = tiny.pair_logps(ref, rows)
    margins = 0.1 * (chosen - ref_chosen - rejected + ref_rejected)
    entropy, top1, mean_logits, tokens = [], [], [], 0
    for r in rows:
        for side in ("chosen_ids", "rejected_ids"):
            ids = r["prompt_ids"] + r[side]
            tokens += len(ids)
            logits = start(input_ids=torch.tensor([ids])).logits[0, len(r["prompt_ids"]) - 1 : -1].detach()
            logps = logits.log_softmax(-1)
            entropy.append(-(logps.exp() * logps).sum(-1))
            if side == "chosen_ids":
                top1.append(logits.argmax(-1) == torch.tensor(r[side]))
                mean_logits.append(logits.mean(-1))
    want = {
        "logps/chosen": chosen.mean(), "logps/rejected": rejected.mean(), "rewards/margins": margins.mean(),
        "rewards/accuracies": (margins > 0).double().mean(), "rewards/chosen": 0.1 * (chosen - ref_chosen).mean(),
        "rewards/rejected": 0.1 * (rejected - ref_rejected).mean(), "entropy": torch.cat(entropy).mean(),
        "mean_token_accuracy": torch.cat(top1).double().mean(), "logits/chosen": torch.cat(mean_logits).mean(),
        "logps/chosen_delta": (chosen - ref_chosen).mean(),
    }  # fmt: skip
    for name, value in want.items():
        assert logs[name] == pytest.approx(value.item(), rel=1e-5, abs=1e-7), name
    assert logs["num_tokens"] == tokens
    assert 0 < logs["perf/tokens_saved"] < 1


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
    """Of a model with a name the start weights are loaded again, also by a resumed run that has no step left."""
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


def test_sync_ref_model_mixes_and_resumes(tmp_path):
    options = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.25, "ref_cache_dir": None}
    start, rows = tiny.llama(), tiny.pairs(8)
    trainer = train(tmp_path, copy.deepcopy(start), rows, max_steps=2, save_strategy="steps", save_steps=2, **options)
    want = 0.25 * weights(trainer.model) + 0.75 * weights(start)
    torch.testing.assert_close(weights(trainer.ref_model), want)
    again = DPOTrainer(copy.deepcopy(start), args=config(tmp_path, max_steps=3, **options), train_dataset=rows)
    again.train(resume_from_checkpoint=True)
    torch.testing.assert_close(weights(again.ref_model), want)


def test_lora_reference_is_the_base_model(tmp_path):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    rows = tiny.pairs(8)
    runs = {}
    for name, options in {"adapter": {"ref_cache_dir": None}, "cached": {"precompute_ref_log_probs": True}}.items():
        trainer = train(
            tmp_path / name, tiny.llama(), rows, max_steps=3, optim="adamw_torch", trainer_options={"peft_config": lora},
            **options,
        )  # fmt: skip
        assert trainer.setup.reference == name
        runs[name] = [r["loss"] for r in trainer.state.log_history if "loss" in r]
        assert runs[name][0] == pytest.approx(math.log(2), abs=1e-6)
        assert runs[name][2] < runs[name][0]
    assert runs["adapter"] == pytest.approx(runs["cached"], rel=1e-6)


@pytest.mark.parametrize("mode", ["online", "sync", "passed in"])
def test_a_second_model_computes_in_the_precision_of_the_policy(tmp_path, mode):
    """bf16: the policy's autocast is inside its wrapper, and the reference must not run in float32 beside it."""
    options = {"online": {"precompute_ref_log_probs": False}, "sync": {"sync_ref_model": True, "ref_cache_dir": None}}
    options["passed in"] = options["online"]
    model = tiny.llama(dtype=torch.float32)
    given = {"trainer_options": {"ref_model": copy.deepcopy(model)}} if mode == "passed in" else {}
    trainer = train(tmp_path, model, tiny.pairs(8), bf16=True, **options[mode], **given)
    logs = trainer.state.log_history[0]
    assert logs["rewards/margins"] == 0.0
    assert logs["rewards/chosen"] == 0.0


def trained_adapters(**options):
    """A PEFT model whose adapters are not zero, as supervised fine-tuning leaves them."""
    peft = pytest.importorskip("peft")
    options = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **options}
    model = peft.get_peft_model(tiny.llama(), peft.LoraConfig(r=4, **options)).double()
    for name, parameter in model.named_parameters():
        if "lora_B" in name or ".modules_to_save." in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head"]}, {"target_modules": ["q_proj", "lm_head"]}])
@pytest.mark.parametrize("mode", ["adapter", "cached"])
def test_trained_adapters_start_at_themselves(tmp_path, mode, options):
    """The reference is a frozen copy of the adapters as they come, in every step and for rows that come later."""
    rows, later, model = tiny.pairs(8), tiny.pairs(3, seed=7), trained_adapters(**options)
    with torch.no_grad():
        ref = tiny.pair_logps(model, rows), tiny.pair_logps(model, later)
        with model.disable_adapter():
            assert (tiny.pair_logps(model, rows)[0] - ref[0][0]).abs().max() > 0.05
    how = {"ref_cache_dir": None} if mode == "adapter" else {"precompute_ref_log_probs": True}
    trainer = train(tmp_path, model, rows, max_steps=3, **how)
    assert trainer.setup.reference == mode
    losses = [r["loss"] for r in trainer.state.log_history if "loss" in r]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[2] < losses[0]
    for data, logps in zip((rows, later), ref, strict=True):
        metrics = trainer.evaluate(data)
        with torch.no_grad():
            want = preference_loss(*tiny.pair_logps(model, data), *logps)
        assert metrics["eval_loss"] == pytest.approx(want.loss.item(), rel=1e-6)
    # The second of two runs starts at what the first has left.
    again = train(tmp_path / "again", model, rows, **how)
    assert again.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_the_gradient_of_trained_adapters_is_the_policys(tmp_path):
    rows, model = tiny.pairs(8), trained_adapters(target_modules=["q_proj", "lm_head"])
    with torch.no_grad():
        ref = tiny.pair_logps(model, rows)
    start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    loss = preference_loss(*tiny.pair_logps(model, rows), *ref).loss
    want = dict(zip(start, torch.autograd.grad(loss, [dict(model.named_parameters())[n] for n in start]), strict=True))
    trainer = train(tmp_path, model, rows, ref_cache_dir=None)
    now = dict(trainer.model.named_parameters())
    for name, before in start.items():
        error = (before - now[name]) / LR - want[name]
        assert error.norm() < 1e-6 * want[name].norm(), name  # a loss's log-probs are float32


def test_pissa_starts_at_itself(tmp_path):
    """Its factors are not zero at the start, and the base under them has lost what they hold."""
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa", task_type="CAUSAL_LM")
    trainer = train(
        tmp_path,
        tiny.llama(dtype=torch.float32),
        tiny.pairs(8),
        ref_cache_dir=None,
        trainer_options={"peft_config": lora},
    )
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_pairs_of_another_run_get_a_reference_of_their_own(tmp_path):
    first = DPOTrainer(tiny.llama(), args=config(tmp_path), train_dataset=tiny.pairs(8))
    trainer = train(tmp_path, tiny.llama(seed=1), first.train_dataset)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    train(tmp_path, tiny.llama(), first.train_dataset, loss_type=["simpo"])


def test_pairs_without_a_reference_are_not_taken_for_a_uniform_one(tmp_path):
    from dpo_fast.data.pairs import PairDataset

    trainer = DPOTrainer(tiny.llama(), args=config(tmp_path), train_dataset=tiny.pairs(4))
    with pytest.raises(ValueError, match="no reference log-probs"):
        trainer.evaluate(PairDataset(tiny.pairs(2, seed=5)))


def test_what_cannot_work_is_said_before_a_step(tmp_path):
    bad = [*tiny.pairs(2), {"prompt_ids": [3], "chosen_ids": [4], "rejected_ids": [tiny.VOCABULARY]}]
    with pytest.raises(ValueError, match="row 2 has a token id outside"):
        DPOTrainer(tiny.llama(), args=config(tmp_path), train_dataset=bad)
    with pytest.raises(ValueError, match="raise it to"):
        DPOTrainer(tiny.llama(), args=config(tmp_path, max_tokens_per_batch=5), train_dataset=tiny.pairs(4))


def test_a_cache_folder_of_a_run_that_computes_none_is_a_warning(tmp_path, caplog):
    """Where the default is not to precompute: a moving reference, and adapters in the API."""
    peft = pytest.importorskip("peft")
    adapters = {"peft_config": peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")}
    for changes, extra in (({"sync_ref_model": True}, {}), ({}, adapters)):
        caplog.clear()
        DPOTrainer(tiny.llama(), args=config(tmp_path, **changes), train_dataset=tiny.pairs(4), **extra)
        assert caplog.text.count("ref_cache_dir and precompute_ref_batch_size are not used") == 1


def test_adapters_that_are_no_weights_are_refused(tmp_path):
    peft = pytest.importorskip("peft")
    run_config = config(tmp_path, ref_cache_dir=None)
    for adapters, text in (
        (peft.LoraConfig(target_modules=["lm_head"], use_dora=True, task_type="CAUSAL_LM"), "on the head"),
        (peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"), "prompt_tuning is not supported"),
        (peft.PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"), "prefix_tuning is not supported"),
    ):
        options = {"args": run_config, "train_dataset": tiny.pairs(4)}
        with pytest.raises(ValueError, match=text):
            DPOTrainer(tiny.llama(), peft_config=adapters, **options)
        with pytest.raises(ValueError, match=text):
            DPOTrainer(peft.get_peft_model(tiny.llama(), adapters), **options)


def test_a_loss_without_reference_loads_none(tmp_path):
    trainer = train(tmp_path, tiny.llama(), tiny.pairs(8), loss_type=["simpo"])
    assert trainer.setup.reference == "none"
    assert trainer.ref_model is None
    assert not (tmp_path / "ref").exists()
    with pytest.raises(ValueError, match="takes no reference"):
        DPOTrainer(tiny.llama(), tiny.llama(), config(tmp_path, loss_type=["simpo"]), train_dataset=tiny.pairs(4))


@pytest.mark.parametrize("options", [{}, {"precompute_ref_log_probs": False}, {"loss_type": ["simpo"]}])
def test_the_head_is_computed_by_the_back_end_that_is_named(tmp_path, recorded, options):
    args = config(tmp_path, backend="recorded", **options)
    trainer = DPOTrainer(tiny.llama(), args=args, train_dataset=tiny.pairs(4))
    # Reference log-probs are scored by it too.
    assert recorded == ({"logps_fwd"} if trainer.setup.reference == "cached" else set())
    recorded.clear()
    trainer.train()
    assert recorded == ({"logps_fwd", "residual_"} if trainer.ref_model is not None else {"residual_"})


def test_no_back_end_is_used_that_was_not_named(tmp_path, recorded):
    train(tmp_path, tiny.llama(), tiny.pairs(4))
    assert not recorded


def test_a_missing_back_end_is_refused_at_once(tmp_path, missing):
    with pytest.raises(ValueError, match=re.escape(missing)):
        config(tmp_path, backend="missing")
    with pytest.raises(ValueError, match="backend is 'tritn': give one of csrc, triton, torch"):
        config(tmp_path, backend="tritn")


def test_same_run_as_trl(tmp_path):
    """Three AdamW steps in float32: losses, metrics and weights of TRL's own trainer."""
    trl = pytest.importorskip("trl")
    import datasets
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"t{i:02}": i for i in range(tiny.VOCABULARY)}, unk_token="t00"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t00", eos_token="t02", unk_token="t00")
    start, rows = tiny.llama(dtype=torch.float32), tiny.pairs(12)
    start.save_pretrained(tmp_path / "model")
    common = {
        "report_to": "none", "use_cpu": True, "bf16": False, "max_steps": 3, "logging_steps": 1, "learning_rate": 1e-3,
        "per_device_train_batch_size": 4, "save_strategy": "no", "disable_tqdm": True, "seed": 3,
    }  # fmt: skip
    theirs = trl.DPOTrainer(
        str(tmp_path / "model"), args=trl.DPOConfig(output_dir=str(tmp_path / "trl"), **common),
        train_dataset=_as_text(datasets, rows), processing_class=tokenizer,
    )  # fmt: skip
    theirs.train()
    ours = DPOTrainer(
        str(tmp_path / "model"), args=DPOConfig(output_dir=str(tmp_path / "ours"), ref_cache_dir=str(tmp_path / "c"), **common),
        train_dataset=rows, processing_class=tokenizer,
    )  # fmt: skip
    ours.train()
    for a, b in zip(ours.state.log_history[:3], theirs.state.log_history[:3], strict=True):
        for name in b:
            if name not in ("grad_norm", "epoch", "step"):
                assert a[name] == pytest.approx(b[name], rel=1e-3, abs=2e-5), name
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    moved = (weights(theirs.model) - weights(start)).norm()
    assert (weights(ours.model) - weights(theirs.model)).norm() < 2e-3 * moved


def _as_text(datasets, rows):
    """Rows as text of which TRL's tokenisation gives exactly the same ids (words are tokens; EOS is appended)."""
    for row in rows:
        row["chosen_ids"].append(2)
        row["rejected_ids"].append(2)

    def text(ids):
        return " ".join(f"t{i:02}" for i in ids)  # of one width: an EOS inside a word would split it

    return datasets.Dataset.from_list(
        [
            {
                "prompt": text(r["prompt_ids"]) + " ",
                "chosen": text(r["chosen_ids"]),
                "rejected": text(r["rejected_ids"]),
            }
            for r in rows
        ]
    )


def test_moe_auxiliary_loss_is_trained_and_logged(tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=tiny.VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=128,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, router_aux_loss_coef=0.5,
        )
    ).float()  # fmt: skip
    trainer = train(tmp_path, model, tiny.pairs(8))
    logs = trainer.state.log_history[0]
    assert logs["aux_loss"] > 0
    assert trainer.state.log_history[-1]["aux_loss"] == logs["aux_loss"]
    assert logs["loss"] == pytest.approx(math.log(2) + 0.5 * logs["aux_loss"], abs=1e-4)
    with pytest.raises(ValueError, match="auxiliary loss of a mixture"):
        DPOTrainer(model, args=config(tmp_path, max_tokens_per_batch=60), train_dataset=tiny.pairs(4))
    with pytest.raises(ValueError, match="router_aux_loss_coef"):
        DPOTrainer(tiny.llama(), args=config(tmp_path, router_aux_loss_coef=0.1), train_dataset=tiny.pairs(4))


def test_a_recurrent_model_that_is_not_from_transformers(tmp_path):
    from test_protocol import LSTM

    torch.manual_seed(0)
    model = LSTM().double()
    trainer = train(tmp_path, model, tiny.pairs(8), max_steps=4, learning_rate=0.5, save_strategy="steps", save_steps=2)
    losses = [r["loss"] for r in trainer.state.log_history if "loss" in r]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[-1] < losses[0]
    assert json.loads((tmp_path / "run/checkpoint-4/complete.json").read_text())["step"] == 4

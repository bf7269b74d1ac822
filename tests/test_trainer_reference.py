"""The reference of a run: cached or beside the policy, synchronised, or none; a run starts at ln 2."""

import copy
import math

import pytest
import torch

pytest.importorskip("transformers")

import tiny
from trainer_tools import config, train, weights

from dpo_fast import DPOTrainer


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


def test_sync_ref_model_mixes_and_resumes(tmp_path):
    options = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.25, "ref_cache_dir": None}
    start, rows = tiny.llama(), tiny.pairs(8)
    trainer = train(tmp_path, copy.deepcopy(start), rows, max_steps=2, save_strategy="steps", save_steps=2, **options)
    want = 0.25 * weights(trainer.model) + 0.75 * weights(start)
    torch.testing.assert_close(weights(trainer.ref_model), want)
    again = DPOTrainer(copy.deepcopy(start), args=config(tmp_path, max_steps=3, **options), train_dataset=rows)
    again.train(resume_from_checkpoint=True)
    torch.testing.assert_close(weights(again.ref_model), want)


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


def test_pairs_of_another_run_get_a_reference_of_their_own(tmp_path):
    first = DPOTrainer(tiny.llama(), args=config(tmp_path), train_dataset=tiny.pairs(8))
    trainer = train(tmp_path, tiny.llama(seed=1), first.train_dataset)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    train(tmp_path, tiny.llama(), first.train_dataset, loss_type=["simpo"])


def test_a_cache_folder_of_a_run_that_computes_none_is_a_warning(tmp_path, caplog):
    """Where the default is not to precompute: a moving reference, and adapters in the API."""
    peft = pytest.importorskip("peft")
    adapters = {"peft_config": peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")}
    for changes, extra in (({"sync_ref_model": True}, {}), ({}, adapters)):
        caplog.clear()
        DPOTrainer(tiny.llama(), args=config(tmp_path, **changes), train_dataset=tiny.pairs(4), **extra)
        assert caplog.text.count("ref_cache_dir and precompute_ref_batch_size are not used") == 1


def test_a_loss_without_reference_loads_none(tmp_path):
    trainer = train(tmp_path, tiny.llama(), tiny.pairs(8), loss_type=["simpo"])
    assert trainer.setup.reference == "none"
    assert trainer.ref_model is None
    assert not (tmp_path / "ref").exists()
    with pytest.raises(ValueError, match="takes no reference"):
        DPOTrainer(tiny.llama(), tiny.llama(), config(tmp_path, loss_type=["simpo"]), train_dataset=tiny.pairs(4))

"""Training of adapters: their reference is the base model, or a frozen copy of adapters that come trained."""

import math

import pytest
import torch

pytest.importorskip("transformers")

import tiny
from trainer_tools import LR, config, train

from dpo_fast import DPOTrainer
from dpo_fast.losses import preference_loss


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

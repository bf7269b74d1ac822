"""`use_liger_kernel`: which of Liger's kernels a trunk gets. They need a GPU; here their place in the model is checked."""

import inspect

import pytest
import tiny
import torch

pytest.importorskip("transformers")

from dpo_fast import DPOConfig, DPOTrainer
from dpo_fast.training import unused
from dpo_fast.training.config import LIGER_HEADS

liger = pytest.importorskip("liger_kernel.transformers", reason="pip install liger-kernel")

TINY = {"report_to": "none", "bf16": False, "max_steps": 1, "save_strategy": "no", "disable_tqdm": True}


@pytest.fixture
def gpu(monkeypatch):
    """Options are read as if there were a GPU."""
    monkeypatch.setattr(unused, "_has_gpu", lambda values: True)


def options(folder, **changes) -> DPOConfig:
    folders = {"output_dir": str(folder / "out"), "ref_cache_dir": str(folder / "cache")}
    return DPOConfig(**folders, **TINY, use_cpu=True, use_liger_kernel=True, **changes)


def test_the_trunk_gets_them_and_the_head_does_not(tmp_path, gpu, monkeypatch):
    """Which switches Liger's own function is called with, before the comparison with the unshared pass."""
    calls = []
    monkeypatch.setattr(liger, "_apply_liger_kernel_to_instance", lambda model, **switches: calls.append(switches))
    monkeypatch.setattr(DPOTrainer, "_verify", lambda self: calls.append("verify"))
    args = options(tmp_path, liger_kernel_config={"rms_norm": True})
    trainer = DPOTrainer(tiny.llama(dtype=torch.float32), args=args, train_dataset=tiny.pairs(4))
    trainer.train()
    assert calls[:2] == [{"rms_norm": True, "cross_entropy": False, "fused_linear_cross_entropy": False}, "verify"]
    known = inspect.signature(liger.apply_liger_kernel_to_llama).parameters
    assert set(LIGER_HEADS) | {"rope", "rms_norm", "swiglu"} <= set(known)


def test_the_heads_are_left_off_in_words(tmp_path, gpu, caplog):
    args = options(tmp_path, liger_kernel_config={"fused_linear_cross_entropy": True})
    assert args.liger_kernel_config == {"fused_linear_cross_entropy": False, "cross_entropy": False}
    assert "fused_linear_cross_entropy is left off" in caplog.text


def test_on_a_cpu_it_is_not_used(tmp_path, caplog):
    assert not options(tmp_path).use_liger_kernel
    assert "use_liger_kernel (Liger's kernels need a GPU)" in caplog.text


def test_without_liger(tmp_path, gpu, monkeypatch):
    from dpo_fast.training import config

    monkeypatch.setattr(config, "is_liger_kernel_available", lambda: False)
    with pytest.raises(ImportError, match="pip install liger-kernel"):
        options(tmp_path)


@pytest.mark.gpu
def test_a_step_on_a_gpu(tmp_path):
    """The same loss as with the model's own functions."""
    losses = []
    for liger_on in (False, True):
        args = DPOConfig(
            output_dir=str(tmp_path / str(liger_on)), ref_cache_dir=str(tmp_path / "cache"), **TINY, logging_steps=1,
            use_liger_kernel=liger_on, loss_type=["sigmoid", "sft"], dataloader_num_workers=0,
        )  # fmt: skip
        model = tiny.llama(dtype=torch.float32, hidden_size=64, intermediate_size=128)
        trainer = DPOTrainer(model, args=args, train_dataset=tiny.pairs(4))
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)

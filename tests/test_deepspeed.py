"""DeepSpeed: ZeRO-2 on two gloo processes is one process; ZeRO-3 is refused with what to use instead."""

import importlib.util

import pytest
import torch

pytest.importorskip("transformers")

import tiny
from test_distributed import spec, start
from test_resume import history, options, same_weights

from dpo_fast import DPOConfig, DPOTrainer
from dpo_fast.training import run_setup

ZERO2 = {
    "zero_optimization": {"stage": 2, "overlap_comm": False, "contiguous_gradients": True},
    "communication_data_type": "fp32",
    "zero_force_ds_cpu_optimizer": False,
    "zero_allow_untested_optimizer": True,
    **dict.fromkeys(
        ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
        "auto",
    ),
}


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="pip install deepspeed")
def test_zero2_on_two_processes_is_one(tmp_path):
    """Full fine-tuning with gradient accumulation, in float32, which is what DeepSpeed keeps; and resumed from its checkpoint."""
    tiny.llama(dtype=torch.float32).save_pretrained(tmp_path / "model")
    start(1, spec(tmp_path, "one", 1, dtype="float32"))
    halves = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    zero = {"dtype": "float32", "deepspeed": ZERO2, "ddp_backend": "gloo", **halves}
    start(2, spec(tmp_path, "two", 2, save_strategy="steps", save_steps=2, **zero))
    start(2, spec(tmp_path, "two_again", 2, resume=str(tmp_path / "two_run/checkpoint-2"), **zero))
    for got, want in zip(history(tmp_path, "two"), history(tmp_path, "one"), strict=True):
        for key in ("loss", "grad_norm", "logps/chosen", "rewards/margins"):
            if key in want:
                assert got[key] == pytest.approx(want[key], rel=1e-4, abs=1e-5), key
    got, want = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("two", "one"))
    begin = dict(tiny.llama(dtype=torch.float32).named_parameters())
    for key, value in begin.items():
        assert (got[key] - want[key]).norm() <= 1e-2 * (want[key] - value).norm(), key
    assert same_weights(tmp_path, "two_again", "two")


def test_zero3_is_refused_with_what_to_use_instead(tmp_path, monkeypatch):
    monkeypatch.setattr(run_setup, "is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match=r"ZeRO-3 .*fsdp_config=\{'version': 2, .*scale\.md.* ZeRO-2 are supported"):
        DPOTrainer(tiny.llama(), args=DPOConfig(**options(tmp_path / "run")), train_dataset=tiny.pairs(4))

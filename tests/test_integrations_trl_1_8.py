"""TRL 1.8 and 1.9, which Axolotl pins: their own DPOTrainer with our log-probs, and Liger's loss under use_liger_kernel.

TRL 1.16 is what the other tests need, so these run where an older one is installed: pip install trl==1.9.0
"""

from importlib.metadata import PackageNotFoundError, version

import pytest
import torch

try:
    OLD = version("trl").split(".")[:2] in (["1", "8"], ["1", "9"])
except PackageNotFoundError:
    OLD = False
if not OLD:
    pytest.skip("these need TRL 1.8 or 1.9: pip install trl==1.9.0", allow_module_level=True)

import trl
from trl_runs import compare, run

from dpo_fast.integrations import liger
from dpo_fast.integrations.trl import patch_trl, selective_log_softmax

CASES = {
    "sigmoid": {},
    "ipo": {"loss_type": ["ipo"]},
    "LoRA": {"peft": True, "learning_rate": 1e-1},
}


@pytest.mark.parametrize("case", CASES)
def test_patched_trl_trains_as_trl(tmp_path, case):
    theirs = run(tmp_path / "theirs", trl.DPOTrainer, **CASES[case])
    undo = patch_trl()
    try:
        assert trl.trainer.dpo_trainer.selective_log_softmax is selective_log_softmax
        mine = run(tmp_path / "ours", trl.DPOTrainer, **CASES[case])
    finally:
        undo()
    assert trl.trainer.dpo_trainer.selective_log_softmax is not selective_log_softmax
    compare(mine, theirs, 1e-5)


def test_liger_s_loss_is_ours_too():
    """The trainer with use_liger_kernel needs a GPU for Liger's other kernels; its loss is compared in another file."""
    pytest.importorskip("liger_kernel", reason="pip install liger-kernel")
    undo = patch_trl()
    assert trl.trainer.dpo_trainer.LigerFusedLinearDPOLoss is liger.LigerFusedLinearDPOLoss
    undo()
    assert trl.trainer.dpo_trainer.LigerFusedLinearDPOLoss is not liger.LigerFusedLinearDPOLoss


def test_what_comes_back_may_be_written_into():
    logits = torch.randn(2, 3, 7, requires_grad=True)
    index = torch.randint(7, (2, 3))
    found = selective_log_softmax(logits, index)
    torch.testing.assert_close(found, logits.log_softmax(-1).gather(-1, index[..., None])[..., 0])
    found[index == index[0, 0]] = 0
    found.sum().backward()
    assert logits.grad[0, 0].abs().max() == 0

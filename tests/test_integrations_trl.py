"""TRL's own DPOTrainer with and without our head, and our trainer in its place: losses, metrics, gradient norms, weights."""

import copy

import pytest
import torch

trl = pytest.importorskip("trl", minversion="1.16", reason="pip install trl==1.16.0")

import tiny  # noqa: E402
from transformers import Gemma2Config, Gemma2ForCausalLM  # noqa: E402
from trl.trainer import utils  # noqa: E402
from trl_runs import compare, options, rows, run, tokenizer  # noqa: E402

from dpo_fast.integrations import trl as ours  # noqa: E402


def gemma2():
    """Soft-capped logits; its attention is not capped, since transformers' sdpa would leave that out."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=tiny.VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, final_logit_softcapping=3.0, attn_logit_softcapping=None, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, initializer_range=0.3,
    )  # fmt: skip
    return Gemma2ForCausalLM(config)


CASES = {
    "sigmoid": {},
    "ipo": {"loss_type": ["ipo"]},
    "sft mixture": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
    # Its weights, products of probabilities, make the steps small.
    "WPO": {"use_weighting": True, "learning_rate": 1.0},
    "ld_alpha": {"ld_alpha": 0.4},
    "precomputed": {"precompute_ref_log_probs": True},
    "checkpointed": {"gradient_checkpointing": True},
    "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "soft-capped": {"model": gemma2},
    "LoRA": {"peft": True, "learning_rate": 1e-1},
}


@pytest.fixture
def patched():
    undo = ours.patch_trl()
    yield undo
    undo()


@pytest.mark.parametrize("case", CASES)
def test_patched_trl_trains_as_trl(tmp_path, case):
    """Twenty steps in float32: the patch changes how log-probs are computed, and nothing else.

    Steps of SGD, since AdamW divides by the gradient's own size: a rounding of a tiny gradient becomes a step of its own.
    """
    theirs = run(tmp_path / "theirs", trl.DPOTrainer, **CASES[case])
    undo = ours.patch_trl()
    try:
        mine = run(tmp_path / "ours", trl.DPOTrainer, **CASES[case])
    finally:
        undo()
    compare(mine, theirs, 1e-5)


def test_the_patch_is_used_and_undone(tmp_path, patched):
    original = trl.kernels.ChunkedLogProbFunction
    assert utils._ChunkedLogProbFunction is ours.ChunkedLogProbFunction
    assert ours.patch_trl() is patched
    patched()
    assert utils._ChunkedLogProbFunction is original
    again = ours.patch_trl()
    assert utils._ChunkedLogProbFunction is ours.ChunkedLogProbFunction
    again()
    assert utils._ChunkedLogProbFunction is original


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("bias", [True, False])
def test_the_function_itself(softcap, bias):
    """All five outputs and gradients of TRL's function, with temperature and scale."""
    rng = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 8, generator=rng).requires_grad_() for n in (13, 50))
    shift = torch.randn(50, generator=rng).requires_grad_() if bias else None
    targets = torch.randint(50, (13,), generator=rng)
    arguments = hidden, weight, shift, targets, 0.7, 16, softcap, 1.3
    mine, theirs = (f.apply(*arguments) for f in (ours.ChunkedLogProbFunction, trl.kernels.ChunkedLogProbFunction))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=1e-4, atol=1e-5)
    leaves = [x for x in (hidden, weight, shift) if x is not None]
    grad = torch.randn(13, generator=rng)
    for a, b in zip(*(torch.autograd.grad(f[0], leaves, grad) for f in (mine, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert ours.ChunkedLogProbFunction.apply(*arguments, ())[1:] == (None,) * 4


def test_an_entropy_in_a_loss_is_told():
    hidden, weight = (torch.randn(n, 8).requires_grad_() for n in (5, 20))
    found = ours.ChunkedLogProbFunction.apply(hidden, weight, None, torch.arange(5), 1.0, 16)
    (found[0].sum() + 0.0 * found[2].sum()).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="entropy has no gradient under patch_trl"):
        found[1].sum().backward()


def test_our_trainer_takes_trl_s_config(tmp_path):
    """TRL's script passes twelve arguments by position, a trl.DPOConfig among them."""
    torch.manual_seed(0)
    theirs = run(tmp_path / "theirs", trl.DPOTrainer, precompute_ref_log_probs=True)
    trainer = ours.DPOTrainer(
        tiny.llama(dtype=torch.float32), None, options(tmp_path / "ours"), None, rows(), None, tokenizer(), None, None,
        (None, None), None, None,
    )  # fmt: skip
    trainer.train()
    for a, b in zip(trainer.state.log_history, theirs[0], strict=True):
        for name in ("loss", "grad_norm", "rewards/margins", "logps/chosen", "entropy", "logits/chosen"):
            if name in b:
                assert a[name] == pytest.approx(b[name], rel=1e-5, abs=1e-5), (a["step"], name)


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="quantization_config has no effect"):
        ours.DPOTrainer(tiny.llama(), None, options(tmp_path), train_dataset=rows(), quantization_config=object())
    args = copy.copy(options(tmp_path))
    args.foo = 1
    assert ours.as_config(args).beta == 0.1
    assert ours.as_config(None) is None
    weight = torch.nn.Parameter(torch.randn(5, 3))
    weight.ds_id = 1
    with pytest.raises(ValueError, match="ZeRO-3"):
        ours.ChunkedLogProbFunction.apply(torch.randn(2, 3), weight, None, torch.arange(2), 1.0, 16)

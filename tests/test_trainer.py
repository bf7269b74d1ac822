"""The trainer's gradient and metrics, against float64 sums over single unshared sequences and against TRL's own run."""

import copy
import json
import math
import re
import sys

import pytest
import torch

pytest.importorskip("transformers")

import tiny
from trainer_tools import LR, config, train, weights

from dpo_fast import DPOConfig, DPOTrainer
from dpo_fast.losses import preference_loss


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


def test_what_cannot_work_is_said_before_a_step(tmp_path):
    bad = [*tiny.pairs(2), {"prompt_ids": [3], "chosen_ids": [4], "rejected_ids": [tiny.VOCABULARY]}]
    with pytest.raises(ValueError, match="row 2 has a token id outside"):
        DPOTrainer(tiny.llama(), args=config(tmp_path), train_dataset=bad)
    with pytest.raises(ValueError, match="raise it to"):
        DPOTrainer(tiny.llama(), args=config(tmp_path, max_tokens_per_batch=5), train_dataset=tiny.pairs(4))


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
    # In the first step both rewards of a pair are 0, and rounding decides which is the larger one.
    assert ours.state.log_history[0]["rewards/margins"] == pytest.approx(0, abs=2e-5)
    left_out = {"grad_norm", "epoch", "step", "rewards/accuracies"}
    for a, b in zip(ours.state.log_history[:3], theirs.state.log_history[:3], strict=True):
        for name in b:
            if name not in left_out:
                assert a[name] == pytest.approx(b[name], rel=1e-3, abs=2e-5), name
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
        left_out.discard("rewards/accuracies")
    moved = (weights(theirs.model) - weights(start)).norm()
    assert (weights(ours.model) - weights(theirs.model)).norm() < 2e-3 * moved


def _as_text(datasets, rows):
    """Rows as text that TRL's tokenisation turns into exactly the same ids (words are tokens; EOS is appended)."""
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


def test_rows_with_ids_need_no_datasets(tmp_path, monkeypatch):
    """A machine may have transformers and no `datasets`."""
    rows = tiny.pairs(8)
    before = weights(train(tmp_path / "with", tiny.llama(), rows).model)
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert torch.equal(weights(train(tmp_path / "without", tiny.llama(), rows).model), before)

"""Tokens that both sides of a pair have leave the head's backward pass under a margin loss, and nothing else changes."""

import copy

import pytest
import torch

pytest.importorskip("transformers")

import tiny
from test_protocol import LSTM
from trainer_tools import config, weights

from dpo_fast import DPOTrainer, ops
from dpo_fast.forest import batch as collate
from dpo_fast.forest import gate, packing
from dpo_fast.forest.model import prepare_model
from dpo_fast.losses import preference_loss
from dpo_fast.training.trainer import Totals

MARGIN = {
    "sigmoid": {},
    "conservative": {"label_smoothing": 0.1},
    "hinge": {"loss_type": ["hinge"]},
    "exo_pair": {"loss_type": ["exo_pair"], "label_smoothing": 0.01},
    "robust": {"loss_type": ["robust"], "label_smoothing": 0.1},
    "discopop": {"loss_type": ["discopop"]},
    "aot": {"loss_type": ["aot"]},
    "two": {"loss_type": ["sigmoid", "hinge"], "loss_weights": [1.0, -0.3]},
    "ld": {"ld_alpha": 0.3},
    "wpo": {"use_weighting": True},
}
OTHER = {
    "ipo": {"loss_type": ["ipo"]},
    "sigmoid_norm": {"loss_type": ["sigmoid_norm"]},
    "nca_pair": {"loss_type": ["nca_pair"]},
    "apo_down": {"loss_type": ["apo_down"]},
    "with sft": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.1]},
    "js": {"f_divergence_type": "js_divergence"},
    "orpo": {"loss_type": ["orpo"]},
}
MODELS = {
    "llama": tiny.llama,
    "tied": lambda: tiny.llama(tie_word_embeddings=True),
    "frozen head": lambda: frozen_head(tiny.llama()),
    "recurrent": lambda: recurrent(),
}


def frozen_head(net):
    net.get_output_embeddings().requires_grad_(False)
    return net


def recurrent():
    torch.manual_seed(0)
    return LSTM().double()


def rows() -> list[dict]:
    """Eight pairs of few or many common tokens, three rankings of one prompt's completions, and a pair of equal sides."""
    begin, prompt = [7, 8, 9, 10, 11, 12], [5, 6, 7]
    a, b, c = [*begin, 20, 21, 22, 23], [*begin, 20, 21, 30], [*begin, 31, 32, 33, 34, 35]
    pairs = tiny.pairs(8)
    for row in pairs[:3]:
        row["chosen_ids"], row["rejected_ids"] = a[:8] + row["chosen_ids"], a[:8] + row["rejected_ids"]
    ranked = [{"prompt_ids": prompt, "chosen_ids": x, "rejected_ids": y} for x, y in ((a, b), (a, c), (b, c))]
    return [*pairs, *ranked, {"prompt_ids": [4, 4], "chosen_ids": [5, 6], "rejected_ids": [5, 6]}]


@pytest.fixture(autouse=True)
def any_number(monkeypatch):
    """However few rows cancel, they are left out."""
    monkeypatch.setattr(packing, "MIN_LEFT_OUT", 1)


@pytest.fixture
def calls(monkeypatch):
    """(rows, whether they take part in the backward pass) of every call of the head's op."""
    seen, op = [], ops.head._linear_token_logps

    def recorded(hidden, *args):
        seen.append((len(hidden), torch.is_grad_enabled() and hidden.requires_grad))
        out = op(hidden, *args)
        assert out[0].requires_grad == seen[-1][1]
        return out

    monkeypatch.setattr(ops.head, "_linear_token_logps", recorded)
    return seen


def trainer_of(tmp_path, net, data, **changes) -> DPOTrainer:
    ref = None if changes.get("loss_type") == ["orpo"] else tiny.llama(seed=1)
    return DPOTrainer(net, ref, config(tmp_path, **changes), train_dataset=data)


def outcome(trainer, margin: bool):
    """Loss, metrics and gradients of all pairs in one pass."""
    trainer.data_collator.margin = margin
    (part,) = trainer.data_collator(trainer.train_dataset.examples)["parts"]
    trainer.model.zero_grad()
    totals = Totals(1, 6.0)
    loss, outputs = trainer.compute_loss(trainer.model, {"parts": [part]}, True, totals)
    loss, table = loss * part.pairs, outputs["pair_table"]
    loss.backward()
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    return part.forest, loss.detach(), table, torch.cat([p.grad.flatten() for p in trained])


def both_ways(trainer, calls):
    """`outcome` with everything, then as the trainer does it; the forest and the head's calls of the second."""
    _, loss, table, grad = outcome(trainer, False)
    used = trainer.setup.loss_options.margin_only
    calls.clear()
    forest, left_loss, left_table, left_grad = outcome(trainer, used)
    # Sums of the same numbers in another order.
    torch.testing.assert_close(left_loss, loss, rtol=1e-14, atol=0)
    torch.testing.assert_close(left_table, table, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(left_grad, grad, rtol=0, atol=1e-12 * grad.abs().max().item())
    assert grad.abs().max() > 0
    return forest, list(calls)


@pytest.mark.parametrize("loss", MARGIN)
def test_gradients_are_those_of_all_rows(tmp_path, loss, calls):
    forest, seen = both_ways(trainer_of(tmp_path, tiny.llama(), rows(), **MARGIN[loss]), calls)
    # 3 pairs share 8 tokens, at least, all of a, b and c 6, and the last pair all of its 2.
    left_out = len(forest.targets) - forest.grad_items
    assert left_out >= 3 * 8 + 6 + 2
    assert seen == [(forest.grad_items, True), (left_out, False)]


@pytest.mark.parametrize("loss", OTHER)
def test_other_losses_keep_every_row(tmp_path, loss, calls):
    trainer = trainer_of(tmp_path, tiny.llama(), rows(), **OTHER[loss])
    assert not trainer.data_collator.margin
    forest, seen = both_ways(trainer, calls)
    assert seen == [(len(forest.targets), True)]
    # They would be wrong: what cancels under a margin loss has a gradient here.
    grad, wrong = outcome(trainer, False)[3], outcome(trainer, True)[3]
    assert (wrong - grad).norm() > 1e-3 * grad.norm()


@pytest.mark.parametrize("share", packing.SHARE_MODES)
@pytest.mark.parametrize("name", MODELS)
def test_models(tmp_path, name, share, calls):
    net = MODELS[name]()
    trainer = DPOTrainer(
        net, copy.deepcopy(net), config(tmp_path, share=share, use_weighting=True), train_dataset=rows()
    )
    forest, seen = both_ways(trainer, calls)
    assert (forest.grad_items < len(forest.targets)) == (share == "prefix")
    assert len(seen) == (2 if share == "prefix" else 1)


def test_a_padded_model_shares_nothing(tmp_path, calls, monkeypatch):
    monkeypatch.setattr(gate, "sharing_obstacle", lambda _: "the test says so")
    trainer = trainer_of(tmp_path, tiny.llama(), rows())
    assert trainer.setup.plan.path == "padded"
    forest, seen = both_ways(trainer, calls)
    assert seen == [(len(forest.targets), True)]


def test_adapters(tmp_path, calls):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    args = config(tmp_path, ref_cache_dir=None)
    trainer = DPOTrainer(tiny.llama(), args=args, train_dataset=rows(), peft_config=lora)
    forest, seen = both_ways(trainer, calls)
    # The reference, under switched-off adapters, is one call more.
    left_out = len(forest.targets) - forest.grad_items
    assert seen == [(forest.grad_items, True), (left_out, False), (len(forest.targets), False)]


def test_pairs_that_cancel_whole_have_gradients_of_zero(calls):
    same = [{"prompt_ids": [3, 4], "chosen_ids": [5, 6, 7], "rejected_ids": [5, 6, 7]}] * 2
    net = tiny.llama()
    prepare_model(net)
    calls.clear()
    part = collate.ForestCollator(margin=True).part(same)
    chosen, rejected = part.forest.gather_paths(net(forest=part.forest)["token_logps"]).sum(1).view(2, -1)
    preference_loss(chosen, rejected).loss.backward()
    assert calls == [(3, True)]
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2},
        {"max_tokens_per_batch": 60},
        {"max_tokens_per_batch": 60, "per_device_train_batch_size": 5, "gradient_accumulation_steps": 2},
        {"gradient_checkpointing": True},
        {"precompute_ref_log_probs": False},
    ],
    ids=["one batch", "accumulated", "split", "split and accumulated", "checkpointed", "second model"],
)
def test_runs_are_the_same(tmp_path, changes, calls):
    """Two steps of SGD and an evaluation, weights and logs; the second run keeps every row."""
    ends, logs, counts = [], [], []
    for name in ("left out", "whole"):
        options = {"max_steps": 2, "per_device_train_batch_size": 12, "seed": 3, **changes}
        trainer = DPOTrainer(
            tiny.llama(), tiny.llama(seed=1), config(tmp_path / name, **options), train_dataset=rows(),
            eval_dataset=rows(),
        )  # fmt: skip
        trainer.data_collator.margin = name == "left out"
        calls.clear()
        trainer.train()
        counts.append(sum(n for n, grad in calls if grad))
        calls.clear()
        logs.append([*trainer.state.log_history[:2], trainer.evaluate()])
        assert not any(grad for _, grad in calls)
        ends.append(weights(trainer.model))
    assert 0 < counts[0] <= counts[1] - 3 * 8
    moved = (ends[1] - weights(tiny.llama())).norm()
    assert (ends[0] - ends[1]).norm() < 1e-12 * moved
    for ours, theirs in zip(*logs, strict=True):
        for key in theirs:
            if not key.startswith(("perf/", "eval_runtime", "eval_samples", "eval_steps")):
                assert ours[key] == pytest.approx(theirs[key], rel=1e-10, abs=1e-12), key


def test_few_rows_stay(tmp_path, monkeypatch, calls):
    """A second pass over the head's weight would cost more than they save."""
    monkeypatch.undo()
    trainer = trainer_of(tmp_path, tiny.llama(), rows())
    assert trainer.data_collator.margin
    assert packing.MIN_LEFT_OUT == 64
    forest = trainer.data_collator(trainer.train_dataset.examples)["parts"][0].forest
    assert forest.grad_items == len(forest.targets)


def test_operations_that_are_not_computed_do_not_count(tmp_path):
    trainer = trainer_of(tmp_path, tiny.llama(), rows())
    (part,) = trainer.data_collator(trainer.train_dataset.examples)["parts"]
    head = trainer.model.lm_head.weight.numel()
    left_out = len(part.forest.targets) - part.forest.grad_items
    whole = trainer.setup.flops(part.forest.rows, len(part.forest.targets), len(part.forest.targets))
    assert trainer.floating_point_ops({"parts": [part]}) == whole - 4 * head * left_out

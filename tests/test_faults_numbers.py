"""Faults during a run: losses, gradients and weights that are not finite."""

import pytest
import torch

pytest.importorskip("transformers")

import tiny
from fault_tools import At, start
from transformers import TrainerCallback

from dpo_fast.training import checkpoint


def poison(model):
    with torch.no_grad():
        next(model.parameters())[5, 0] = float("nan")


def test_nan_weights_stop_the_run_and_name_step_and_checkpoint(tmp_path):
    run = start(tmp_path, At(3, poison), max_steps=8)
    with pytest.raises(ValueError, match=r"step 4: the loss of .* nan or inf.*whole checkpoint is .*checkpoint-2 "):
        run.train()
    assert run.state.global_step == 4
    assert [p.name for p in checkpoint.complete_checkpoints(tmp_path / "run")] == ["checkpoint-2"]


def test_the_pairs_of_a_bad_step_are_named(tmp_path, monkeypatch):
    """A token's embedding is nan: the pairs that hold it are named, by their place in the data."""
    rows = tiny.pairs(16)
    for i, row in enumerate(rows):  # a token that no other pair has
        row["chosen_ids"] = [t if t != 60 else 59 for t in row["chosen_ids"]] + ([60] * 2 if i == 11 else [])
        row["rejected_ids"] = [t if t != 60 else 59 for t in row["rejected_ids"]]
        row["prompt_ids"] = [t if t != 60 else 59 for t in row["prompt_ids"]]
    run = start(tmp_path, rows=rows, logging_steps=4, save_strategy="no", verify=False)
    with torch.no_grad():
        run.model.model.embed_tokens.weight[60] = float("nan")
    with pytest.raises(ValueError, match=r"step \d: the loss of pair 11 of the training data is nan or inf"):
        run.train()


def test_the_first_bad_step_between_two_logs_is_named(tmp_path):
    run = start(tmp_path, At(2, poison), max_steps=8, logging_steps=8, save_strategy="no")
    with pytest.raises(ValueError, match=r"^step 3: the loss of "):
        run.train()


def test_nan_weights_are_never_saved(tmp_path):
    """The last step destroys the weights: neither a checkpoint nor the model is written."""
    run = start(tmp_path, At(4, poison), logging_strategy="no")
    with pytest.raises(ValueError, match=r"weights hold nan or inf after step 4.*checkpoint-2"):
        run.train()
    assert [p.name for p in checkpoint.complete_checkpoints(tmp_path / "run")] == ["checkpoint-2"]
    with pytest.raises(ValueError, match="weights hold nan"):
        run.save_model(tmp_path / "model")
    assert not (tmp_path / "model").exists()


class Explode(TrainerCallback):
    """The gradient of the second step is nan, while its loss is fine."""

    handle = None

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 1:
            self.handle = next(model.parameters()).register_hook(lambda grad: grad * float("nan"))

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if self.handle is not None:
            self.handle.remove()


class LeaveOut(TrainerCallback):
    """No update in the second step."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == 1:
            for parameter in model.parameters():
                parameter.grad = None


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(
        ValueError, match=r"^step 2: the gradient's norm is nan, while the loss of every pair is finite"
    ):
        start(tmp_path, Explode(), save_strategy="no").train()


def test_skip_leaves_out_the_step_and_nothing_else(tmp_path, caplog):
    """The weights after four steps of which the second is bad are those of the other three."""
    run = start(tmp_path, Explode(), on_nan="skip", save_strategy="no")
    run.train()
    want = start(tmp_path, LeaveOut(), save_strategy="no")
    want.train()
    for a, b in zip(run.model.parameters(), want.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert "step 2 is left out: its gradient is nan or inf" in caplog.text


def test_skipping_without_end_is_an_error(tmp_path):
    def destroy(model):
        with torch.no_grad():
            model.lm_head.weight.fill_(float("nan"))

    with pytest.raises(ValueError, match="10 steps in a row were not finite"):
        start(tmp_path, At(1, destroy), on_nan="skip", save_strategy="no", max_steps=20).train()

"""Users of the trainer may rely on this: `compute_loss` is the hook, TRL's names exist, a run can be planned first."""

import pytest
import tiny
import torch

from dpo_fast import DPOConfig, DPOTrainer
from dpo_fast.training.run_setup import plan_run


def options(folder, **changes):
    fixed = {"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "logging_steps": 1}
    fixed |= {"gradient_checkpointing": False, "ref_cache_dir": str(folder / "cache"), "dataloader_pin_memory": False}
    fixed |= {"per_device_train_batch_size": 4, "max_steps": 2, "learning_rate": 1e-2, "disable_tqdm": True}
    return DPOConfig(output_dir=str(folder), **{**fixed, **changes})


class Penalised(DPOTrainer):
    """Adds the squared chosen rewards' distance from one: a term that has a gradient only through compute_loss."""

    calls = 0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        type(self).calls += 1
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        loss = loss + sum((p**2).sum() for p in model.parameters())
        return (loss, outputs) if return_outputs else loss


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def test_an_override_of_compute_loss_is_trained_logged_and_evaluated(tmp_path):
    rows = tiny.pairs(8)
    plain = DPOTrainer(tiny.llama(), args=options(tmp_path / "a"), train_dataset=rows, eval_dataset=rows[:3])
    own = Penalised(tiny.llama(), args=options(tmp_path / "b"), train_dataset=rows, eval_dataset=rows[:3])
    penalty = (weights(own) ** 2).sum().item()
    assert own.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"] + penalty, rel=1e-9)
    own.train()
    plain.train()
    first = [next(log for log in t.state.log_history if "loss" in log) for t in (plain, own)]
    assert first[1]["loss"] == pytest.approx(first[0]["loss"] + penalty, rel=1e-9)
    assert Penalised.calls >= 3
    assert (weights(own) ** 2).sum() < 0.999 * (weights(plain) ** 2).sum()


@pytest.mark.parametrize("split", [None, 60])
def test_compute_loss_by_hand_is_the_mean_over_the_pairs(tmp_path, split):
    """Of one pass and of several, with its gradient; the trainer's step multiplies what this returns."""
    rows = tiny.pairs(6)
    trainer = DPOTrainer(
        tiny.llama(), args=options(tmp_path, max_tokens_per_batch=split), train_dataset=rows, ref_model=tiny.llama(1)
    )
    inputs = trainer.data_collator(trainer.train_dataset.examples)
    assert (len(inputs["parts"]) > 1) == (split is not None)
    loss, outputs = trainer.compute_loss(trainer.model, inputs, return_outputs=True)
    chosen, rejected = tiny.pair_logps(trainer.model, rows)
    with torch.no_grad():
        ref_chosen, ref_rejected = tiny.pair_logps(tiny.llama(1), rows)
    want = -torch.nn.functional.logsigmoid(0.1 * ((chosen - ref_chosen) - (rejected - ref_rejected))).mean()
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=0)
    torch.testing.assert_close(trainer.compute_loss(trainer.model, inputs), loss, rtol=0, atol=0)
    torch.testing.assert_close(outputs["chosen_logps"], chosen.detach(), rtol=1e-9, atol=0)
    ours = torch.autograd.grad(loss, list(trainer.model.parameters()))
    theirs = torch.autograd.grad(want, list(trainer.model.parameters()))
    # A batch holds the reference in float32: 100 nats are rounded by 4e-6, which beta = 0.1 takes to the coefficients.
    size = max(g.abs().max().item() for g in theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6 * size)


def test_an_override_that_drops_the_outputs_is_told(tmp_path):
    class Dropped(DPOTrainer):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs)[0], {}

    trainer = Dropped(tiny.llama(), args=options(tmp_path), train_dataset=tiny.pairs(4))
    with pytest.raises(ValueError, match=r"compute_loss must return \(loss, outputs\)"):
        trainer.train()


def test_names_of_trl(tmp_path):
    rows = tiny.pairs(4)
    trainer = DPOTrainer(
        tiny.llama(), args=options(tmp_path, beta=0.3, loss_type=["sigmoid", "ipo"]), train_dataset=rows
    )
    assert (trainer.beta, trainer.loss_types, trainer.aux_loss_enabled) == (0.3, ["sigmoid", "ipo"], False)
    inputs = trainer.data_collator(rows)
    found = trainer.compute_ref_log_probs(trainer.model, inputs)
    for ours, theirs in zip(found, tiny.pair_logps(trainer.model, rows), strict=True):
        assert not ours.requires_grad
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-9, atol=0)
    cached = trainer.data_collator(trainer.train_dataset.examples)["parts"][0]
    torch.testing.assert_close(trainer.reference_logps(cached), torch.stack(found).float(), rtol=1e-6, atol=0)
    trainer.train()
    assert trainer.throughput.totals()["pairs_per_second"] > 0


def test_a_plan_reads_no_weight_and_is_what_the_trainer_takes(tmp_path):
    folder = tmp_path / "model"
    tiny.llama(dtype=torch.float32).save_pretrained(folder)
    (folder / "model.safetensors").rename(tmp_path / "moved")
    args = options(tmp_path)
    run = plan_run(str(folder), args)
    assert (run.vocab_size, run.reference, run.path.path) == (tiny.VOCABULARY, "cached", "shared")
    (tmp_path / "moved").rename(folder / "model.safetensors")
    trainer = DPOTrainer(run, args=args, train_dataset=tiny.pairs(4))
    trainer.train()
    assert trainer.state.global_step == 2

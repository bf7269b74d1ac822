"""A checkpoint is resumed by the run that wrote it: whatever differs is named, whatever is damaged is found."""

import json
import shutil

import pytest
import torch

pytest.importorskip("transformers")

import tiny

from dpo_fast import DPOConfig, DPOTrainer
from dpo_fast.training import checkpoint


def options(folder, **changes) -> dict:
    return {
        "output_dir": str(folder / "run"), "ref_cache_dir": str(folder / "ref"), "report_to": "none", "use_cpu": True,
        "bf16": False, "learning_rate": 1e-2, "max_steps": 4, "logging_steps": 1, "save_strategy": "steps",
        "save_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "disable_tqdm": True,
        "lr_scheduler_type": "cosine", "gradient_checkpointing": False, **changes,
    }  # fmt: skip


def trainer(folder, model=None, rows=None, **changes) -> DPOTrainer:
    args = DPOConfig(**options(folder, **changes))
    return DPOTrainer(model or tiny.llama(), args=args, train_dataset=rows or tiny.pairs(16))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of four steps with checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("trained")
    trainer(folder).train()
    return folder


@pytest.fixture
def folder(trained, tmp_path):
    """A copy of it that was interrupted after step 2."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "run/checkpoint-4")
    return tmp_path


def refused(run, match):
    before = [p.detach().clone() for p in run.model.parameters()]
    with pytest.raises(ValueError, match=match) as error:
        run.train(resume_from_checkpoint=True)
    assert "\n" not in str(error.value)
    assert run.state.global_step == 0
    assert all(torch.equal(a, b) for a, b in zip(before, run.model.parameters(), strict=True))


CHANGES = {
    "beta": {"beta": 0.2},
    "loss_type": {"loss_type": ["ipo"]},
    "label_smoothing": {"label_smoothing": 0.1},
    "ld_alpha": {"ld_alpha": 0.5},
    "seed": {"seed": 7},
    "learning_rate": {"learning_rate": 2e-2},
    "lr_scheduler_type": {"lr_scheduler_type": "linear"},
    "warmup_steps": {"warmup_steps": 1},
    "weight_decay": {"weight_decay": 0.1},
    "adam_beta2": {"adam_beta2": 0.9},
    "max_grad_norm": {"max_grad_norm": 0.5},
    "pairs_per_step": {"per_device_train_batch_size": 1},
    "max_steps": {"max_steps": 6},
    "optim": {"optim": "sgd"},
}


@pytest.mark.parametrize("name", CHANGES)
def test_an_option_that_differs_is_named(folder, name):
    refused(trainer(folder, **CHANGES[name]), rf"checkpoint-2 .*\b{name} .*was .*, is ")


def test_other_weights_and_other_pairs_are_named(folder):
    refused(trainer(folder, model=tiny.llama(seed=1)), r"another run: model differs.*--resume_changed model$")
    refused(trainer(folder, rows=tiny.pairs(16, seed=1)), r"train_dataset differs")
    refused(trainer(folder, rows=list(reversed(tiny.pairs(16)))), r"train_dataset differs")
    both = {"beta": 0.3, "seed": 5}
    refused(trainer(folder, rows=tiny.pairs(12), **both), r"beta was 0.1, is 0.3; seed .*; train_dataset differs")


def test_what_changes_no_number_may_differ(folder):
    """The same pairs per step otherwise cut, other logging and saving: the run goes on."""
    again = trainer(
        folder, per_device_train_batch_size=4, gradient_accumulation_steps=1, logging_steps=2, save_steps=4,
        max_tokens_per_batch=120,
    )  # fmt: skip
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4


def test_an_allowed_change_is_made(folder):
    again = trainer(folder, beta=0.2, learning_rate=3e-2, resume_changed=["beta", "learning_rate"])
    again.train(resume_from_checkpoint=True)
    rates = {row["step"]: row["learning_rate"] for row in again.state.log_history if "learning_rate" in row}
    # Cosine over four steps: half of the rate after two.
    assert rates[3] == pytest.approx(0.5 * 3e-2)
    marker = json.loads((folder / "run/checkpoint-4/complete.json").read_text())
    assert (marker["fingerprint"]["beta"], marker["fingerprint"]["learning_rate"]) == (0.2, 3e-2)


def test_more_steps_may_be_asked_for(folder):
    again = trainer(folder, max_steps=8, resume_changed=["max_steps"])
    again.train(resume_from_checkpoint=True)
    rates = {row["step"]: row["learning_rate"] for row in again.state.log_history if "learning_rate" in row}
    assert again.state.global_step == 8
    assert rates[3] == pytest.approx(1e-2 * (1 + 2**-0.5) / 2)  # a quarter of eight steps
    constant = {"lr_scheduler_type": "constant", "output_dir": str(folder / "constant")}
    trainer(folder, max_steps=2, **constant).train()
    longer = trainer(folder, max_steps=3, **constant)  # no schedule depends on it
    longer.train(resume_from_checkpoint=True)
    assert longer.state.global_step == 3


def test_resume_changed_names_what_did_change(folder):
    refused(trainer(folder, resume_changed=["beta"]), "beta, which did not change")
    refused(trainer(folder, beta=0.2, resume_changed=["betta"]), "resume_changed names betta")
    refused(trainer(folder, optim="sgd", resume_changed=["optim"]), "state is of another optimizer")
    with pytest.raises(ValueError, match="no effect without resume_from_checkpoint"):
        trainer(folder, resume_changed=["beta"]).train()


def test_a_step_past_the_end_is_refused_and_the_last_one_only_saved(trained, tmp_path):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    refused(trainer(tmp_path, max_steps=3), "is of step 4, past max_steps=3")
    refused(trainer(tmp_path, max_steps=-1, num_train_epochs=0.5), "past num_train_epochs=0.5")
    again = trainer(tmp_path)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4
    want = checkpoint_weights(trained / "run/checkpoint-4")
    got = dict(again.model.named_parameters())
    assert all(torch.equal(got[name], value) for name, value in want.items())


def checkpoint_weights(path):
    from safetensors.torch import load_file

    return load_file(path / "model.safetensors")


FILES = ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "config.json"]


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named(folder, name):
    path = folder / "run/checkpoint-2" / name
    whole = path.read_bytes()
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    run = trainer(folder)
    refused(run, rf"{name} is damaged")
    path.write_bytes(whole[:-1])
    refused(run, rf"{name} has [\d,]+ of [\d,]+ bytes")
    path.unlink()
    refused(run, rf"{name} is missing")
    path.write_bytes(whole)
    run.train(resume_from_checkpoint=True)


def test_a_damaged_marker_is_named(folder):
    (folder / "run/checkpoint-2/complete.json").write_text('{"step": 2')
    refused(trainer(folder), r"complete\.json is damaged")


def test_weights_alone_are_not_resumed(tmp_path):
    trainer(tmp_path, save_only_model=True).train()
    refused(trainer(tmp_path), "holds weights alone")


def test_runs_in_one_folder_are_told_apart(folder):
    """A new run in the folder of an older one: its own checkpoints are rotated, and resumed."""
    (folder / "run/checkpoint-2").rename(folder / "run/checkpoint-200")
    trainer(folder, max_steps=3, save_steps=1, save_total_limit=1).train()
    whole = [path.name for path in checkpoint.complete_checkpoints(folder / "run")]
    assert whole == ["checkpoint-200", "checkpoint-3"]
    assert checkpoint.find_checkpoint(True, folder / "run").endswith("checkpoint-3")


def test_a_checkpoint_is_refused_before_the_reference_is_computed(folder, monkeypatch):
    from dpo_fast.training import trainer as module

    monkeypatch.setattr(module, "precompute", lambda *_: pytest.fail("the reference was computed"))
    with pytest.raises(ValueError, match="beta was"):
        trainer(folder, beta=0.2, resume_from_checkpoint=str(folder / "run/checkpoint-2"))


def test_adapters_agree_although_they_start_at_random(tmp_path):
    peft = pytest.importorskip("peft")

    def run(seed, **changes):
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=changes.pop("r", 2), target_modules=["q_proj"], task_type="CAUSAL_LM")
        model = peft.get_peft_model(tiny.llama(), config)
        return trainer(tmp_path, model=model, ref_cache_dir=None, **changes)

    run(1, max_steps=2, lr_scheduler_type="constant").train()
    refused(run(2, lr_scheduler_type="constant", r=4), "another peft_config")
    again = run(2, lr_scheduler_type="constant")
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4

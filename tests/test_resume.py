"""Resume equals an uninterrupted run, whatever moment a kill came; small updates of low-precision weights are kept."""

import json
import signal
import subprocess
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

import forked
import tiny

from dpo_fast import DPOConfig, DPOTrainer
from dpo_fast.training import checkpoint

ROOT = Path(__file__).parent.parent
TRAINING = ROOT / "tests/run_training.py"


def options(folder: Path, **changes) -> dict:
    return {
        "output_dir": str(folder), "ref_cache_dir": str(folder.parent / "ref"), "report_to": "none", "use_cpu": True,
        "bf16": False, "learning_rate": 1e-2, "max_steps": 6, "logging_steps": 1, "save_strategy": "steps",
        "save_steps": 2, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "disable_tqdm": True,
        "lr_scheduler_type": "cosine", **changes,
    }  # fmt: skip


def run(folder: Path, name: str, *, check=True, **spec) -> subprocess.CompletedProcess:
    """Train in a process of its own; the log and the weights are written beside `name`."""
    spec = {"model": str(folder / "model"), "train": tiny.pairs(16), "out": str(folder / name), **spec}
    path = folder / f"{name}.spec"
    path.write_text(json.dumps(spec))
    done = forked.run(TRAINING, path)
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


def history(folder: Path, name: str) -> list[dict]:
    rows = json.loads((folder / name).read_text())["history"]
    timed = ("perf/", "train_", "total_flos", "eval_runtime", "eval_samples_per", "eval_steps_per", "eval_model_prep")
    return [{k: v for k, v in row.items() if not k.startswith(timed)} for row in rows]


def same_weights(folder: Path, a: str, b: str) -> bool:
    first, second = (torch.load(folder / f"{name}.pt", weights_only=True) for name in (a, b))
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def files_of_a_checkpoint(folder: Path) -> int:
    return sum(1 for path in folder.iterdir())


def test_a_killed_run_resumes_to_the_same_bits(tmp_path):
    """kill -9 at the first, a middle and the last file of a checkpoint: the one before it stays whole."""
    tiny.llama().save_pretrained(tmp_path / "model")
    run(tmp_path, "whole", options=options(tmp_path / "whole_run"))
    count = files_of_a_checkpoint(tmp_path / "whole_run/checkpoint-4")
    assert count >= 5
    killed = 0
    for kill_at in (1, 3, count):
        name = f"killed_{kill_at}"
        folder = tmp_path / f"{name}_run"
        done = run(tmp_path, name, check=False, options=options(folder), kill_at=kill_at)
        if done.returncode != -signal.SIGKILL:
            continue  # fewer files pass through Python's open() than lie in the folder
        killed += 1
        assert (folder / "checkpoint-4").exists()
        assert [p.name for p in checkpoint.complete_checkpoints(folder)] == ["checkpoint-2"]
        run(tmp_path, name, options=options(folder), resume=True)
        assert history(tmp_path, name) == history(tmp_path, "whole")
        assert same_weights(tmp_path, name, "whole")
    assert killed >= 2


def test_resume_names_what_is_wrong(tmp_path):
    trainer = DPOTrainer(tiny.llama(), args=DPOConfig(**options(tmp_path / "run")), train_dataset=tiny.pairs(6))
    with pytest.raises(ValueError, match="no whole checkpoint"):
        trainer.train(resume_from_checkpoint=True)
    (tmp_path / "run/checkpoint-3").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"no complete\.json"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-3"))


def test_rotation_keeps_the_newest_and_the_best(tmp_path):
    for step in (2, 4, 6, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if step != 4:
            checkpoint.mark_complete(tmp_path / f"checkpoint-{step}", step=step)
    checkpoint.rotate(tmp_path, 2, str(tmp_path / "checkpoint-2"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-2", "checkpoint-4"]
    assert [p.name for p in checkpoint.complete_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-10"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bf16_compute_keeps_the_updates_of_a_small_learning_rate(tmp_path, dtype):
    """200 steps at 1e-6 move float32 weights; the same in bf16 follows them, whether weights or only compute is bf16."""
    runs = {}
    for name, (weights, bf16) in {"exact": (torch.float32, False), "tested": (dtype, True)}.items():
        model = tiny.llama(dtype=weights)
        args = options(tmp_path / name, bf16=bf16, max_steps=200, learning_rate=1e-6, lr_scheduler_type="constant")
        args.update(save_strategy="no", logging_steps=200, gradient_checkpointing=False, gradient_accumulation_steps=1)
        trainer = DPOTrainer(model, args=DPOConfig(**args), train_dataset=tiny.pairs(3))
        start = torch.cat([p.detach().float().flatten() for p in tiny.llama(dtype=torch.float32).parameters()])
        trainer.train()
        masters = getattr(trainer.optimizer.optimizer, "_masters", {})
        kept = [masters.get(p, p).detach().float().flatten() for p in model.parameters()]
        # bf16 weights begin rounded: what was learned is the way from there.
        start = start if weights == torch.float32 else start.bfloat16().float()
        runs[name] = torch.cat(kept) - start
    assert runs["exact"].abs().mean() > 1e-4  # Adam's steps are about the learning rate: 200 of them
    agreement = torch.cosine_similarity(runs["tested"], runs["exact"], dim=0)
    assert agreement > 0.9
    assert runs["tested"].norm() > 0.9 * runs["exact"].norm()

"""Signals to a run: SIGTERM, SIGINT and SIGKILL at any place, restarts of a killed rank, a second run in its folder."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

pytest.importorskip("transformers")

import forked
import tiny
from fault_tools import At, start
from test_resume import ROOT, TRAINING, same_weights
from test_resume import options as process_options
from test_resume import run as process
from test_resume_agrees import options, trainer

from dpo_fast import DPOConfig, DPOTrainer
from dpo_fast.training import checkpoint
from dpo_fast.training.run_lock import hold


def signalled(which: int):
    return At(2, lambda _: os.kill(os.getpid(), which))


def test_sigterm_writes_a_checkpoint_that_goes_on_to_the_same_bits(tmp_path, caplog):
    whole = trainer(tmp_path / "whole", max_steps=5, save_strategy="no", logging_steps=10)
    whole.train()
    run = start(tmp_path, signalled(signal.SIGTERM), max_steps=5, save_strategy="no", logging_steps=10)
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        run.train()
    assert stopped.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is handler
    assert "stopped by SIGTERM at step 3" in caplog.text or "stopped by SIGTERM at step 2" in caplog.text
    again = start(tmp_path, max_steps=5, save_strategy="no", logging_steps=10)
    again.train(resume_from_checkpoint=True)
    for a, b in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_an_interrupt_says_what_was_saved(tmp_path):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background process ignores it
    run = start(tmp_path, signalled(signal.SIGINT), save_steps=1)
    with pytest.raises(KeyboardInterrupt, match=r"interrupted at step 2\. The last whole checkpoint is .*checkpoint-1"):
        run.train()
    signal.signal(signal.SIGINT, before)


def test_a_kill_while_old_checkpoints_are_rotated(tmp_path, monkeypatch):
    """A checkpoint that is being deleted counts no longer; the newest does, and resumes."""

    def killed(path, **kwargs):
        if str(path).endswith("checkpoint-1"):
            raise SystemExit("killed")

    run = start(tmp_path, save_steps=1, save_total_limit=1)
    monkeypatch.setattr(checkpoint.shutil, "rmtree", killed)
    with pytest.raises(SystemExit, match="killed"):
        run.train()
    monkeypatch.undo()
    assert (tmp_path / "run/checkpoint-1/model.safetensors").exists()
    assert [p.name for p in checkpoint.complete_checkpoints(tmp_path / "run")] == ["checkpoint-2"]
    again = start(tmp_path, save_steps=1, save_total_limit=1)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4


@pytest.mark.slow
def test_kills_in_the_reference_pass_and_in_the_rotation(tmp_path):
    """kill -9 before the third batch of the pass, then while checkpoint-2 is deleted: the same bits in the end."""
    tiny.llama().save_pretrained(tmp_path / "model")
    common = process_options(tmp_path / "killed_run", save_total_limit=1)
    process(
        tmp_path,
        "whole",
        options={**common, "output_dir": str(tmp_path / "whole_run"), "ref_cache_dir": str(tmp_path / "w")},
    )
    done = process(tmp_path, "killed", check=False, options=common, kill_event=["open", ".bin", 3])
    assert done.returncode == -signal.SIGKILL
    (records,) = (tmp_path / "ref").glob("ref-*.bin")
    assert records.stat().st_size == 2 * 3 * 36  # two batches of three pairs
    done = process(tmp_path, "killed", check=False, options=common, kill_event=["os.remove", "optimizer.pt", 1])
    assert done.returncode == -signal.SIGKILL
    assert records.stat().st_size == 16 * 36
    assert (tmp_path / "killed_run/checkpoint-2/optimizer.pt").exists()
    assert [p.name for p in checkpoint.complete_checkpoints(tmp_path / "killed_run")] == ["checkpoint-4"]
    process(tmp_path, "killed", options=common, resume=True)
    assert same_weights(tmp_path, "killed", "whole")


def killed(act, event: str = "", nth: int = 0, part: str = "") -> bool:
    """Run `act` in a copy of this process, which gets SIGKILL at the `nth` audit event with `part` in it; whether it came."""
    child = os.fork()
    if child == 0:
        seen = [0]

        def hook(name, args):
            seen[0] += name == event and part in str(args)
            if name == event and part in str(args) and seen[0] == nth:
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.addaudithook(hook)
            act()
        finally:
            os._exit(0)
    status = os.waitpid(child, 0)[1]
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def test_kill_9_while_the_model_is_saved_at_the_end(tmp_path):
    """Until all new files are written the old ones are untouched; after it, saving again gives the whole model."""
    run = start(tmp_path, save_strategy="no")
    out = tmp_path / "out"
    run.save_model(out)
    old = {p.name: p.read_bytes() for p in out.iterdir()}
    run.train()
    run.save_model(tmp_path / "new")
    new = {p.name: p.read_bytes() for p in (tmp_path / "new").iterdir()}
    assert old["model.safetensors"] != new["model.safetensors"]
    for name in ("config.json", "training_args.json"):
        assert killed(lambda: run.save_model(out), "open", 1, f".saving/{name}"), name
        assert {p.name: p.read_bytes() for p in out.iterdir() if p.name != ".saving"} == old
    for nth in (1, 3):
        assert killed(lambda: run.save_model(out), "os.rename", nth, ".saving")
        for path in out.iterdir():
            if path.name != ".saving":
                assert path.read_bytes() in (old[path.name], new[path.name])
    run.save_model(out)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == new


def test_kill_9_while_the_rows_are_tokenised(tmp_path):
    """Nothing is written by then, and the folder's lock goes with the process."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(3, tiny.VOCABULARY)}
    ids = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"</s>": 2, **words}, "w3")), eos_token="</s>"
    )
    rows = [{"prompt": f"w{5 + i}", "chosen": "w7", "rejected": "w9"} for i in range(8)]
    args = DPOConfig(**options(tmp_path))

    def build():
        hold(args.output_dir)
        return DPOTrainer(tiny.llama(), args=args, train_dataset=rows, processing_class=ids)

    def dying():
        type(ids).__call__ = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
        build()

    assert killed(dying)
    assert [p.name for p in (tmp_path / "run").iterdir()] == [".run.lock"]
    assert not (tmp_path / "ref").exists()
    run = build()
    run.train()
    assert run.state.global_step == run.state.max_steps


@pytest.mark.slow
def test_a_killed_rank_is_restarted_to_the_same_numbers(tmp_path):
    """torchrun --max-restarts: one of two ranks is killed at step 3, and both go on from the checkpoint of step 2."""
    tiny.llama().save_pretrained(tmp_path / "model")
    for name, kill in (("whole", None), ("killed", 3)):
        run = options(tmp_path / name, ddp_backend="gloo", per_device_train_batch_size=1)
        spec = {
            "model": str(tmp_path / "model"), "train": tiny.pairs(16), "out": str(tmp_path / f"{name}_out"), "options": run,
            "resume": "last", "kill_rank_at": kill,
        }  # fmt: skip
        (tmp_path / f"{name}.spec").write_text(json.dumps(spec))
    forked.run_ranks(2, TRAINING, tmp_path / "whole.spec")
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--max-restarts", "1"]
    # torch 2.13 keeps its shared store over a restart: ranks may find the addresses of those that were killed.
    environment = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    done = forked.run(*launcher, TRAINING, tmp_path / "killed.spec", env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "killed_out.killed").exists()
    assert not (tmp_path / "whole_out.killed").exists()
    assert same_weights(tmp_path, "killed_out", "whole_out")


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_sigterm_to_a_launched_run(tmp_path, processes):
    """Every rank stops at the same step; the process ends with 143 where no launcher is in between."""
    tiny.llama().save_pretrained(tmp_path / "model")
    run = options(tmp_path, save_strategy="no", max_steps=100_000, logging_steps=1)
    if processes > 1:
        run["ddp_backend"] = "gloo"
    spec = {"model": str(tmp_path / "model"), "train": tiny.pairs(16), "out": str(tmp_path / "out"), "options": run}
    (tmp_path / "spec").write_text(json.dumps(spec))
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"] if processes > 1 else []
    process = forked.Forked(*launcher, TRAINING, tmp_path / "spec")
    log = lambda: process.out.read_text() + process.err.read_text() if process.err.exists() else ""  # noqa: E731
    try:
        deadline = time.monotonic() + 240
        while "step 3/" not in log() and time.monotonic() < deadline:
            assert process.poll() is None, log()[-2000:]
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        status = process.wait(timeout=100).returncode
    finally:
        process.send_signal(signal.SIGKILL)
    assert "stopped by SIGTERM at step" in log(), log()[-2000:]
    assert status == 143 if processes == 1 else status != 0
    (saved,) = checkpoint.complete_checkpoints(tmp_path / "run")
    checkpoint.check_contents(saved)
    assert len(list(saved.glob("rng_state*.pth"))) == processes


def test_a_second_run_in_one_folder_is_refused_while_the_first_lives(tmp_path):
    code = (
        "import sys, time; from dpo_fast.training.run_lock import hold; hold(sys.argv[1]); print('held', flush=True);"
        "time.sleep(60)"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    first = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "run")], stdout=subprocess.PIPE, env=env)
    try:
        assert first.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match=rf"another run \(process {first.pid} on .*\) is writing into"):
            start(tmp_path).train()
        first.kill()
        first.wait()
        hold(tmp_path / "run")  # the kernel let go of it
        hold(tmp_path / "run")
    finally:
        first.kill()
        first.stdout.close()

"""Faults during a run: numbers that are not finite, full disks, signals, a second run in its folder."""

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
from test_resume import ROOT, TRAINING, same_weights
from test_resume import options as process_options
from test_resume import run as process
from test_resume_agrees import options, trainer
from transformers import TrainerCallback

from dpo_fast import DPOConfig, DPOTrainer
from dpo_fast.training import checkpoint
from dpo_fast.training.disk import room_for
from dpo_fast.training.ref_cache import RefCache, compute_missing
from dpo_fast.training.run_lock import hold
from dpo_fast.training.saving import replacing


class At(TrainerCallback):
    """Calls `act(model)` once `step` steps are done."""

    def __init__(self, step: int, act):
        self.step, self.act = step, act

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            self.act(model)


def start(folder, *callbacks, rows=None, model=None, **changes) -> DPOTrainer:
    args = DPOConfig(**options(folder, **changes))
    return DPOTrainer(model or tiny.llama(), args=args, train_dataset=rows or tiny.pairs(16), callbacks=list(callbacks))


# Numbers that are not finite.


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


# Full disks.


@pytest.fixture
def tiny_disk(tmp_path):
    """Run a command where its folder is a file system of 400 kB, in a mount namespace of its own."""

    def run(code: str) -> subprocess.CompletedProcess:
        shell = f"mount -t tmpfs -o size=400k none {tmp_path} && exec {sys.executable} -c '{code}'"
        path = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
        env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "FOLDER": str(tmp_path)}
        return subprocess.run(["unshare", "-rm", "sh", "-c", shell], env=env, capture_output=True, text=True)

    probe = run("pass")
    if probe.returncode:
        pytest.skip(f"no file system can be mounted here: {probe.stderr.strip()[:100]}")
    return run


@pytest.mark.slow
def test_a_checkpoint_on_a_full_disk_leaves_the_one_before(tiny_disk):
    """Weights of 60 kB with 120 kB of AdamW's state: two checkpoints fit the disk, a third does not."""
    done = tiny_disk(
        "import os, pathlib; from test_resume_agrees import trainer; from dpo_fast.training import checkpoint\n"
        'folder = pathlib.Path(os.environ["FOLDER"])\n'
        "try: trainer(folder, save_steps=1, max_steps=6).train()\n"
        'except OSError as error: print("ERROR", error)\n'
        'print("WHOLE", [p.name for p in checkpoint.complete_checkpoints(folder / "run")])\n'
        'print("THERE", sorted(p.name for p in (folder / "run").glob("checkpoint-*")))\n'
        'checkpoint.check_contents(checkpoint.find_checkpoint(True, folder / "run"))\n'
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = dict(line.split(" ", 1) for line in done.stdout.splitlines() if line.split(" ")[0].isupper())
    assert "the disk is full: checkpoint-" in lines["ERROR"]
    assert " left. The last whole checkpoint is" in lines["ERROR"]
    assert lines["WHOLE"] == lines["THERE"]
    assert "checkpoint-1" in lines["WHOLE"]


def no_room(*args, **kwargs):
    raise RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed")


def test_a_write_that_fails_midway_is_a_full_disk(tmp_path, monkeypatch):
    run = start(tmp_path, At(3, lambda _: monkeypatch.setattr(torch, "save", no_room)))
    with pytest.raises(OSError, match=r"disk is full: .* needs about .*checkpoint-2 \(--resume"):
        run.train()
    assert [p.name for p in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]


def test_the_model_replaces_the_old_one_only_when_it_is_whole(tmp_path, monkeypatch):
    run = start(tmp_path, save_strategy="no")
    run.save_model(tmp_path / "out")
    old = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    assert {"model.safetensors", "config.json", "README.md", "training_args.json"} <= old.keys()
    run.train()
    monkeypatch.setattr(torch, "save", no_room)
    with pytest.raises(OSError, match=r"disk is full: the model needs about \d"):
        run.save_model(tmp_path / "out")
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == old
    monkeypatch.undo()
    run.save_model(tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").read_bytes() != old["model.safetensors"]


def test_shards_of_the_old_model_do_not_stay(tmp_path):
    for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "notes.txt"):
        (tmp_path / name).write_text("old")
    with replacing(tmp_path) as pending:
        (pending / "model.safetensors").write_text("new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.safetensors", "notes.txt"]


def test_room_is_checked_before_anything_is_written(tmp_path):
    with (
        pytest.raises(OSError, match=r"checkpoint-7 needs about 1000000.0 GB and .* left. Nothing is lost"),
        room_for(tmp_path, 10**15, "checkpoint-7", "Nothing is lost"),
    ):
        pytest.fail("it was tried")


def test_a_reference_cache_on_a_full_disk_says_what_is_missing(tmp_path, monkeypatch):
    cache = RefCache(tmp_path, weights="w", precision="p", version="v")
    rows = tiny.pairs(6)
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match=r"disk is full: the cache of 6 more reference log-probs needs about 216 bytes"):
        compute_missing(cache, rows, 2, lambda batch: torch.zeros(len(batch), 2))


def test_a_damaged_reference_cache_is_named_and_computed_again(tmp_path, caplog):
    rows = tiny.pairs(6)
    facts = {"weights": "w", "precision": "p", "version": "v"}
    cache = RefCache(tmp_path, **facts)
    compute_missing(cache, rows, 2, lambda batch: torch.ones(len(batch), 2))
    data = bytearray(cache.path.read_bytes())
    data[36 * 2 + 20] ^= 1
    cache.path.write_bytes(data)
    again = RefCache(tmp_path, **facts)
    assert f"1 record of {again.path} is damaged" in caplog.text
    counted = []
    values = compute_missing(again, rows, 2, lambda batch: counted.append(len(batch)) or torch.ones(len(batch), 2))
    assert counted == [1]
    assert (values == 1).all()


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


# Signals.


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
    run = start(tmp_path, signalled(signal.SIGINT), save_steps=1)
    with pytest.raises(KeyboardInterrupt, match=r"interrupted at step 2\. The last whole checkpoint is .*checkpoint-1"):
        run.train()


# Two runs.


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


# Kills.


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


# Restarts.


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

"""Faults of the disk during a run: it is full, or what is read from it is damaged."""

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("transformers")

import tiny
from fault_tools import At, start
from test_resume import ROOT

from dpo_fast.training.disk import room_for
from dpo_fast.training.ref_cache import RefCache, compute_missing
from dpo_fast.training.saving import replacing


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

"""The rows of bench.gpu that remain when a system fails, dies or hangs, memory or time runs out, or the device is lost."""

import json
import sys

import pytest
import torch
from bench_tools import ROOT, rows_fixture  # noqa: F401 - the fixture `rows`

from bench import gpu, measure, parts, results, systems
from bench.ops import OPS
from bench.results import Results, read


def measured(rows, extra: dict, monkeypatch, ops=("token_logps", "sequence_logps")) -> list[dict]:
    """Two ops of plain torch's back end and of `extra`, name -> function of a batch."""
    known = {name: systems.System(lambda device, f=f: dict.fromkeys(OPS, f), ours=True) for name, f in extra.items()}
    for name, system in known.items():
        monkeypatch.setitem(systems.SYSTEMS, name, system)
    systems.load.cache_clear()
    bench = measure.Bench(rows, torch.float32, 3, {"bytes_per_second": 1e9, "flops_per_second": 1e9})
    for op in ops:
        bench.measure(op, 32, 0, 300, 0.5, ("dpo_fast torch", *extra), 8)
    return rows.rows


def test_out_of_memory_in_the_timed_loop(rows, monkeypatch):
    calls = []

    def late(batch):
        calls.append(0)
        if len(calls) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return systems.plain_token_logps(batch.logits, batch.targets)

    found = measured(rows, {"dpo_fast late": late}, monkeypatch, ("token_logps",))
    assert [row["failed"] for row in found if row["system"] == "dpo_fast late"] == ["out of memory"]
    assert [row["seconds"] > 0 for row in found if row["system"] == "dpo_fast torch"] == [True]


def test_what_is_wrong_is_not_measured(rows, monkeypatch):
    extra = {"dpo_fast wrong": lambda batch: 1.01 * systems.plain_token_logps(batch.logits, batch.targets)}
    found = measured(rows, extra, monkeypatch, ("token_logps",))
    (wrong,) = (row for row in found if row["system"] == "dpo_fast wrong")
    assert "relative error" in wrong["failed"]
    assert "seconds" not in wrong
    assert [row["system"] for row in found if "seconds" in row] == ["dpo_fast torch"]


def test_inputs_that_do_not_fit(rows, monkeypatch):
    def full(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(measure, "make_batch", full)
    measured(rows, {}, monkeypatch)
    assert [row["failed"] for row in rows.rows] == ["out of memory"] * 2


def test_out_of_time(rows, monkeypatch):
    rows.deadline = 0
    assert {row["skipped"] for row in measured(rows, {}, monkeypatch)} == {"out of time"}


def test_a_lost_device_ends_the_part(tmp_path, monkeypatch):
    class Lost:
        def synchronize(self):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def run(rows, plan, seconds):
        rows.clock.cuda = Lost()
        with rows.attempt(op="first"):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        raise AssertionError("nothing follows")

    monkeypatch.setitem(parts.PARTS, "rows", parts.Part("smoke", run, 60))
    assert gpu.main(["--part", "rows", "--dry-run", "--out", str(tmp_path)]) == gpu.LOST
    first, last = read(tmp_path / "rows.jsonl")
    assert first["op"] == "first"
    assert "the device is lost" in last["failed"]


# A child of bench.gpu with two systems more: one ends its process, one never returns.
CHILD = """
import os, sys, time, collections, torch
torch.set_num_threads(1)
from bench import systems
def dies(batch): os.kill(os.getpid(), 9)
def hangs(batch): time.sleep(600)
def system(f):
    return systems.System(lambda d: collections.defaultdict(lambda: systems._functions()["sequence_logps"], dpo_loss=f), ours=True)
torch_ = systems.SYSTEMS["dpo_fast torch"]
systems.SYSTEMS.clear()
systems.SYSTEMS.update({"dpo_fast torch": torch_, "dpo_fast dies": system(dies), "dpo_fast hangs": system(hangs)})
from bench import gpu, parts
parts.PLANS[True] = parts.dataclasses.replace(parts.DRY, logits=parts.DRY.logits[:1])
sys.exit(gpu.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_what_dies_and_what_hangs_costs_no_row(tmp_path, monkeypatch, capsys):
    (tmp_path / "child.py").write_text(CHILD)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(gpu, "CHILD", [sys.executable, "-u", str(tmp_path / "child.py")])
    monkeypatch.setattr(gpu, "names", lambda stage: ["rows"])
    monkeypatch.setitem(parts.PARTS, "rows", parts.Part("smoke", None, 150, silence=12))
    assert gpu.main(["--stage", "smoke", "--dry-run", "--out", str(tmp_path / "out")]) == 1
    (path,) = (tmp_path / "out").iterdir()
    found = read(path)
    assert found[0]["device"]
    assert found[0]["versions"]["torch"] == torch.__version__
    ends = [
        row["failed"]
        for row in found
        if row.get("system") in ("dpo_fast dies", "dpo_fast hangs") and row["op"] == "rows"
    ]
    assert ends == [
        "ended by signal 9, while it ran dpo_fast dies",
        "said nothing for 12 s, while it ran dpo_fast hangs",
    ]
    ours = [row["op"] for row in found if row.get("system") == "dpo_fast torch" and "seconds" in row]
    # Three runs: the first two lost the loss of all systems and kept what came before, the last has all of it.
    assert ours.count("token_logps") >= 3
    assert "dpo_loss + gradient" in ours
    assert "times:" in capsys.readouterr().out


@pytest.mark.slow
def test_a_time_out_keeps_the_rows(tmp_path, monkeypatch):
    rows = Results(tmp_path / "rows.jsonl", "cpu", 600)
    code = (
        "import sys, time; from pathlib import Path; from bench.results import Results\n"
        "r = Results(Path(sys.argv[sys.argv.index('--file') + 1]), 'cpu', 60)\n"
        "r.add(op='before', seconds=1.0)\n"
        "r.path.open('a').write('{\"op\": \"cut o')\n"
        "time.sleep(600)\n"
    )
    monkeypatch.setattr(gpu, "CHILD", [sys.executable, "-u", "-c", code])
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    why, system = gpu.call_part(rows.path, "rows", 12, [], dry=True)
    assert (why, system) == ("timed out after 12 s", "")
    rows.add(op="after")
    assert [row["op"] for row in read(rows.path)] == ["before", "after"]


def test_rows_are_one_line_each(rows, capsys):
    rows.add(op="x", seconds=0.5, errors={"loss": 1e-3})
    assert json.loads(rows.path.read_text()) == {"part": "test", "op": "x", "seconds": 0.5, "errors": {"loss": 1e-3}}
    assert capsys.readouterr().out == "test | x: seconds 500.000 ms, errors loss 1.0e-03\n"
    assert results.line({"op": "y", "failed": "out of memory"}) == "y: failed: out of memory"

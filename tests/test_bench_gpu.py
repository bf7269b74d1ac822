"""bench.gpu without a GPU: every part at toy sizes, and the rows that remain when something fails, dies or hangs.

The code is the same as on a GPU, except that a stand-in replaces torch.cuda (bench/clock.py).
"""

import dataclasses
import json
import random
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from bench import agreement, ceilings, checks, common, gpu, lengths, measure, parts, profiling, results, steps, systems
from bench.clock import LONGEST_SLEEP, Clock
from bench.results import Results, read

ROOT = Path(__file__).parent.parent


@pytest.fixture
def rows(tmp_path):
    return Results(tmp_path / "rows.jsonl", "cpu", 600, part="test")


def run_part(name: str, folder: Path) -> list[dict]:
    assert gpu.main(["--part", name, "--dry-run", "--out", str(folder)]) == 0
    return read(folder / f"{name}.jsonl")


# ---- Every part ----


def test_ceilings_and_products(tmp_path):
    found = run_part("ceilings", tmp_path)
    assert found[0]["bytes_per_second"] > 0
    assert found[0]["flops_per_second"] == max(found[0]["gemms"].values())
    assert [row["shape"] for row in found[1:]] == ["64 x 16 x 300"]
    assert {key.split(",")[0] for key in found[1]["gemms"]} == {"logits", "dH", "dW"}


def check_ops(found: list[dict], ops: set[str]) -> None:
    assert {row["op"] for row in found} == ops
    assert not [row for row in found if "failed" in row]
    for row in found:
        if "skipped" in row:
            continue
        assert row["seconds"] > 0
        assert row["floor_seconds"] / row["seconds"] == pytest.approx(row["share_of_floor"])
        assert len(row["all_seconds"]) == parts.DRY.repeats


def test_row_kernels(tmp_path):
    found = run_part("rows", tmp_path)
    check_ops(found, {op for op in systems.OPS if not systems.OPS[op].gemms})
    one_launch = {row["system"] for row in found if row["op"].startswith("dpo_loss")}
    assert {"dpo_fast torch", "dpo_fast torch, inplace", "dpo_fast csrc, two launches"} <= one_launch
    assert {row["shape"] for row in found} == {"64 x 300", "32 x 300"}


def test_head(tmp_path):
    check_ops(run_part("head", tmp_path), {op for op in systems.OPS if systems.OPS[op].gemms})


def test_peers_come_with_ours_in_turns(tmp_path, monkeypatch):
    monkeypatch.setitem(parts.PLANS, True, dataclasses.replace(parts.DRY, logits=()))
    found = run_part("peers", tmp_path)
    check_ops(found, {op for op in systems.OPS if systems.OPS[op].gemms})
    assert {"torch eager", "torch.compile", "bare GEMMs"} <= {row["system"] for row in found if "seconds" in row}
    counter = CompileCounterWithBackend("eager")  # the tests after this one must compile again
    torch.compile(torch.sin, backend=counter)(torch.ones(2))
    assert counter.frame_count == 1


def test_programs(tmp_path):
    found = [row for row in run_part("programs", tmp_path) if row["system"] == "dpo_fast csrc"]
    assert not [row for row in found if "failed" in row]
    assert {(row["op"], row["variant"][0]) for row in found} == {
        ("dpo_fused", "3"), ("dpo_fused", "1"), ("residual_", "2"), ("residual_", "1"),
    }  # fmt: skip
    assert all(row["errors"]["from the first"] == 0 for row in found if "seconds" in row)  # a CPU has no such choice


def test_chunks(tmp_path):
    found = run_part("chunks", tmp_path)
    assert not [row for row in found if "failed" in row]
    assert {row["op"] for row in found} == {
        "product logits", "product dH", "product dW", "residual_", "chunks of a frozen head",
        "chunks of a trained head", "chunk",
    }  # fmt: skip
    assert {row["rows"] for row in found if "rows" in row and row["D"] == 16} == {16, 24, 64}


def test_chunk_rows_are_those_of_the_package():
    weight = torch.zeros(300, 8)
    assert ceilings.chunk_rows(64, weight) == (64, 64)


def test_agreement(tmp_path):
    found = run_part("agreement", tmp_path)
    assert not [row for row in found if "failed" in row]
    ours = [row for row in found if "ok" in row]
    assert all(row["ok"] for row in ours)
    assert {row["variant"] for row in ours} >= {
        "padded", "inplace", "two launches", "cu_seqlens on the device", "several groups, cu_seqlens on the CPU",
        "rows past the workspace, cu_seqlens on the device",
    }  # fmt: skip
    assert {name for row in ours for name in row["errors"]} == {"loss", "logps", "logits", "hidden", "weight"}


@pytest.mark.parametrize("sabotage", ["loss", "gradient"])
def test_agreement_finds_what_is_wrong(rows, monkeypatch, sabotage):
    right = agreement.dpo_fast.dpo_loss

    def wrong(logits, *args, **options):
        out = right(logits, *args, **options)
        value = 1.001 * out.loss
        loss = value.detach() + (out.loss - out.loss.detach())
        if sabotage == "gradient":
            loss = out.loss.detach() + (value - value.detach())
        return dataclasses.replace(out, loss=loss)

    monkeypatch.setattr(agreement.dpo_fast, "dpo_loss", wrong)
    agreement.agreement(rows, torch.float32, *parts.DRY.agreement)
    verdicts = {"dpo_loss": set(), "linear_dpo_loss": set()}
    for row in rows.rows:
        if "ok" in row:
            verdicts[row["op"].split()[2]].add(row["ok"])
    assert verdicts == {"dpo_loss": {False}, "linear_dpo_loss": {True}}


def test_steps(tmp_path):
    found = run_part("steps", tmp_path)
    assert not [row for row in found if "failed" in row]
    assert {row["model"] for row in found} == {"llama tiny", "qwen2 tiny"}
    for option in ("checkpointing", "lora", "bf16_weights"):
        assert {row[option] for row in found} == {False, True}
    for row in found:
        assert row["tokens"] > row["forest_rows"] > row["live_rows"] / 2
        assert row["pairs_per_second"] == pytest.approx(row["pairs"] / row["seconds"])
        assert row["waits"] == 0
        assert 0 < len(row["dearest"]) <= 15


@pytest.mark.slow
def test_trl_steps(tmp_path):
    pytest.importorskip("trl")
    found = run_part("trl", tmp_path)
    assert not [row for row in found if "failed" in row]
    assert [row["system"] for row in found[:3]] == ["dpo_fast", "TRL, tuned", "TRL, tuned"]


def test_trl_that_is_not_there(rows, monkeypatch):
    from bench import trl_steps

    monkeypatch.setattr(trl_steps.importlib.util, "find_spec", lambda name: None)
    trl_steps._trl(rows, steps.cases(True)[0], True, {})
    assert "pip install trl" in rows.rows[0]["skipped"]


@pytest.mark.slow
def test_tests_and_a_test_that_is_not_there(rows):
    checks.run_tests(rows, (*checks.DRY, "tests/test_packing.py::test_no_such_thing"), 120, "smoke tests")
    missing, counts = rows.rows
    assert missing["failed"] == "there is no such test: tests/test_packing.py::test_no_such_thing"
    assert (counts["passed"], counts["red"]) == (1, 0)
    assert "failed" not in counts


def test_red_tests_are_rows(rows, tmp_path):
    (tmp_path / "tests").mkdir()
    path = tmp_path / "tests" / "test_red.py"
    path.write_text("def test_a():\n    assert 1 == 2\n\ndef test_b():\n    pass\n")
    checks.run_tests(rows, ["-c", "/dev/null", "--rootdir", str(tmp_path), str(path)], 120, "GPU tests")
    red, counts = rows.rows
    assert "test_a" in red["failed"]
    assert (counts["passed"], counts["red"]) == (1, 1)
    assert any("assert 1 == 2" in text for text in counts["last_lines"])


def test_a_test_that_hangs_is_left_behind(rows, tmp_path):
    """The arguments are those of pytest; the program here says what pytest would."""
    program = tmp_path / "pytest_.py"
    program.write_text(
        "import sys, time\n"
        "for test in (x for x in sys.argv if '::' in x):\n"
        "    if 'hangs' in test:\n"
        "        time.sleep(600)\n"
        "    print(test, 'PASSED [ 50%]', flush=True)\n"
    )
    tests = ["tests/x.py::a", "tests/x.py::hangs", "tests/x.py::b", "tests/x.py::c"]
    checks.run_tests(rows, tests, 60, "smoke tests", 2, [sys.executable, str(program)])
    assert [row["passed"] for row in rows.rows if "passed" in row] == [1, 2]
    assert [row["test"] for row in rows.rows if "test" in row] == ["tests/x.py::hangs"]


def test_without_compute_sanitizer(rows):
    checks.sanitize(rows, 60, checks.DRY, tool=["no-such-sanitizer"])
    assert [row["op"] for row in rows.rows] == ["compute-sanitizer memcheck", "compute-sanitizer racecheck"]
    assert all("no-such-sanitizer" in row["failed"] for row in rows.rows)


def test_every_part_belongs_to_a_stage():
    assert parts.STAGES == ("smoke", "head", "tests")
    assert [name for stage in parts.STAGES for name in parts.names(stage)] == list(parts.PARTS) == parts.names(None)


@pytest.mark.slow
def test_the_chosen_tests_exist():
    """On a GPU a test of a back end is called "csrc on cuda"; a CPU has the same test of plain torch."""
    files = sorted({test.split("::")[0] for test in checks.SMOKE})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-p", "no:cacheprovider", *files]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    for test in checks.SMOKE:
        assert test.replace("csrc on cuda", "torch").replace("triton on cuda", "torch") in out, test
    assert 30 <= len(checks.SMOKE) <= 45


# ---- What fails is a row ----


def measured(rows, extra: dict, monkeypatch, ops=("token_logps", "sequence_logps")) -> list[dict]:
    """Two ops of plain torch's back end and of `extra`, name -> function of a batch."""
    known = {
        name: systems.System(lambda device, f=f: dict.fromkeys(systems.OPS, f), ours=True) for name, f in extra.items()
    }
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


def test_a_build_that_fails_is_a_row(rows):
    checks.build(rows, 60, [sys.executable, "-c", "print('nvcc: no'); raise SystemExit(1)"])
    (row,) = rows.rows
    assert row["failed"] == "exit status 1"
    assert row["last_lines"] == ["nvcc: no"]
    assert row["back_ends"]["torch"] is None


def test_no_gpu_is_said(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert "--dry-run" in capsys.readouterr().out


@pytest.mark.parametrize("missing", ["git", ".git"])
def test_a_commit_that_nobody_knows(monkeypatch, tmp_path, missing):
    monkeypatch.setattr(common, "ROOT", tmp_path)
    if missing == "git":
        monkeypatch.setenv("PATH", str(tmp_path))
    assert common.commit().startswith("unknown: ")
    assert len(common.commit()) > len("unknown: ")


# ---- Time ----


class Simulated:
    """A device behind a host: launches take the host's time, and run one after the other."""

    def __init__(self):
        self.now = self.free_at = 0.0
        simulated = self

        class Event:
            def __init__(self, enable_timing):
                pass

            def record(self):
                self.at = max(simulated.now, simulated.free_at)

            def query(self):
                return self.at <= simulated.now

            def elapsed_time(self, end):
                return 1e3 * (end.at - self.at)

        self.Event = Event

    def launch(self, host: float, device: float) -> None:
        self.now += host
        self.free_at = max(self.now, self.free_at) + device

    def _sleep(self, cycles):
        self.launch(0, cycles / 2e9)

    def synchronize(self):
        self.now = max(self.now, self.free_at)


@pytest.mark.parametrize("launches", [1, 10, 200])
def test_python_is_not_counted(launches):
    """A launch takes Python 100 us and the device 10 us: from an idle device Python's time shows, from a busy one it does not."""
    device = Simulated()
    timing = Clock("cuda", cuda=device)(lambda: [device.launch(100e-6, 10e-6) for _ in range(launches)])
    assert timing.seconds == pytest.approx(launches * 10e-6)
    assert timing.hidden
    assert timing.from_idle == pytest.approx(launches * 100e-6 + 10e-6)


def test_a_call_that_waits_is_said_to_count_python():
    device, calls = Simulated(), []

    def waits():
        calls.append(0)
        device.launch(100e-6, 10e-6)
        device.synchronize()
        device.launch(100e-6, 10e-6)

    timing = Clock("cuda", cuda=device)(waits)
    assert not timing.hidden
    assert len(calls) < 8
    assert device.now < 10 * LONGEST_SLEEP / 1e9


def test_waits_are_counted_where_they_are():
    modes = []

    class Cuda:
        def set_sync_debug_mode(self, mode):
            modes.append(mode)

    def step():
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation (function operator())", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    found = profiling.waits(step, Cuda())
    assert found["waits"] == 2
    ((place, count),) = found["wait_places"].items()
    assert place.startswith("tests/test_bench_gpu.py:")
    assert count == 2
    assert modes == ["warn", "default"]


def test_rows_are_one_line_each(rows, capsys):
    rows.add(op="x", seconds=0.5, errors={"loss": 1e-3})
    assert json.loads(rows.path.read_text()) == {"part": "test", "op": "x", "seconds": 0.5, "errors": {"loss": 1e-3}}
    assert capsys.readouterr().out == "test | x: seconds 500.000 ms, errors loss 1.0e-03\n"
    assert results.line({"op": "y", "failed": "out of memory"}) == "y: failed: out of memory"


# ---- Lengths ----


def test_lengths_by_hand():
    pairs = [
        {"prompt_ids": [1] * 9, "chosen_ids": [1, 2, 3], "rejected_ids": [1, 2]},
        {"prompt_ids": [1] * 14, "chosen_ids": [1, 5], "rejected_ids": [2, 5, 6]},
        {"prompt_ids": [1] * 3, "chosen_ids": [1], "rejected_ids": [2]},
    ]
    assert lengths.histogram(pairs) == [[2, 12, 2, 2, 1], [1, 3, 1, 1, 0]]


@pytest.mark.parametrize("name", ["oasst", "pandalm", "politeness", "stepwise"])
def test_drawn_pairs_are_as_long_as_real_ones(name):
    cells = json.loads(lengths.FILE.read_text())["histograms"][name]
    total = sum(cell[0] for cell in cells)
    pairs = lengths.draw(name, 5000, random.Random(0))
    drawn = [lengths.lengths(next(pairs)) for _ in range(300)]
    for k in range(4):
        mean = sum(cell[0] * cell[k + 1] for cell in cells) / total
        spread = (sum(cell[0] * (cell[k + 1] - mean) ** 2 for cell in cells) / total) ** 0.5
        # Four standard errors; the ids that follow a shared beginning may agree by chance, and one is always left.
        assert abs(sum(x[k] for x in drawn) / len(drawn) - mean) <= 4 * spread / 300**0.5 + 1


def test_forests_are_as_full_as_asked():
    from dpo_fast.forest.batch import ForestCollator

    case = steps.cases(False)[0]
    assert (case.model, case.rows, case.lora, case.checkpointing) == ("llama 1B", 8192, False, False)
    assert len(steps.cases(False)) == 48
    for group in steps.groups(case, 128256):
        assert 0.8 * case.rows <= ForestCollator().part(group).forest.rows <= case.rows


def test_the_models_are_the_size_that_they_say():
    from transformers import AutoModelForCausalLM

    for name, config in steps.configs(False).items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        billions = {"llama 1B": 1.236, "qwen2 0.5B": 0.494}[name]
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(billions * 1e9, rel=1e-3)

"""`pytest --benchmark` collects the suites in bench/ and nothing else; plain `pytest` collects none of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


COLLECT = """
import contextlib, io, json, os, sys
import pytest
found = []
for arguments, folder in json.loads(sys.argv[1]):
    os.chdir(folder)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        status = pytest.main(["--collect-only", "-p", "no:cacheprovider", *arguments])
    found.append([int(status), out.getvalue()])
print(json.dumps(found))
"""
PLAIN = ("--ignore-glob=*/test_[c-z]*",)
ASKED = [
    (("--benchmark",), ROOT),
    (("--benchmark",), ROOT / "tests"),
    (("bench",), ROOT),
    (("bench/test_ops.py",), ROOT),
    (PLAIN, ROOT),
]


@pytest.fixture(scope="module")
def collected():
    """What pytest collects, by arguments and folder: one process asks it all."""
    asked = json.dumps([[arguments, str(folder)] for arguments, folder in ASKED])
    done = subprocess.run([sys.executable, "-c", COLLECT, asked], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    answers = json.loads(done.stdout.splitlines()[-1])
    for status, out in answers:
        assert status in (0, 5), out  # 5: nothing collected
    return {key: out for key, (_, out) in zip(ASKED, answers, strict=True)}


@pytest.mark.slow
@pytest.mark.parametrize("folder", [ROOT, ROOT / "tests"], ids=["root", "tests"])
def test_benchmark_collects_the_suites(folder, collected):
    pytest.importorskip("pytest_benchmark")
    out = collected[("--benchmark",), folder]
    assert "test_op[" in out
    assert "test_ops.py::test_op[dpo_fast torch: dpo_loss + gradient]" in out
    assert "tests/" not in out


@pytest.mark.slow
def test_rounds_and_the_word_on_ratios(tmp_path):
    pytest.importorskip("pytest_benchmark")
    path = tmp_path / "rows.json"
    command = [sys.executable, "-m", "pytest", "--benchmark", "-p", "no:cacheprovider", f"--benchmark-json={path}"]
    command.append("bench/test_ops.py::test_op[dpo_fast torch: sequence_logps]")
    # Inside of pytest-xdist's workers pytest-benchmark measures nothing.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = json.loads(path.read_text())["benchmarks"]
    # A round takes a few milliseconds.
    assert row["stats"]["rounds"] >= 5
    assert "StdDev" in done.stdout
    assert "python -m bench.cpu" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("path", ["bench", "bench/test_ops.py"])
def test_no_suite_without_the_option(path, collected):
    assert "test_op[" not in collected[(path,), ROOT]


@pytest.mark.slow
def test_plain_pytest_collects_tests_only(collected):
    ids = [line.split("::")[0] for line in collected[PLAIN, ROOT].splitlines() if "::" in line]
    assert ids
    assert not any(name.startswith("bench") for name in ids)

"""`pytest --benchmark` collects the suites in bench/ and nothing else; plain `pytest` collects none of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def collected(*args: str, folder: Path = ROOT) -> str:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-p", "no:cacheprovider", *args]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode in (0, 5), done.stdout + done.stderr  # 5: nothing collected
    return done.stdout


@pytest.mark.parametrize("folder", [ROOT, ROOT / "tests"])
def test_benchmark_collects_the_suites(folder):
    pytest.importorskip("pytest_benchmark")
    out = collected("--benchmark", folder=folder)
    assert "test_op[" in out
    assert "test_ops.py::test_op[dpo_fast torch: dpo_loss + gradient]" in out
    assert "tests/" not in out


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


@pytest.mark.parametrize("path", ["bench", "bench/test_ops.py"])
def test_no_suite_without_the_option(path):
    assert "test_op[" not in collected(path)


def test_plain_pytest_collects_tests_only():
    ids = [line.split("::")[0] for line in collected("--ignore-glob=*/test_[c-z]*").splitlines() if "::" in line]
    assert ids
    assert not any(name.startswith("bench") for name in ids)

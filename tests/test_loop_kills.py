"""A loop that is killed (kill -9) at any moment goes on to the same result, to the last bit of the weights."""

import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


@pytest.mark.slow
def test_kills_at_a_dozen_moments():
    ran = subprocess.run(
        [sys.executable, str(TESTS / "run_loop_kills.py")],
        cwd=TESTS.parent,
        env={"PYTHONPATH": f"{TESTS.parent}:{TESTS}", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr[-3000:]
    assert ran.stdout.count("\n") == 12

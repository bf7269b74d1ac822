"""A head whose vocabulary is cut over two and four processes is the whole head, in float64 and float32."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_together_are_the_whole_head(tmp_path, processes):
    tiny.llama().save_pretrained(tmp_path)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [
        sys.executable,
        *launcher,
        str(ROOT / "tests/run_vocab_parallel.py"),
        *([str(tmp_path)] if processes == 2 else []),
    ]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]

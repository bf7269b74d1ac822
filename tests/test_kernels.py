"""The Triton kernels of log-probs as their launchers run them, and all kernels in the interpreter.

Values and gradients are those of the table of ops (test_op_table.py). On a GPU these tests and those of the one launch
(test_kernels_dpo.py) run on CUDA tensors. Without one they are skipped here, and `test_in_the_interpreter` runs them and the
table's rows in processes of their own with TRITON_INTERPRET=1, which must be set before triton is imported.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from kernel_tools import DEVICE, DTYPES, PLAIN, close, data, on_device, plain_torch
from op_tools import INTERPRETED, poison  # noqa: F401 - poison is a fixture

triton = pytest.importorskip("triton", reason="no triton on this machine")
from dpo_fast.kernels import logps, rows  # noqa: E402

pytestmark = pytest.mark.usefixtures("poison")
TESTS = Path(__file__).resolve().parent
# Name -> files, tests of them.
INTERPRETED_PARTS = {
    "rows of dpo_loss": (("test_op_table.py",), "triton and dpo_loss"),
    "launchers and rows of log-probs": (
        ("test_kernels.py", "test_kernels_dpo.py", "test_op_table.py"),
        "(test_kernels and not interpreter) or (triton and not dpo_loss)",
    ),
}


def version(module):
    return tuple(int(x) for x in module.__version__.split(".")[:2])


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the tests of this file run on the GPU")
@pytest.mark.skipif(
    version(triton) < (3, 7) and version(numpy) >= (2, 4), reason="triton 3.6 interprets with numpy < 2.4 only"
)
@pytest.mark.slow
@pytest.mark.parametrize("part", INTERPRETED_PARTS)
def test_in_the_interpreter(part):
    files, chosen = INTERPRETED_PARTS[part]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "-W", "ignore", "-k", chosen]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [*command, *(str(TESTS / file) for file in files)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-8000:]
    passed = int(done.stdout.split(" passed")[0].split()[-1])
    assert passed >= 30, done.stdout[-2000:]


@on_device
def test_residual_far_from_zero():
    """Logits near 10000 keep their digits: the row maximum and the log of the sum stay apart."""
    logits, targets = data(4, 500, torch.float32, ignored=False)
    logits = (logits * 64).round() / 64 + 10000
    leaf, truth, _ = plain_torch(logits, targets, PLAIN, torch.float64)
    (grad,) = torch.autograd.grad(truth.sum(), leaf)
    ours, _ = logps.residual_(logits, targets, outputs=(), **PLAIN)
    close(ours, truth, truth, torch.float32)
    close(logits, grad, grad, torch.float32)


@on_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factor", [1.0, -0.3])
def test_scale(factor, dtype):
    x = torch.randn(5, 7, 3000, generator=torch.Generator().manual_seed(0)).to(dtype).to(DEVICE)
    number = torch.tensor(factor, device=DEVICE)
    slices = ((), (slice(None), slice(6)), (0,), (0, slice(None, None, 2), slice(1, None)), (0, 0, 0), (slice(0),))
    gaps = ((..., slice(2999)), (..., slice(1)), (slice(None, None, 2), slice(1), slice(3, 9)))
    for index in slices + gaps:
        whole = x.clone()
        view = whole[index]
        expected = x.clone()
        expected[index] = (view.double() * number.double()).to(dtype)
        assert logps.scale_(view, number) is view
        torch.testing.assert_close(whole, expected, rtol=0 if factor == 1 else 1e-2, atol=0)


@on_device
def test_refuses_float64():
    logits, targets = data(2, 5, torch.float64)
    with pytest.raises(ValueError, match="float64"):
        logps.logps_fwd(logits, targets, ignore_index=-100, outputs=(), **PLAIN)


def test_blocks_fit():
    for v in (1, 100, 4096, 50257, 128256):
        for dtype in DTYPES:
            for warps in (8, 16):
                b = rows.block_sizes(v, dtype, warps)
                assert b["THREADS"] == 32 * b["num_warps"]
                assert b["num_warps"] == 1 or b["K"] * b["THREADS"] * b["VEC"] <= v
                assert b["VEC"] * dtype.itemsize == 16

"""The extension's rows for each instruction set of this processor: their exponential to the last bits, and their threads.

This process runs the best set that the processor has; `test_lower_sets` runs this file and a part of the op
tests again in a process of its own for each of the others.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dpo_fast.backends import available_backends, eager
from dpo_fast.info import main as info

csrc = pytest.importorskip("dpo_fast.backends.extension", reason="the extension is not built")

TESTS = Path(__file__).resolve().parent
SETS = ["DEFAULT", "AVX2", "AVX512"]
ULP = 2.0**-23  # one unit in the last place of float32, relative
NORMAL = 2.0**-126  # the smallest normal float32
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


# ---- Which rows run ----


def test_the_rows_are_those_that_torch_chose():
    """ATEN_CPU_CAPABILITY, which torch reads, lowers both."""
    assert available_backends()["csrc"] is None
    capability = torch.backends.cpu.get_cpu_capability()
    assert (capability if capability in SETS else "DEFAULT") == csrc.INSTRUCTION_SET


def test_info_names_them(capsys):
    assert info([]) == 0
    (line,) = (line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line.startswith("  csrc"))
    assert line[1] == f"available ({csrc.INSTRUCTION_SET}{', CUDA' if csrc.WITH_CUDA else ''})"


def test_subnormal_results():
    """What each set does where float32 has subnormal numbers only: AVX2 gives 0. So the name is that of what runs."""
    found = exponentials(torch.tensor([-100.0] * 64))
    assert (found[0] == 0) == (csrc.INSTRUCTION_SET == "AVX2")


RUN = """
import sys
import time
import pytest
from dpo_fast.backends import extension as csrc
assert csrc.INSTRUCTION_SET == sys.argv[1], csrc.INSTRUCTION_SET
sys.exit(pytest.main(sys.argv[2:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", SETS[: SETS.index(csrc.INSTRUCTION_SET)])
def test_lower_sets(name):
    """This file and values and gradients against float64, in a process that is told to use less. Random cases of each set
    run under the sanitizers (test_sanitizers.py)."""
    tests = [str(TESTS / f"{file}.py") for file in ("test_instruction_sets", "test_op_table")]
    chosen = "(test_instruction_sets and not lower_sets) or (csrc and not linear)"
    options = ["-p", "no:cacheprovider", "-p", "no:xdist", "-k", chosen]
    command = [sys.executable, "-c", RUN, name, *tests, *options]
    environment = os.environ | {"ATEN_CPU_CAPABILITY": name.lower()}
    done = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    passed = int(done.stdout.split(" passed")[0].split()[-1])
    assert passed > 100, done.stdout


# ---- The exponential ----


def exponentials(x: torch.Tensor) -> torch.Tensor:
    """exp(x) of x <= 0 as the rows compute it: minus the gradient where the log-sum-exp is said to be 0."""
    row = torch.cat([x, x.new_zeros(1)])[None]
    out = torch.full_like(row, torch.nan)
    csrc.logps_bwd(row, torch.tensor([len(x)]), torch.zeros(1), torch.ones(1), out=out)
    return -out[0, :-1]


def sweep() -> torch.Tensor:
    """Differences from 0 to -104: evenly, every float where results stop being normal, and where rounding turns."""
    even = torch.linspace(-104, 0, 2_000_001, dtype=torch.float64).float()
    edge = torch.tensor(-87.34).view(torch.int32) - torch.arange(2000, dtype=torch.int32)
    turns = (
        (-(torch.arange(151, dtype=torch.float64) + 0.5) * 0.6931471805599453).float().clamp(min=-104).view(torch.int32)
    )
    near = (turns[:, None] + torch.arange(-8, 9, dtype=torch.int32)).flatten()
    small = -(10.0 ** -torch.arange(0, 45, 0.01, dtype=torch.float64)).float()
    return torch.cat([even, edge.view(torch.float32), near.view(torch.float32), small, torch.tensor([-0.0, 0.0])])


def test_exponential():
    """Within 1.5 units in the last place of float64 where the result is a normal number; else below the smallest."""
    x = sweep()
    found, exact = exponentials(x).double(), x.double().exp()
    normal = exact >= NORMAL
    worst = ((found - exact).abs() / exact)[normal].max().item()
    assert worst <= 1.5 * ULP, worst / ULP
    assert (found - exact).abs()[~normal].max().item() <= NORMAL
    assert found.ge(0).all()
    assert exponentials(torch.tensor([0.0, -0.0, -1e-45])).eq(1).all()
    lowest = torch.finfo(torch.float32).min
    assert exponentials(torch.tensor([-torch.inf, lowest, -1e30, -1e4, -200.0])).eq(0).all()


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_exponential_in_half_precision(dtype):
    """Rounded once."""
    x = sweep().to(dtype)
    found, exact = exponentials(x).double(), x.double().exp()
    tiny = torch.finfo(dtype).smallest_normal
    error = (found - exact).abs()
    assert (error / exact)[exact >= tiny].max().item() <= 0.5 * torch.finfo(dtype).eps * (1 + 1e-3)
    assert error[exact < tiny].max().item() <= max(0.51 * tiny * torch.finfo(dtype).eps, NORMAL)


def test_log_probs_and_probabilities():
    """Two words with a difference from 0 to -104, the other word the target, or the one."""
    x = sweep()
    rows = torch.stack([torch.zeros_like(x), x], -1)
    exact = torch.log_softmax(rows.double(), -1)
    for word in (0, 1):
        targets = torch.full((len(x),), word)
        logps, lse, _ = csrc.logps_fwd(rows, targets)
        error = (logps.double() - exact[:, word]).abs()
        assert error.max().item() <= 3e-7 if word == 0 else (error / -exact[:, 1]).max().item() <= 3e-7
        assert logps.le(0).all()
        assert (lse.double() + exact[:, 0]).abs().max().item() <= 3e-7
        given = rows.clone()
        assert torch.equal(csrc.residual_(given, targets)[0], logps)
        # The probability of the word that is no target comes from the exponential alone.
        p, q = -given[:, 1 - word].double(), exact[:, 1 - word].exp()
        normal = q >= 2 * NORMAL
        assert ((p - q).abs() / q)[normal].max().item() <= 3e-7
        assert (given[:, word].double() + torch.expm1(exact[:, word])).abs().max().item() <= 3e-7


# ---- The same bits ----


def launches(dtype):
    """What every launcher gives for rows of several blocks: masked words, ignored rows, rows at odd addresses."""
    rng = torch.Generator().manual_seed(0)
    n, v = 37, 4500
    x = (3 * torch.randn(n, v + 3, generator=rng)).to(dtype)[:, 1 : v + 1]
    x[:, ::7] = -torch.inf
    targets = torch.randint(v // 7, (n,), generator=rng) * 7 + 1
    scored = targets.clone()
    scored[::5] = -100
    coef, cu = torch.randn(n, generator=rng), torch.tensor([0, 9, 9, 20, 37], dtype=torch.int32)
    options = {"scale": -0.5, "softcap": 20.0, "temperature": 0.8}
    options = options if dtype == torch.float16 else {"scale": 1.5, "softcap": None, "temperature": 1.0}
    logps, lse, stats = csrc.logps_fwd(x, scored, outputs=eager.OUTPUTS, **options)
    found = {"logps": logps, "lse": lse, **stats}
    found["dlogits"] = csrc.logps_bwd(x, scored, lse, coef, out=torch.empty(n, v, dtype=dtype), **options)
    given = x.clone()
    found["residual logps"], stats = csrc.residual_(given, targets, outputs=eager.OUTPUTS, **options)
    found |= {"residual": given} | {f"residual {name}": value for name, value in stats.items()}
    loss = {"loss_type": "sigmoid", "beta": 0.1, "label_smoothing": 0.1, "discopop_tau": 0.05, "simpo_gamma": 0.5}
    out = torch.empty(n, v, dtype=dtype)
    found["losses"], found["sums"], found["fused"] = csrc.dpo_fused(x, scored, cu, None, 0.5, out=out, **loss)
    given = x.clone()
    found["inplace"] = csrc.dpo_fused(given, scored, cu, None, 0.5, out=given, **loss)[2]
    found["scaled"] = csrc.scale_(given.clone(), torch.tensor(0.3))
    return found


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_any_number_of_threads(dtype):
    torch.set_num_threads(1)
    one = launches(dtype)
    assert all(x.nan_to_num(0).count_nonzero() for x in one.values() if x.dtype != torch.bool)
    assert torch.equal(one["fused"], one["inplace"])
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            for name, x in launches(dtype).items():
                torch.testing.assert_close(
                    x, one[name], rtol=0, atol=0, equal_nan=True, msg=f"{name}, {threads} threads"
                )
    finally:
        torch.set_num_threads(1)


def test_several_threads_work():
    """at::parallel_for is a plain loop in an extension that is built without OpenMP."""
    logits, targets = torch.randn(400, 8000), torch.zeros(400, dtype=torch.int64)

    def ticks():
        found = {}
        for path in Path("/proc/self/task").iterdir():
            fields = (path / "stat").read_text().rsplit(")", 1)[1].split()
            found[path.name] = int(fields[11]) + int(fields[12])
        return found

    try:
        torch.set_num_threads(2)
        csrc.logps_fwd(logits, targets)
        before, deadline = ticks(), time.monotonic() + 60
        busy = 0
        while busy < 2 and time.monotonic() < deadline:
            csrc.logps_fwd(logits, targets)
            busy = sum(after > before.get(thread, 0) for thread, after in ticks().items())
    finally:
        torch.set_num_threads(1)
    assert busy >= 2

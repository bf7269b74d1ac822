"""Every op in every system, side by side: `pytest --benchmark`.

Each result is compared with float64 before it is timed, in as many rounds as fit five seconds: at least five where a round
takes less than one second, at least two, at most twenty; StdDev is their spread. There is one table per op, in which the
number in brackets is the ratio to the fastest row. A CPU computes in float32, a CUDA device in bf16 (the times then include
the launch of the work; bench/gpu.py times the kernels alone). Half of the rows are prompt.
"""

import functools
import time

import pytest
import torch

from bench.ops import OPS, make_batch
from bench.systems import SYSTEMS, Check, inputs_of, load, offers, run

pytest.importorskip("pytest_benchmark", reason="pip install pytest-benchmark")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
SECONDS = 5.0  # time for the rounds of one row
LOGITS = {"pairs": 2, "t": 128, "d": 0, "v": 32000}  # 512 rows, 256 of them scored
HIDDEN = {"pairs": 4, "t": 128, "d": 576, "v": 49152}  # 1024 rows, 512 of them scored


def shape(op: str) -> str:
    sizes = HIDDEN if OPS[op].gemms else LOGITS
    rows = 2 * sizes["pairs"] * sizes["t"]
    return f"{rows // 2} x {sizes['d']} x {sizes['v']}" if OPS[op].gemms else f"{rows} x {sizes['v']}"


@functools.lru_cache(maxsize=1)  # tests of one op follow each other
def prepared(op: str):
    batch = make_batch(OPS[op], **(HIDDEN if OPS[op].gemms else LOGITS), dtype=DTYPE, device=DEVICE)
    return batch, Check(op, batch, DTYPE)


@pytest.mark.parametrize(
    ("op", "system"),
    [pytest.param(op, name, id=f"{name}: {op}") for op in OPS for name in SYSTEMS if offers(name, op)],
)
def test_op(op, system, benchmark):
    functions = load(system, DEVICE)
    if isinstance(functions, str):
        pytest.skip(f"{system}: {functions}")
    function, names = functions[OPS[op].function], inputs_of(system, op)
    batch, check = prepared(op)
    benchmark.extra_info["relative_errors"] = check(system, function)

    def inputs():
        fresh = batch.cast(DTYPE, names)
        if SYSTEMS[system].destroys:
            fresh.logits = fresh.logits.detach().clone().requires_grad_()
        return (fresh,), {}

    def step(fresh):
        run(function, fresh, names)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{op}, {shape(op)}, {DTYPE}".replace("torch.", "")
    benchmark.name = system
    step(inputs()[0][0])  # warms up
    (fresh,), _ = inputs()
    start = time.perf_counter()
    step(fresh)
    rounds = int(SECONDS / (time.perf_counter() - start))
    benchmark.pedantic(step, setup=inputs, rounds=min(max(rounds, 2), 20))

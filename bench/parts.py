"""The parts of bench.gpu's stages: what they measure, in which order, at which sizes. A part is a process of its own."""

import contextlib
import dataclasses
import time
from collections.abc import Callable

import torch

from bench import checks, programs
from bench.agreement import agreement
from bench.ceilings import ceilings, product_rates
from bench.chunks import SIZES, sweep
from bench.measure import OURS, PEERS, Bench
from bench.ops import OPS
from bench.results import Results


@dataclasses.dataclass(frozen=True)
class Plan:
    """The sizes. A logits shape is (N, V, rows per sequence, shares of scored rows), a hidden one (N, D, V)."""

    dry: bool
    dtype: torch.dtype
    repeats: int
    logits: tuple[tuple[int, int, int, tuple[float, ...]], ...]
    hidden: tuple[tuple[int, int, int], ...]
    rows_per_sequence: int
    chunk_sizes: tuple[int, ...]
    agreement: tuple[int, int, int, int]  # N, D, V, rows per sequence


# Shapes are in order of value: the reference shape, the models of the whole steps, and for logits a batch so small that two
# launches may cost more than one.
FULL = Plan(
    dry=False,
    dtype=torch.bfloat16,
    repeats=7,
    logits=((16384, 128256, 1024, (0.5, 1.0)), (1024, 128256, 256, (0.5,)), (16384, 151936, 1024, (0.5,))),
    hidden=((16384, 4096, 128256), (16384, 2048, 128256), (16384, 896, 151936)),
    rows_per_sequence=1024,
    chunk_sizes=SIZES,
    agreement=(16384, 4096, 128256, 1024),
)
DRY = Plan(
    dry=True,
    dtype=torch.float32,
    repeats=1,
    logits=((64, 300, 16, (0.5,)), (32, 300, 8, (1.0,))),
    hidden=((64, 16, 300),),
    rows_per_sequence=16,
    chunk_sizes=(16, 24, 4096),
    agreement=(64, 16, 300, 16),
)


def _top(results: Results, plan: Plan) -> dict:
    results.now("ceilings")
    return ceilings(results.clock, results.device, plan.dtype, plan.dry)


def _ceilings(results: Results, plan: Plan, seconds: float) -> None:
    with results.attempt(op="ceilings"):
        results.add(op="ceilings", **_top(results, plan))
    for n, d, v in plan.hidden:
        with results.attempt(op="products", shape=f"{n} x {d} x {v}"):
            gemms = product_rates(results.clock, results.device, plan.dtype, n, d, v)
            results.add(op="products", shape=f"{n} x {d} x {v}", gemms=gemms)


def _bench(results: Results, plan: Plan) -> Bench:
    return Bench(results, plan.dtype, plan.repeats, _top(results, plan), plan.rows_per_sequence)


def _logits_in(bench: Bench, plan: Plan, among) -> None:
    for n, v, t, shares in plan.logits:
        for op in (op for op in OPS if not OPS[op].gemms):
            for live in shares:
                bench.measure(op, n, 0, v, live, among, t)


def _hidden_in(bench: Bench, plan: Plan, among) -> None:
    # Training's work comes first: the loss with its gradients, before the log-probs alone.
    for n, d, v in plan.hidden:
        for op in sorted((op for op in OPS if OPS[op].gemms), key=lambda op: -OPS[op].gemms):
            bench.measure(op, n, d, v, 0.5, among)


def _rows(results: Results, plan: Plan, seconds: float) -> None:
    _logits_in(_bench(results, plan), plan, OURS)


def _head(results: Results, plan: Plan, seconds: float) -> None:
    _hidden_in(_bench(results, plan), plan, (*OURS, "bare GEMMs"))


def _peers(results: Results, plan: Plan, seconds: float) -> None:
    bench = _bench(results, plan)
    among = ("dpo_fast csrc", "dpo_fast triton", *PEERS)
    # Compiling would be most of the time at toy sizes. The stance ends with the part: tests share the process.
    with torch.compiler.set_stance("force_eager") if plan.dry else contextlib.nullcontext():
        _hidden_in(bench, plan, among)
        _logits_in(bench, plan, among)


def _programs(results: Results, plan: Plan, seconds: float) -> None:
    top = _top(results, plan)
    for n, v, t, _ in plan.logits:
        programs.sweep(results, plan.dtype, n, v, t, top, plan.repeats)


def _chunks(results: Results, plan: Plan, seconds: float) -> None:
    for n, d, v in plan.hidden:
        sweep(results, plan.dtype, n, d, v, plan.chunk_sizes)


def _agreement(results: Results, plan: Plan, seconds: float) -> None:
    agreement(results, plan.dtype, *plan.agreement)


def _steps(results: Results, plan: Plan, seconds: float) -> None:
    from bench import steps

    steps.measure(results, plan.dry, _top(results, plan), steps.cases(plan.dry), *((1, 1) if plan.dry else ()))


def _trl(results: Results, plan: Plan, seconds: float) -> None:
    from bench.trl_steps import beside

    beside(results, plan.dry, _top(results, plan))


def _smoke_tests(results: Results, plan: Plan, seconds: float) -> None:
    end = time.monotonic() + seconds
    for group in [checks.DRY] if plan.dry else checks.GROUPS:
        # One test of FlexAttention has inductor compile its kernels, which prints nothing.
        checks.run_tests(results, group, end - time.monotonic(), "smoke tests", 120)


def _all_tests(results: Results, plan: Plan, seconds: float) -> None:
    checks.run_tests(
        results, checks.DRY if plan.dry else ("-m", "gpu", *checks.side_by_side()), seconds, "GPU tests", 150
    )


def _sanitizer(results: Results, plan: Plan, seconds: float) -> None:
    chosen = [test for test in checks.SMOKE if "csrc" in test]
    checks.sanitize(results, seconds, checks.DRY if plan.dry else chosen)


@dataclasses.dataclass(frozen=True)
class Part:
    """`run(results, plan, seconds)`, which is ended after `seconds` or when it has printed nothing for `silence` seconds.

    The processes that it starts must end before it does, so run_tests gets a shorter silence.
    """

    stage: str
    run: Callable[[Results, Plan, float], None]
    seconds: float
    silence: float = 90


# The parts in the order in which they run.
PARTS = {
    "smoke-tests": Part("smoke", _smoke_tests, 150, silence=150),
    "ceilings": Part("smoke", _ceilings, 60),
    "rows": Part("smoke", _rows, 150),
    "programs": Part("smoke", _programs, 60),
    "chunks": Part("smoke", _chunks, 120),
    "agreement": Part("head", _agreement, 120),
    "head": Part("head", _head, 150),
    "steps": Part("head", _steps, 200),
    "peers": Part("head", _peers, 200, silence=180),  # they compile
    "trl": Part("head", _trl, 120),
    "all-tests": Part("tests", _all_tests, 360, silence=180),
    "sanitizer": Part("tests", _sanitizer, 240, silence=240),
}
STAGES = tuple(dict.fromkeys(part.stage for part in PARTS.values()))
PLANS: dict[bool, Plan] = {False: FULL, True: DRY}


def names(stage: str | None) -> list[str]:
    return [name for name, part in PARTS.items() if stage in (None, part.stage)]

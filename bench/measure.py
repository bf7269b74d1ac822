"""Ops of any system are first checked and then timed in turns, with one row per (op, shape, system).

`bytes` and `flops` of a row are the work that the op cannot avoid, the same for all systems; the floor is that work over
the ceiling of the same process. Half of the rows are prompt. Logits-in ops get them as ignored rows; hidden-in ops get
only the N rows that predict a scored token, except Liger, which needs the padded batch and gets the other N too.
"""

import statistics
import time
from collections.abc import Sequence

import torch

from bench.clock import differs
from bench.common import free, reason
from bench.ops import OPS, make_batch
from bench.results import Results
from bench.systems import SYSTEMS, Check, inputs_of, load, offers, run

SMALL = {"pairs": 2, "t": 32, "d": 128, "v": 1003}
T = 1024  # rows per sequence
OURS = tuple(name for name, system in SYSTEMS.items() if system.ours)
PEERS = tuple(name for name, system in SYSTEMS.items() if not system.ours)


def work(op: str, n: int, d: int, v: int, scored: int, itemsize: int) -> dict:
    """The fewest bytes or operations of `op`, with the count in words. `n` is the number of rows of logits or hidden states."""
    spec = OPS[op]
    if spec.gemms:
        return {"flops": 2 * spec.gemms * n * d * v, "count": f"{spec.gemms} GEMMs x 2 x {n} x {d} x {v}"}
    moved = (spec.reads * scored + spec.writes * n) * v * itemsize
    return {
        "bytes": moved,
        "count": f"({spec.reads} reads x {scored} + {spec.writes} writes x {n}) x {v} x {itemsize} B",
    }


class Bench:
    """Checks and measures ops until the results' deadline. `top` are the ceilings (ceilings.py)."""

    def __init__(self, results: Results, dtype: torch.dtype, repeats: int, top: dict, rows_per_sequence: int = T):
        self.results, self.dtype, self.repeats, self.top = results, dtype, repeats, top
        self.device, self.clock = results.device, results.clock
        self.rows_per_sequence = rows_per_sequence
        # (op, system) -> errors, or {"skipped": why it is missing}, or {"failed": why it is wrong}.
        self.known: dict[tuple[str, str], list[float] | dict[str, str]] = {}

    def systems(self, op: str, among: Sequence[str]) -> list[str]:
        return [name for name in among if offers(name, op) and name not in self.results.without]

    def check(self, op: str, among: Sequence[str]) -> None:
        """Compare systems with float64 on a small batch, and keep the results for `measure`."""
        asked = [name for name in self.systems(op, among) if (op, name) not in self.known]
        if not asked:
            return
        check = Check(op, make_batch(OPS[op], **SMALL, dtype=self.dtype, device=self.device, seed=1), self.dtype)
        for system in asked:
            self.results.now(f"check {op}", system)
            functions = load(system, self.device)
            if isinstance(functions, str):
                self.known[op, system] = {"skipped": functions}
                continue
            try:
                self.known[op, system] = check(system, functions[OPS[op].function])
            except Exception as error:  # a system that is wrong is not measured, and its row says so
                self.known[op, system] = {"failed": reason(error)}
                self.results.still_there()

    @property
    def wrong(self) -> list[str]:
        """Our own systems that failed their check, with the reason."""
        return [
            f"{op}, {system}: {found['failed']}"
            for (op, system), found in self.known.items()
            if SYSTEMS[system].ours and isinstance(found, dict) and "failed" in found
        ]

    def measure(
        self, op: str, n: int, d: int, v: int, live: float, among: Sequence[str] = tuple(SYSTEMS), t: int | None = None
    ) -> None:
        """Add one row for each system in `among` that has the op; all of them take turns. `t` is the rows per sequence."""
        head = {"op": op, "shape": f"{n} x {d} x {v}" if OPS[op].gemms else f"{n} x {v}"}
        head |= {"N": n, "D": d if OPS[op].gemms else None, "V": v, "scored": live}
        if self.results.out_of_time:
            self.results.add(**head, skipped="out of time")
            return
        with self.results.attempt(**head):
            self.check(op, among)
            self._measure(op, n, d, v, live, among, t or self.rows_per_sequence, head)
        free(self.device)
        if "torch.compile" in among:
            torch._dynamo.reset()

    def _measure(self, op, n, d, v, live, among, t, head) -> None:
        pairs = n // (2 * t) if not OPS[op].gemms else n // t  # hidden-in ops: n scored rows of 2n
        batch = make_batch(OPS[op], pairs, t, d, v, self.dtype, self.device, live=live, seed=time.time_ns() % 2**31)
        need = work(op, n, d, v, batch.scored, self.dtype.itemsize)
        calls, memory, timings = {}, {}, {}
        for system in self.systems(op, among):
            found = self.known[op, system]
            if isinstance(found, dict):
                self.results.add(**head, system=system, **found)
                continue
            if self.results.out_of_time:
                self.results.add(**head, system=system, skipped="out of time")
                continue
            self.results.now(f"{op} {head['shape']}", system)
            with self.results.attempt(**head, system=system):
                call = self.caller(system, op, batch)
                call()[1]()
                memory[system] = self.clock.peak_bytes(call()[1])
                calls[system], timings[system] = call, []
            free(self.device)
        for turn in range(self.repeats + 1):
            for system in list(calls):
                timing = None
                with self.results.attempt(**head, system=system):
                    keep, step = calls[system]()
                    timing = self.clock(step)
                    del keep, step
                if timing is None:
                    del calls[system], timings[system]
                elif turn:  # the first turn warms up
                    timings[system].append(timing)
        for system, found in timings.items():
            self.results.add(**head, system=system, **self.row(need, found), peak_bytes=memory[system],
                             relative_errors_small=self.known[op, system], note=SYSTEMS[system].note)  # fmt: skip

    def caller(self, system, op, batch):
        """A function () -> (what must stay alive, the call to time); logits that a call overwrites are copied outside it."""
        function, names = load(system, self.device)[OPS[op].function], inputs_of(system, op)
        inputs = batch.cast(self.dtype, names)
        if SYSTEMS[system].destroys:
            inputs.logits = None

        def call():
            ready = inputs
            if SYSTEMS[system].destroys:
                ready = inputs.__class__(**{**vars(inputs), "logits": batch.logits.detach().clone().requires_grad_()})
            return ready, lambda: (run(function, ready, names), None)[1]

        return call

    def row(self, need: dict, timings: list) -> dict:
        """The figures of one row: medians, and the figure from an idle device where it differs."""
        median = statistics.median(timing.seconds for timing in timings)
        kind = "bytes" if "bytes" in need else "flops"
        floor = need[kind] / self.top[f"{kind}_per_second"]
        row = {**need, "seconds": median, "all_seconds": [timing.seconds for timing in timings],
               f"{kind}_per_second": need[kind] / median, "floor_seconds": floor, "share_of_floor": floor / median}  # fmt: skip
        if timings[0].from_idle is not None:
            idle = statistics.median(timing.from_idle for timing in timings)
            if differs(median, idle):
                row["from_idle_seconds"] = idle
            if not all(timing.hidden for timing in timings):
                row["python_counted"] = True
        return row


def table(rows: list[dict]) -> str:
    """Rows of ops for people, one heading per (op, shape)."""
    lines, heading = [], None
    for row in rows:
        if "op" not in row:
            continue
        title = f"{row['op']}, {row['shape']}, {row['scored']:.0%} scored"
        if title != heading:
            lines, heading = [*lines, "", title], title
        name = f"  {row.get('system', 'all systems'):28}"
        if "seconds" not in row:
            lines.append(f"{name} {row.get('failed') or row['skipped']}")
            continue
        rate = row.get("bytes_per_second", 0) / 1e9 or row.get("flops_per_second", 0) / 1e12
        unit = "GB/s" if "bytes" in row else "TFLOP/s"
        peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:7.2f} GiB"
        lines.append(f"{name}{row['seconds'] * 1e3:10.3f} ms {rate:9.1f} {unit:8}{row['share_of_floor']:6.1%}  {peak}")
    return "\n".join(lines)

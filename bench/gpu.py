"""Every op on one GPU: time, rate, share of the floor and peak memory, beside plain torch and the peers.

    python -m bench.gpu               # tests, ceilings, checks, measurements; measurements stop after --minutes
    python -m bench.gpu --train       # then bench.train, in what is left of the time
    python -m bench.gpu --dry-run     # the same path at toy sizes on a CPU; no tests, no result file

The extension is built where it is not there yet. The GPU tests run first and stop everything when red; with --sanitize
compute-sanitizer (memcheck, then racecheck) runs the extension's tests too, which takes minutes. The ceilings are measured here: a large copy (read plus written)
and a bf16 GEMM on random data. Then for each op and shape: every system is compared with float64 on a small batch
(dpo_fast by the rule of STYLE.md; a peer within 5 %, its error is in the file), warmed up, and timed in turns, one call
a turn, with CUDA events; medians. Memory is the peak of one call beyond its inputs. bytes and flops are what the op
cannot avoid, the same for all systems; the floor is that over the ceiling. Half of the rows are prompt: logits-in ops
get them as ignored rows (the reference shape also with all rows scored), hidden-in ops get N live rows and only Liger,
which needs the padded batch, the other N too. One JSON file goes to bench/results/.
"""

import argparse
import functools
import gc
import json
import re
import statistics
import subprocess
import sys
import time

import torch

from bench.common import ROOT, conditions
from bench.systems import OPS, SYSTEMS, Check, inputs_of, load, make_batch, offers, run
from dpo_fast.backends import resolve

# (N, D, V, shares of scored rows of the logits-in ops)
SHAPES = [(16384, 4096, 128256, (0.5, 1.0)), (16384, 896, 151936, (0.5,)), (16384, 2048, 128256, (0.5,))]
DRY_SHAPES = [(64, 16, 300, (0.5, 1.0)), (64, 8, 500, (0.5,))]
SMALL = {"pairs": 2, "t": 32, "d": 128, "v": 1003}
T = 1024  # rows a sequence


class Clock:
    """Seconds of a call, by CUDA events or, without a GPU, by the host's clock; and its peak memory."""

    def __init__(self, device: str):
        self.cuda = device == "cuda"

    def __call__(self, call) -> float:
        if not self.cuda:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def peak_bytes(self, call) -> int | None:
        if not self.cuda:
            call()
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def ceilings(clock: Clock, device: str, dtype: torch.dtype, dry: bool, scale: int = 1) -> dict:
    """Bytes/s of a copy and operations/s of the best of two GEMMs, both `scale` times smaller than for a GPU."""
    size = 1 << 20 if dry else (4 << 30) // scale
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copies = [clock(functools.partial(target.copy_, source)) for _ in range(12)][2:]
    del source, target
    rates = {}
    for m, k, n in [(64, 64, 64)] if dry else [(8192, 8192, 8192 // scale), (16384 // scale, 4096, 65536 // scale)]:
        a = torch.randn(m, k, device=device, dtype=dtype)
        b = torch.randn(n, k, device=device, dtype=dtype)
        out = torch.empty(m, n, device=device, dtype=dtype)
        seconds = statistics.median([clock(functools.partial(torch.mm, a, b.T, out=out)) for _ in range(12)][2:])
        rates[f"{m} x {k} x {n}"] = 2 * m * k * n / seconds
        del a, b, out
    return {
        "bytes_per_second": 2 * size / statistics.median(copies),
        "flops_per_second": max(rates.values()),
        "gemms": rates,
    }


def work(op: str, n: int, d: int, v: int, scored: int, itemsize: int) -> dict:
    """The fewest bytes or operations of `op`, with the count in words. n: rows of the logits, or live rows."""
    spec = OPS[op]
    if spec.gemms:
        return {"flops": 2 * spec.gemms * n * d * v, "count": f"{spec.gemms} GEMMs x 2 x {n} x {d} x {v}"}
    moved = (spec.reads * scored + spec.writes * n) * v * itemsize
    return {
        "bytes": moved,
        "count": f"({spec.reads} reads x {scored} + {spec.writes} writes x {n}) x {v} x {itemsize} B",
    }


def is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)


def free(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


class Bench:
    """Checks and measures ops until `deadline` (time.monotonic)."""

    def __init__(self, device: str, dtype: torch.dtype, repeats: int, deadline: float, top: dict, rows: int = T):
        self.device, self.dtype, self.repeats, self.deadline, self.top = device, dtype, repeats, deadline, top
        self.rows_a_sequence = rows
        self.clock, self.rows, self.wrong = Clock(device), [], []
        self.known: dict[tuple[str, str], list[float] | str] = {}

    def check(self, op: str) -> None:
        """Compares every system with float64 on a small batch; what it finds is kept for `measure`."""
        check = Check(op, make_batch(OPS[op], **SMALL, dtype=self.dtype, device=self.device, seed=1), self.dtype)
        for system in SYSTEMS:
            if not offers(system, op):
                continue
            functions = load(system, self.device)
            if isinstance(functions, str):
                self.known[op, system] = functions
                continue
            try:
                self.known[op, system] = check(system, functions[OPS[op].function])
            except Exception as error:  # a peer may fail in any way; ours may not fail at all
                self.known[op, system] = f"{type(error).__name__}: {error}".splitlines()[0]
                if SYSTEMS[system].ours:
                    self.wrong.append(f"{op}, {system}: {self.known[op, system]}")
        torch._dynamo.reset()

    def measure(self, op: str, n: int, d: int, v: int, live: float) -> None:
        t = self.rows_a_sequence
        pairs = n // (2 * t) if not OPS[op].gemms else n // t  # hidden in: n live rows of 2n
        head = {"op": op, "N": n, "D": d if OPS[op].gemms else None, "V": v, "scored": live}
        try:
            batch = make_batch(OPS[op], pairs, t, d, v, self.dtype, self.device, live=live, seed=time.time_ns() % 2**31)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            self.rows.append({**head, "skipped": "its inputs do not fit"})
            return free(self.device)
        need = work(op, n, d, v, batch.scored, self.dtype.itemsize)
        calls, memory, times = {}, {}, {}
        for system in SYSTEMS:
            if not offers(system, op):
                continue
            found = self.known[op, system]
            if isinstance(found, str):
                self.rows.append({**head, "system": system, "skipped": found})
                continue
            # The last minute is for our own rows: peers compile.
            if time.monotonic() > self.deadline - 60 * (not SYSTEMS[system].ours):
                self.rows.append({**head, "system": system, "skipped": "out of time"})
                continue
            names = inputs_of(system, op)
            inputs = batch.cast(self.dtype, names)
            if SYSTEMS[system].destroys:
                inputs.logits = None
            call = self.caller(system, op, batch, inputs, names)
            try:
                call()[1]()
                memory[system] = self.clock.peak_bytes(call()[1])
                calls[system], times[system] = call, []
            except Exception as error:  # what fails at this size is a row, not the end
                why = "out of memory" if is_out_of_memory(error) else f"{type(error).__name__}: {error}".splitlines()[0]
                self.rows.append({**head, "system": system, "skipped": why})
            free(self.device)
        for turn in range(self.repeats + 1):
            for system, call in calls.items():
                keep, step = call()
                seconds = self.clock(step)
                del keep, step
                if turn:  # the first turn warms up
                    times[system].append(seconds)
        for system, seconds in times.items():
            self.rows.append({**head, "system": system, **self.row(need, seconds), "peak_bytes": memory[system],
                              "relative_errors_small": self.known[op, system], "note": SYSTEMS[system].note})  # fmt: skip
        del batch, calls
        free(self.device)

    def caller(self, system, op, batch, inputs, names):
        """() -> (what must live, the call to time); logits that a call overwrites are copied outside of it."""
        function = load(system, self.device)[OPS[op].function]

        def call():
            ready = inputs
            if SYSTEMS[system].destroys:
                ready = inputs.__class__(**{**vars(inputs), "logits": batch.logits.detach().clone().requires_grad_()})
            return ready, lambda: (run(function, ready, names), None)[1]

        return call

    def row(self, need: dict, seconds: list[float]) -> dict:
        median = statistics.median(seconds)
        kind = "bytes" if "bytes" in need else "flops"
        floor = need[kind] / self.top[f"{kind}_per_second"]
        return {**need, "seconds": median, "all_seconds": seconds, f"{kind}_per_second": need[kind] / median,
                "floor_seconds": floor, "share_of_floor": floor / median}  # fmt: skip


def prepared(sanitize: bool) -> bool:
    """Whether the tests are green; builds the extension first, and says where it cannot be."""
    # Before anything asks for it: what was once missing stays so in this process.
    subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        resolve("csrc", "cuda")
    except ValueError as error:
        print(f"without the extension: {error}")
    tests = [sys.executable, "-m", "pytest", "-m", "gpu"]
    runs = [tests]
    if sanitize:
        small = [*tests, "tests/test_ops.py", "tests/test_dpo_loss.py", "-k", "csrc"]
        runs += [["compute-sanitizer", "--tool", t, "--error-exitcode", "9", *small] for t in ("memcheck", "racecheck")]
    for command in runs:
        if subprocess.run(command, cwd=ROOT).returncode:
            print(f"red, nothing is measured: {' '.join(command)}")
            return False
    return True


def table(rows: list[dict]) -> str:
    lines, last = [], None
    for row in rows:
        title = f"{row['op']}, N={row['N']} D={row['D'] or '-'} V={row['V']}, {row['scored']:.0%} of the batch scored"
        if title != last:
            lines += [
                "",
                title + (f": {row['count']}, floor {row['floor_seconds'] * 1e3:.2f} ms" if "count" in row else ""),
            ]
            last = title
        if "skipped" in row:
            lines.append(f"  {row.get('system', ''):28} skipped: {row['skipped'][:100]}")
            continue
        rate = row.get("bytes_per_second", 0) / 1e9 or row.get("flops_per_second", 0) / 1e12
        unit = "GB/s" if "bytes" in row else "TFLOP/s"
        peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:7.2f} GiB"
        lines.append(
            f"  {row['system']:28}{row['seconds'] * 1e3:10.3f} ms {rate:9.1f} {unit:8}{row['share_of_floor']:6.1%}  {peak}"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=7.5, help="measurements that would start later are left out")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--train", action="store_true", help="run bench.train after it, in what is left of the time")
    parser.add_argument("--dry-run", action="store_true", help="toy sizes on a CPU, no result file")
    parser.add_argument(
        "--sanitize", action="store_true", help="run the extension's tests under compute-sanitizer first"
    )
    args = parser.parse_args()
    deadline = time.monotonic() + 60 * args.minutes
    if not args.dry_run and not torch.cuda.is_available():
        print("bench.gpu needs a CUDA device that torch can use, and found none; --dry-run tries it on a CPU")
        return 2
    device, dtype = ("cpu", torch.float32) if args.dry_run else ("cuda", torch.bfloat16)
    if not args.dry_run and not prepared(args.sanitize):
        return 1
    if args.dry_run:
        torch._dynamo.config.disable = True  # compiling is most of the time at toy sizes
    top = ceilings(Clock(device), device, dtype, args.dry_run)
    free(device)
    print(
        f"ceilings: copy {top['bytes_per_second'] / 1e12:.2f} TB/s, GEMM {top['flops_per_second'] / 1e12:.0f} TFLOP/s"
    )
    bench = Bench(device, dtype, 2 if args.dry_run else args.repeats, deadline, top, 16 if args.dry_run else T)
    for op in OPS:
        bench.check(op)
        print(f"checked {op}", file=sys.stderr)
    if bench.wrong:
        print("wrong results, nothing is measured:", *bench.wrong, sep="\n  ")
        return 1
    for n, d, v, lives in DRY_SHAPES if args.dry_run else SHAPES:
        for op in OPS:
            for live in (0.5,) if OPS[op].gemms else lives:
                bench.measure(op, n, d, v, live)
            torch._dynamo.reset()
    result = {
        **conditions(device, "bench.gpu"),
        "dtype": str(dtype).removeprefix("torch."),
        "ceilings": top,
        "rows": bench.rows,
    }
    print(table(bench.rows))
    print(f"{result['device']}, {result['dtype']}, {result['versions']}, {result['commit']}, {result['date']}")
    if not args.dry_run:
        path = ROOT / "bench/results" / f"gpu_{re.sub('[^a-z0-9]+', '_', result['device'].lower())}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(f"written to {path.relative_to(ROOT)}")
    left = deadline - time.monotonic()
    if args.train and not args.dry_run:
        try:
            subprocess.run([sys.executable, "-m", "bench.train"], cwd=ROOT, timeout=max(left, 1))
        except subprocess.TimeoutExpired:
            print("bench.train did not finish in the time that was left: run it by itself")
    return 0


if __name__ == "__main__":
    sys.exit(main())

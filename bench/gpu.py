"""All measurements on one GPU, in stages that each fit a call of ten minutes.

    python -m bench.gpu --stage smoke      # chosen tests, ceilings, row kernels, rows per chunk of the head
    python -m bench.gpu --stage head       # agreement of back ends at full size, hidden-in ops, whole steps, then peers
    python -m bench.gpu --stage tests      # all GPU tests, then compute-sanitizer
    python -m bench.gpu                    # all of them in that order
    python -m bench.gpu --dry-run          # the same path at toy sizes on a CPU

The extension is built first, and the clock of `--minutes` starts after that. A stage consists of parts (parts.py), each a
process of its own with a time limit. A part that dies or hangs is a row; its measurements so far are kept, and it is
started again without the system that was running. Rows are appended to one file in `--out`, as one JSON line each, as
soon as they are measured; README.md in this folder says how to read them. No failed measurement stops another.
"""

import argparse
import dataclasses
import datetime
import re
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch

from bench import checks
from bench.common import ROOT, conditions
from bench.parts import PARTS, PLANS, STAGES, names
from bench.processes import stream
from bench.results import DeviceLostError, Results, read

CHILD = [sys.executable, "-u", "-m", "bench.gpu"]
RESTARTS = 2  # restarts of one part, each without one more system
LOST = 3  # exit status of a part whose device no longer answers


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=STAGES, help="only this one")
    parser.add_argument("--out", type=Path, help="folder of the result file; default bench/results")
    parser.add_argument("--minutes", type=float, default=8, help="of a stage, without the build")
    parser.add_argument("--build-minutes", type=float, default=8, help="the build is given up after that; 0: no build")
    parser.add_argument("--dry-run", action="store_true", help="toy sizes on a CPU; --out is a temporary folder then")
    inner = parser.add_argument_group("one part, as the script calls itself")
    inner.add_argument("--part", choices=PARTS)
    inner.add_argument("--file", type=Path, help="result file to append to")
    inner.add_argument("--seconds", type=float, default=600)
    inner.add_argument("--without", nargs="*", default=[], help="systems to leave out")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if not args.dry_run and not torch.cuda.is_available():
        print("bench.gpu needs a CUDA device that torch can use, and found none; --dry-run tries it on a CPU")
        return 2
    device = "cpu" if args.dry_run else "cuda"
    folder = args.out or (Path(tempfile.mkdtemp()) if args.dry_run else ROOT / "bench/results")
    folder = folder.resolve()  # a part runs in the checkout
    folder.mkdir(parents=True, exist_ok=True)
    if args.part:
        return run_part(args, device, args.file or folder / f"{args.part}.jsonl")
    head = conditions(device, "bench.gpu")
    slug = re.sub("[^a-z0-9]+", "_", head["device"].lower()).strip("_")
    path = folder / f"gpu_{slug}_{datetime.datetime.now():%Y%m%d_%H%M%S}.jsonl"
    results = Results(path, device, float("inf"), part="run")
    results.add(**head, plan={**dataclasses.asdict(PLANS[args.dry_run]), "dtype": str(PLANS[args.dry_run].dtype)})
    command = [sys.executable, "-c", "print('a dry run builds nothing')"] if args.dry_run else checks.BUILD
    checks.build(results, 60 * args.build_minutes, command)
    well = True
    for stage in [args.stage] if args.stage else STAGES:
        well &= run_stage(results, stage, 60 * args.minutes, args.dry_run)
    print(summary(read(path)))
    print(f"written to {path}")
    return 0 if well else 1


def run_part(args: argparse.Namespace, device: str, path: Path) -> int:
    """Run one part in this process."""
    part = PARTS[args.part]
    warnings.filterwarnings("ignore", category=FutureWarning)  # hundreds of lines on renamed options
    # The part gets less time than its limit, since its rows must be written before it is killed.
    seconds = 0.9 * args.seconds
    results = Results(path, device, seconds, args.without, stage=part.stage, part=args.part)
    try:
        with results.attempt(op=args.part):
            part.run(results, PLANS[args.dry_run], seconds)
    except DeviceLostError as error:
        results.add(op=args.part, failed=f"the device is lost, the rest of this part is not measured: {error}")
        return LOST
    return 0


def run_stage(results: Results, stage: str, seconds: float, dry: bool) -> bool:
    """Run a stage's parts one after the other in the time that is left; returns whether all ended well."""
    end, well = time.monotonic() + seconds, True
    for name in names(stage):
        without: list[str] = []
        for _ in range(RESTARTS + 1):
            left = end - time.monotonic()
            if left < 10:
                results.add(stage=stage, op=name, skipped="out of time")
                break
            why, system = call_part(results.path, name, min(left, PARTS[name].seconds), without, dry)
            if why is None:
                break
            well = False
            again = bool(system) and system not in without
            results.add(stage=stage, op=name, system=system, failed=f"{why}, while it ran {system or 'no system'}")
            if not again:
                break
            without.append(system)
    return well


def call_part(path: Path, name: str, seconds: float, without: list[str], dry: bool) -> tuple[str | None, str]:
    """Run one part in a process of its own; returns what went wrong (None: nothing) and the system that it ran last."""
    command = [*CHILD, "--part", name, "--file", str(path), "--seconds", f"{seconds:.0f}"]
    command += ["--dry-run"] * dry
    command += ["--without", *without] if without else []
    last = [""]

    def hear(text: str) -> None:
        if text.startswith("now| "):
            last[0] = text.rpartition("|")[2]
        else:
            print(text, flush=True)

    why = stream(command, seconds, hear, PARTS[name].silence)
    if why == f"exit status {LOST}":
        why = "the device was lost"
    return why, last[0]


def summary(rows: list[dict]) -> str:
    """The end of the output, which a truncated log keeps: each op's and step's time, and what failed."""
    lines = ["", "times:"]
    for row in rows:
        if "seconds" in row:
            name = " | ".join(str(row[key]) for key in ("op", "model", "shape", "system", "variant") if row.get(key))
            share = next((f"{row[key]:.0%}" for key in ("share_of_floor", "share_of_gemm_ceiling") if row.get(key)), "")
            lines.append(f"  {name}: {row['seconds'] * 1e3:.3f} ms {share}".rstrip())
    failed = [
        f"  {row.get('op') or row.get('model')} | {row.get('system', '')}: {row['failed']}"[:200]
        for row in rows
        if "failed" in row
    ]
    wrong = [
        f"  {row['op']} | {row['system']} | {row['variant']}: {row['errors']}" for row in rows if row.get("ok") is False
    ]
    return "\n".join([*lines, *(["failed:", *failed] if failed else []), *(["wrong:", *wrong] if wrong else [])])


if __name__ == "__main__":
    sys.exit(main())

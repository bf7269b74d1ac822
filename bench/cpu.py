"""The losses on a CPU beside plain torch, torch.compile, the peers and the bare matrix products, in turns.

    python -m bench.cpu                    # float32 and bfloat16; at most --minutes (8)
    python -m bench.cpu --dtype bfloat16 --repeats 9

As in bench.gpu, every system is compared with float64 first and then timed by one call per turn; medians are reported.
`pytest --benchmark` has the same rows in float32 for a quick look. The speed of a shared machine drifts, and only turns
take that out of a ratio. One file per type goes to bench/results/, with a JSON line per row.
"""

import argparse
import sys

import torch

from bench.ceilings import ceilings
from bench.clock import Clock
from bench.common import ROOT, conditions
from bench.measure import Bench, table
from bench.results import Results
from bench.systems import SYSTEMS

# (op, D, V). Of the 512 rows half are scored in the logits-in op, and all in the hidden-in ops.
SHAPES = [
    ("dpo_loss + gradient", 0, 32000),
    ("dpo_loss + gradient", 0, 151936),
    ("linear_dpo_loss + gradient, frozen head", 576, 49152),
    ("linear_dpo_loss + gradient, trained head", 576, 49152),
]
ROWS = 512


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--minutes", type=float, default=8, help="of all types together; the rest is left out after that"
    )
    args = parser.parse_args()
    for name in args.dtype:
        dtype = getattr(torch, name)
        top = ceilings(Clock("cpu", from_idle=False), "cpu", dtype, dry=False, scale=16)
        path = ROOT / "bench/results" / f"ops_cpu_{name}.jsonl"
        path.unlink(missing_ok=True)
        results = Results(path, "cpu", 60 * args.minutes / len(args.dtype))
        results.clock = Clock("cpu", from_idle=False)
        head = results.add(**conditions("cpu", "bench.cpu"), dtype=name, ceilings=top)
        bench = Bench(results, dtype, args.repeats, top, rows_per_sequence=128)
        for op in dict.fromkeys(op for op, *_ in SHAPES):
            bench.check(op, tuple(SYSTEMS))
        if bench.wrong:
            print("wrong results, nothing is measured:", *bench.wrong, sep="\n  ")
            return 1
        for op, d, v in SHAPES:
            bench.measure(op, ROWS, d, v, 0.5)
        print(table(results.rows))
        print(f"{head['device']}, {name}, {head['versions']}, {head['commit']}, {head['date']}")
        print(f"written to {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

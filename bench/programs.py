"""Programs (blocks) per multiprocessor: the kernels that have a choice are timed at each.

More programs keep more rows in flight; with fewer, more of a row's second read comes from the cache. This measures which is
faster.
"""

import functools
import statistics

import torch

from bench.common import free
from bench.measure import work
from bench.ops import BETA, OPS, make_batch
from bench.results import Results
from dpo_fast.backends import resolve

# back end -> the launcher's argument; kernel -> its choices, the default first.
ARGUMENT = {"csrc": "blocks_per_sm", "triton": "programs_per_sm"}
CHOICES = {"dpo_fused": (3, 1), "residual_": (2, 1)}


def sweep(results: Results, dtype: torch.dtype, n: int, v: int, t: int, top: dict, repeats: int) -> None:
    """Add one row for each kernel, back end and choice, on logits [n, v] in sequences of t rows that are all scored."""
    for kernel in CHOICES:
        head = {"op": kernel, "shape": f"{n} x {v}"}
        if results.out_of_time:
            results.add(**head, skipped="out of time")
            continue
        with results.attempt(**head):
            _kernel(results, head, kernel, dtype, t, n, v, top, repeats)
        free(results.device)


def _kernel(results: Results, head: dict, kernel: str, dtype, t: int, n: int, v: int, top: dict, repeats: int) -> None:
    batch = make_batch(OPS["dpo_loss + gradient"], n // (2 * t), t, 0, v, dtype, results.device, live=1.0)
    logits, targets = batch.logits.flatten(0, 1), batch.targets.flatten()
    out = torch.empty_like(logits)
    bounds = (torch.arange(n // t + 1, dtype=torch.int32) * t).to(results.device)
    moved = work("dpo_loss + gradient", n, 0, v, n, dtype.itemsize)
    if kernel == "residual_":
        moved = {"bytes": 2 * logits.numel() * dtype.itemsize, "count": f"(1 read + 1 write) x {n} x {v}"}
    calls, times, results_of = {}, {}, {}
    for name, argument in ARGUMENT.items():
        system = f"dpo_fast {name}"
        try:
            launch = getattr(resolve(name, results.device), kernel)
        except ValueError as error:
            results.add(**head, system=system, skipped=str(error))
            continue
        for choice in CHOICES[kernel]:
            variant = f"{choice} per multiprocessor"
            if system in results.without:
                results.add(**head, system=system, variant=variant, skipped="left out: it ended the part before")
                continue
            results.now(f"{kernel} {variant}", system)
            if kernel == "residual_":
                call = functools.partial(launch, out, targets, **{argument: choice})
            else:
                options = {"loss_type": "sigmoid", "beta": BETA, "label_smoothing": 0.0, "discopop_tau": 0.05}
                options |= {"simpo_gamma": 0.5, "out": out, argument: choice}
                call = functools.partial(launch, logits, targets, bounds, None, 2 * t / n, **options)
            with results.attempt(**head, system=system, variant=variant):
                out.copy_(logits)
                call()
                results_of[system, variant] = out[:: max(n // 64, 1)].clone()
                calls[system, variant], times[system, variant] = call, []
    for turn in range(repeats + 1):
        for key, call in list(calls.items()):
            timing = None
            with results.attempt(**head, system=key[0], variant=key[1]):
                out.copy_(logits)
                timing = results.clock(call).seconds
            if timing is None:
                del calls[key], times[key]
            elif turn:
                times[key].append(timing)
    first = next(iter(results_of.values()), None)
    for key, found in times.items():
        seconds = statistics.median(found)
        apart = ((results_of[key].double() - first.double()).abs().max() / first.double().abs().max()).item()
        share = moved["bytes"] / top["bytes_per_second"] / seconds
        results.add(**head, system=key[0], variant=key[1], **moved, seconds=seconds, all_seconds=found,
                    bytes_per_second=moved["bytes"] / seconds, share_of_floor=share, errors={"from the first": apart})  # fmt: skip

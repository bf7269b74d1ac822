"""Rows per chunk of the head: its three products, the row kernel between them, and a pass of all of them, at each size.

One product writes a chunk of the logits, the row kernel overwrites it with the residual, and two products read that. These
measurements decide how many rows a chunk should have; the package's own choice is one of the sizes.
"""

import statistics

import torch

from bench.ceilings import chunk_rows, head_products, median_seconds
from bench.common import free
from bench.results import Results
from dpo_fast.backends import BACKENDS, resolve
from dpo_fast.ops.tiles import add_product

SIZES = (1024, 1046, 2048, 4096)


def sweep(results: Results, dtype: torch.dtype, n: int, d: int, v: int, sizes=SIZES, repeats: int = 5) -> None:
    """Add one row for each size and product or kernel, then one each for a frozen and a trained head over all `n` rows."""
    device = results.device
    hidden = torch.randn(n, d, device=device, dtype=dtype)
    weight = torch.randn(v, d, device=device, dtype=dtype).mul_(2 / d**0.5)
    targets = torch.randint(v, (n,), device=device)
    frozen, kept = chunk_rows(n, weight)
    head = {"D": d, "V": v, "in_use": [frozen, kept]}
    for rows in dict.fromkeys((*sizes, frozen, kept)):
        if rows > n or results.out_of_time:
            results.add(
                op="chunk", shape=f"{rows} x {d} x {v}", **head, skipped=f"N is {n}" if rows > n else "out of time"
            )
            continue
        shape = {"shape": f"{rows} x {d} x {v}", "rows": rows, **head}
        with results.attempt(op="chunk", **shape):
            _products(results, shape, hidden, weight, rows, repeats)
        for name in BACKENDS:
            with results.attempt(op="residual_", system=name, **shape):
                _row_kernel(results, shape, hidden, weight, targets, rows, name, repeats)
        for trained in (False, True):
            op = f"chunks of a {'trained' if trained else 'frozen'} head"
            with results.attempt(op=op, **shape):
                call = one_pass(hidden, weight, targets, rows, trained)
                seconds = median_seconds(results.clock, call, repeats)
                flops = (3 if trained else 2) * 2 * n * d * v
                results.add(op=op, N=n, **shape, seconds=seconds, flops_per_second=flops / seconds)
            free(device)


def _products(results: Results, shape, hidden, weight, rows, repeats) -> None:
    flops = 2 * rows * weight.numel()
    for name, call in head_products(hidden, weight, rows).items():
        seconds = median_seconds(results.clock, call, repeats)
        results.add(op=f"product {name}", **shape, seconds=seconds, flops_per_second=flops / seconds)


def _row_kernel(results: Results, shape, hidden, weight, targets, rows, name, repeats) -> None:
    """Time `residual_` on a tile that a product has just written, as in the head, since the cache still holds part of it."""
    system = f"dpo_fast {name}"
    if system in results.without:
        results.add(op="residual_", system=system, **shape, skipped="left out: it took the device with it before")
        return
    try:
        launch = resolve(name, results.device)
    except ValueError as error:
        results.add(op="residual_", system=system, **shape, skipped=str(error))
        return
    results.now(f"residual_ {shape['shape']}", system)
    tile = hidden[:rows] @ weight.T
    alone, both = [], []
    for turn in range(repeats + 2):
        product = results.clock(lambda: torch.mm(hidden[:rows], weight.T, out=tile)).seconds

        def product_and_rows():
            torch.mm(hidden[:rows], weight.T, out=tile)
            launch.residual_(tile, targets[:rows])

        pair = results.clock(product_and_rows).seconds
        if turn > 1:
            alone.append(product)
            both.append(pair)
    seconds = statistics.median(both) - statistics.median(alone)
    moved = 2 * tile.numel() * tile.element_size()
    rate = {"bytes_per_second": moved / seconds} if seconds > 0 else {}
    results.add(op="residual_", system=system, **shape, seconds=seconds, bytes=moved, **rate,
                with_product_seconds=statistics.median(both))  # fmt: skip


def one_pass(hidden, weight, targets, rows: int, trained: bool):
    """The head's whole work in chunks of `rows`, without coefficients, as the package does it at its own size."""
    launch = resolve(None, hidden.device, hidden.dtype)
    n = len(hidden)
    tile = hidden.new_empty(rows, len(weight))
    dh = torch.empty_like(hidden)

    def run():
        dw = None
        for a in range(0, n, rows):
            h = hidden[a : a + rows]
            part = tile[: len(h)]
            torch.mm(h, weight.T, out=part)
            launch.residual_(part, targets[a : a + rows])
            torch.mm(part, weight, out=dh[a : a + rows])
            if trained:
                dw = add_product(dw, part.T, h)

    return run

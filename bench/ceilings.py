"""The most that the device can do, measured in the same process as the ops: a copy, and products at the shapes in use."""

import functools
import statistics
from collections.abc import Callable

import torch

from bench.clock import Clock
from bench.common import is_out_of_memory
from dpo_fast.backends.eager import chunks, rows_within, tile_rows
from dpo_fast.ops import WORKSPACE_BYTES
from dpo_fast.ops.tiles import workspace_rows


def median_seconds(clock: Clock, call, turns: int = 10) -> float:
    """The median time of `turns` calls, after two calls to warm up."""
    return statistics.median([clock(call).seconds for _ in range(turns + 2)][2:])


def copy_rate(clock: Clock, device: str, size: int) -> float:
    """Bytes per second of a copy of `size` random bytes, read plus written."""
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / median_seconds(clock, functools.partial(target.copy_, source))


def gemm_rate(clock: Clock, device: str, dtype: torch.dtype, m: int, k: int, n: int) -> float:
    """Operations per second of [m, k] @ [n, k].T on random data."""
    a = torch.randn(m, k, device=device, dtype=dtype)
    b = torch.randn(n, k, device=device, dtype=dtype)
    out = torch.empty(m, n, device=device, dtype=dtype)
    return 2 * m * k * n / median_seconds(clock, functools.partial(torch.mm, a, b.T, out=out))


def head_products(hidden, weight, rows: int) -> dict[str, Callable[[], object]]:
    """The three products of a head for `rows` rows of hidden [N, D] and weight [V, D], each ready to be called."""
    h = hidden[:rows]
    tile = h @ weight.T
    dh, dw = torch.empty_like(h), torch.empty_like(weight)
    return {
        "logits": lambda: torch.mm(h, weight.T, out=tile),
        "dH": lambda: torch.mm(tile, weight, out=dh),
        "dW": lambda: torch.mm(tile.T, h, out=dw),
    }


def chunk_rows(n: int, weight: torch.Tensor) -> tuple[int, int]:
    """Rows per chunk of a frozen head, and how many of `n` rows a trained head keeps, by the package's own rule."""
    tile = tile_rows(len(weight), weight.dtype, weight.device.type)
    return chunks(n, tile)[0][1], rows_within(n, workspace_rows(weight, WORKSPACE_BYTES))


def product_rates(clock: Clock, device: str, dtype: torch.dtype, n: int, d: int, v: int) -> dict[str, float]:
    """Operations per second of the head's products, in one piece (`n` rows) and at the rows per chunk in use."""
    hidden = torch.randn(n, d, device=device, dtype=dtype)
    weight = torch.randn(v, d, device=device, dtype=dtype)
    rates = {}
    for rows in dict.fromkeys((n, *chunk_rows(n, weight))):
        try:
            for name, call in head_products(hidden, weight, rows).items():
                rates[f"{name}, {rows} x {d} x {v}"] = 2 * rows * d * v / median_seconds(clock, call, 5)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
    return rates


def ceilings(clock: Clock, device: str, dtype: torch.dtype, dry: bool, scale: int = 1) -> dict:
    """Bytes/s of a copy and operations/s of the better of two large GEMMs, both `scale` times smaller than for a GPU."""
    copied = copy_rate(clock, device, 1 << 20 if dry else (4 << 30) // scale)
    shapes = [(64, 64, 64)] if dry else [(8192, 8192, 8192 // scale), (16384 // scale, 4096, 65536 // scale)]
    rates = {f"{m} x {k} x {n}": gemm_rate(clock, device, dtype, m, k, n) for m, k, n in shapes}
    return {"bytes_per_second": copied, "flops_per_second": max(rates.values()), "gemms": rates}

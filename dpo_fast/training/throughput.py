"""The speed of a run: tokens and pairs per second, the share of tokens that were not computed, and use of the GPU."""

import contextlib
import time
from collections.abc import Callable

import torch


class Throughput:
    """Counts and time between two logs, without the time spent in evaluation and saving."""

    def __init__(self):
        self._counts: torch.Tensor | list[float] = [0.0] * 7  # since the last report, in the order of `add`
        self._tokens: torch.Tensor | float = 0.0  # tokens that `take_tokens` has not taken yet
        self._totals: torch.Tensor | list[float] = [0.0] * 7  # the same counts for the whole run
        self._seconds = 0.0  # time of the whole run, up to the last report
        self._pause = 0.0
        self.restart()

    def restart(self) -> None:
        """Start the clock again."""
        self._since, self._pause = time.perf_counter(), 0.0

    def add(self, counts) -> None:
        """Add counts over all ranks: pairs, chosen tokens, tokens (packed: unshared, unpadded), rows, live items, live items
        with a gradient, and tokens of the same batches padded to their longest sequence."""
        self._counts = [a + b for a, b in zip(self._counts, counts, strict=True)]
        self._totals = [a + b for a, b in zip(self._totals, counts, strict=True)]
        self._tokens = self._tokens + counts[2]

    @contextlib.contextmanager
    def paused(self):
        """Do not count the time spent inside."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._pause += time.perf_counter() - start

    def take_tokens(self) -> int:
        """Tokens added since the last call."""
        tokens, self._tokens = int(self._tokens), 0.0
        return tokens

    def _elapsed(self) -> float:
        return max(time.perf_counter() - self._since - self._pause, 1e-9)

    def totals(self) -> dict[str, float]:
        """`seconds`, `pairs_per_second`, `tokens_saved` and `tokens_saved_of_padded` of the whole run, up to now.

        The last two are shares: of packed tokens (each sequence whole, no padding) and of padded ones.
        """
        pairs, _, tokens, rows, _, _, padded = (float(c) for c in self._totals)
        seconds = self._seconds + self._elapsed()
        saved = {"tokens_saved": 1 - rows / max(tokens, 1), "tokens_saved_of_padded": 1 - rows / max(padded, 1)}
        return {"seconds": seconds, "pairs_per_second": pairs / seconds, **saved}

    def report(self, flops: Callable[[float, float, float], float], accelerator) -> dict[str, float]:
        """`perf/...` since the last report; `flops(rows, live, grad)` gives the operations of a forward and backward pass.

        `perf/tokens_saved` is a share of packed tokens, `perf/tokens_saved_of_padded` a share of padded tokens.
        """
        seconds = self._elapsed()
        self._seconds += seconds
        pairs, _, tokens, rows, *live, padded = (float(c) for c in self._counts)
        self._counts = [0.0] * 7
        self.restart()
        if not tokens:
            return {}
        result = {
            "perf/tokens_per_second": tokens / seconds,
            "perf/pairs_per_second": pairs / seconds,
            "perf/tokens_saved": 1 - rows / tokens,
            "perf/tokens_saved_of_padded": 1 - rows / padded,
        }
        peak = peak_flops(accelerator.device)
        if peak is not None:
            result["perf/mfu"] = flops(rows, *live) / seconds / peak / accelerator.num_processes
        return result


# Dense bf16 tensor-core peak in FLOP/s from the vendor's data sheets, without sparsity.
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12, "4090": 165e12}


def peak_flops(device: torch.device) -> float | None:
    """The peak bf16 rate of a CUDA device, or None for one that is not in the table (an H100 PCIe has less: 756e12)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name and "PCIe" not in name), None)

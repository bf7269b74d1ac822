"""Time and memory of a call on a GPU, and on a CPU by the same code with a stand-in for torch.cuda.

A GPU runs behind Python: an idle GPU records the first event before Python has launched anything, and the time of a short
call would then be Python's. So the GPU is put to sleep before the first event, for longer than Python takes to launch the
call. The time of the call on an idle GPU is measured too.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

SHORTEST_SLEEP, LONGEST_SLEEP = 1 << 21, 1 << 27  # cycles: about 1 ms and about 70 ms at 1.9 GHz


class HostEvent:
    """A torch.cuda.Event of a device that is never behind."""

    def __init__(self, enable_timing: bool = True):
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def query(self) -> bool:
        return False  # as if the device still slept, so that no sleep is too short

    def elapsed_time(self, end: "HostEvent") -> float:
        return (end.at - self.at) * 1e3


class Host:
    """The part of torch.cuda that is used here, for a CPU. Memory is not counted there."""

    Event = HostEvent

    def synchronize(self) -> None:
        pass

    def _sleep(self, cycles: int) -> None:
        pass

    def reset_peak_memory_stats(self) -> None:
        pass

    def memory_allocated(self) -> None:
        return None

    def max_memory_allocated(self) -> None:
        return None

    def set_sync_debug_mode(self, mode: str) -> None:
        pass


class Timing(NamedTuple):
    """Seconds of a call on a busy device and from an idle one, where Python's launches count."""

    seconds: float
    from_idle: float | None  # None where it was not measured
    hidden: bool  # whether the sleep was longer than the launches; if not, `seconds` counts Python too


class Clock:
    """`clock(call)` returns a Timing. `from_idle=False` leaves that measurement out, which is half of the work."""

    def __init__(self, device: str, from_idle: bool = True, cuda=None):
        self.cuda = cuda or (torch.cuda if device == "cuda" else Host())
        self.from_idle, self.cycles = from_idle, SHORTEST_SLEEP

    def __call__(self, call: Callable[[], object]) -> Timing:
        idle, hidden = self._once(call, 0)[0] if self.from_idle else None, False
        while not hidden:
            seconds, hidden = self._once(call, self.cycles)
            if not hidden and 4 * self.cycles > LONGEST_SLEEP:
                # The call waits for the device itself, or its launches take longer than the longest sleep.
                self.cycles = SHORTEST_SLEEP
                break
            if not hidden:
                self.cycles *= 4
        return Timing(seconds, idle, hidden)

    def _once(self, call, cycles: int) -> tuple[float, bool]:
        begin, end = (self.cuda.Event(enable_timing=True) for _ in range(2))
        self.cuda.synchronize()
        if cycles:
            self.cuda._sleep(cycles)
        begin.record()
        call()
        end.record()
        hidden = not begin.query()
        self.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3, hidden

    def peak_bytes(self, call) -> int | None:
        """The most memory during a call beyond what was allocated before it."""
        self.cuda.synchronize()
        self.cuda.reset_peak_memory_stats()
        before = self.cuda.memory_allocated()
        call()
        self.cuda.synchronize()
        peak = self.cuda.max_memory_allocated()
        return None if peak is None else peak - before


def differs(seconds: float, from_idle: float | None) -> bool:
    """Whether the two figures differ enough to report both."""
    return from_idle is not None and abs(from_idle - seconds) > 0.02 * seconds

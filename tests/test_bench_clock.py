"""What bench.gpu counts on a device that runs behind its host: the time of the device, and the waits of the host."""

import warnings

import pytest
import torch

from bench import profiling
from bench.clock import LONGEST_SLEEP, Clock


class Simulated:
    """A device behind a host: launches take the host's time, and run one after the other."""

    def __init__(self):
        self.now = self.free_at = 0.0
        simulated = self

        class Event:
            def __init__(self, enable_timing):
                pass

            def record(self):
                self.at = max(simulated.now, simulated.free_at)

            def query(self):
                return self.at <= simulated.now

            def elapsed_time(self, end):
                return 1e3 * (end.at - self.at)

        self.Event = Event

    def launch(self, host: float, device: float) -> None:
        self.now += host
        self.free_at = max(self.now, self.free_at) + device

    def _sleep(self, cycles):
        self.launch(0, cycles / 2e9)

    def synchronize(self):
        self.now = max(self.now, self.free_at)


@pytest.mark.parametrize("launches", [1, 10, 200])
def test_python_is_not_counted(launches):
    """A launch takes Python 100 us and the device 10 us: from an idle device Python's time shows, from a busy one it does not."""
    device = Simulated()
    timing = Clock("cuda", cuda=device)(lambda: [device.launch(100e-6, 10e-6) for _ in range(launches)])
    assert timing.seconds == pytest.approx(launches * 10e-6)
    assert timing.hidden
    assert timing.from_idle == pytest.approx(launches * 100e-6 + 10e-6)


def test_a_call_that_waits_is_said_to_count_python():
    device, calls = Simulated(), []

    def waits():
        calls.append(0)
        device.launch(100e-6, 10e-6)
        device.synchronize()
        device.launch(100e-6, 10e-6)

    timing = Clock("cuda", cuda=device)(waits)
    assert not timing.hidden
    assert len(calls) < 8
    assert device.now < 10 * LONGEST_SLEEP / 1e9


def test_waits_are_counted_where_they_are():
    modes = []

    class Cuda:
        def set_sync_debug_mode(self, mode):
            modes.append(mode)

    def step():
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation (function operator())", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    found = profiling.waits(step, Cuda())
    assert found["waits"] == 2
    ((place, count),) = found["wait_places"].items()
    assert place.startswith("tests/test_bench_clock.py:")
    assert count == 2
    assert modes == ["warn", "default"]


def test_named_ranges_are_no_operators():
    """On a GPU a range that an optimizer names is as long as the kernels in it, which would count twice."""

    def step():
        with torch.profiler.record_function("a range"):
            torch.ones(3).add(1)

    names = {name for name, *_ in profiling.kernels(step, "cpu")["dearest"]}
    assert "aten::add" in names
    assert "a range" not in names

"""The contents of a step: launches, the most expensive kernels, and the places where Python waits for the device."""

import collections
import warnings
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

DEAREST = 15


def kernels(call, device: str) -> dict:
    """`launches`, `kernel_seconds` (of all kernels) and the most expensive kernels (name, calls, seconds) of one call.

    A CPU has no kernels, so its operators are counted instead.
    """
    on_gpu = device == "cuda"
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]
    with profile(activities=activities) as profiler:
        call()
        if on_gpu:
            torch.cuda.synchronize()
    averages = profiler.key_averages()
    kind = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    # A named range of Python code (an optimizer's step) is also an event of the device, as long as its kernels together.
    rows = [event for event in averages if event.device_type == kind and not event.is_user_annotation]

    def micros(event) -> float:
        return event.self_device_time_total if on_gpu else event.self_cpu_time_total

    rows.sort(key=micros, reverse=True)
    dearest = [[event.key[:120], event.count, round(micros(event) * 1e-6, 9)] for event in rows[:DEAREST]]
    return {
        "launches": sum(e.count for e in averages if "LaunchKernel" in e.key),
        "kernels_on_device": sum(e.count for e in rows),
        "kernel_seconds": sum(map(micros, rows)) * 1e-6,
        "dearest": dearest,
    }


def waits(call, cuda) -> dict:
    """How often Python waits for the device in one call, and where (file:line), by torch's own warnings.

    `cuda` is torch.cuda or its stand-in.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            cuda.set_sync_debug_mode("default")
    found = [w for w in caught if "synchronizing CUDA operation" in str(w.message)]
    places = collections.Counter(f"{'/'.join(Path(w.filename).parts[-2:])}:{w.lineno}" for w in found)
    return {"waits": len(found), "wait_places": dict(places.most_common())}

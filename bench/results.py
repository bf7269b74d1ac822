"""Rows of measurements, each printed and appended to a file as one JSON line as soon as it exists.

A run that is killed in the middle keeps every row before that. A failure is a row too.
"""

import contextlib
import json
import time
from collections.abc import Sequence
from pathlib import Path

from bench.clock import Clock
from bench.common import free, reason


class DeviceLostError(Exception):
    """The device no longer answers, so this process can measure no further row."""


class Results:
    """The rows of one part. `common` (part and stage) is in every row; `without` names systems that must not run again."""

    def __init__(self, path: Path, device: str, seconds: float, without: Sequence[str] = (), **common):
        self.path, self.device, self.without, self.common = path, device, tuple(without), common
        self.deadline = time.monotonic() + seconds
        self.clock = Clock(device)
        self.rows: list[dict] = []

    def add(self, **row) -> dict:
        row = {**self.common, **row}
        self.rows.append(row)
        with self.path.open("ab+") as file:
            # The process that wrote before may have been killed in the middle of a line.
            whole = file.tell() == 0 or (file.seek(-1, 2), file.read())[1] == b"\n"
            file.write((b"" if whole else b"\n") + json.dumps(row).encode() + b"\n")
        print(line(row), flush=True)
        return row

    @property
    def out_of_time(self) -> bool:
        return time.monotonic() > self.deadline

    def now(self, what: str, system: str = "") -> None:
        """Print what runs next, so that the watching process knows what hangs and that it can leave out `system`."""
        print(f"now| {what} |{system}", flush=True)

    @contextlib.contextmanager
    def attempt(self, **head):
        """Turn a failure inside into a row "failed" with `head`. Raises DeviceLostError where no measurement can follow."""
        try:
            yield
        except DeviceLostError:
            raise
        except Exception as error:  # a peer, a kernel or the device may fail in any way
            self.add(**head, failed=reason(error))
            # The traceback's frames hold tensors as large as those that did not fit.
            error.__traceback__ = None
            self.still_there()
            free(self.device)

    def still_there(self) -> None:
        """Raise DeviceLostError where an error has taken the device with it."""
        try:
            self.clock.cuda.synchronize()
        except RuntimeError as error:  # an error of a kernel stays in its context
            raise DeviceLostError(reason(error)) from error


def read(path: Path) -> list[dict]:
    """The rows of a file; a last line that was cut off is left out."""
    rows = []
    for text in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(text))
    return rows


def line(row: dict) -> str:
    """A row as one line for people; the file has all of it."""
    names = [
        str(row[key]) for key in ("part", "op", "model", "shape", "system", "variant") if row.get(key) not in (None, "")
    ]
    text = f"{' | '.join(names)}: "
    for key in ("failed", "skipped"):
        if key in row:
            return f"{text}{key}: {row[key]}"
    told = {key: value for key, value in row.items() if key in TOLD and value is not None}
    return text + ", ".join(f"{key} {TOLD[key](value)}" for key, value in told.items())


def _times(value: float) -> str:
    return f"{value * 1e3:.3f} ms"


def _share(value: float) -> str:
    return f"{value:.1%}"


# The entries of a row that `line` shows, and their format.
TOLD = {
    "seconds": _times,
    "from_idle_seconds": _times,
    "share_of_floor": _share,
    "bytes_per_second": lambda x: f"{x / 1e9:.0f} GB/s",
    "flops_per_second": lambda x: f"{x / 1e12:.1f} TFLOP/s",
    "peak_bytes": lambda x: x if isinstance(x, str) else f"{x / 2**30:.2f} GiB",
    "pairs_per_second": lambda x: f"{x:.1f}",
    "tokens_per_second": lambda x: f"{x:.0f}",
    "mfu": _share,
    "launches": str,
    "waits": str,
    "ok": str,
    "errors": lambda errors: ", ".join(f"{name} {error:.1e}" for name, error in errors.items()),
    "gemms": lambda rates: ", ".join(f"{name}: {rate / 1e12:.1f} TFLOP/s" for name, rate in rates.items()),
    "passed": str,
    "red": str,
    "took": lambda x: f"{x:.1f} s",
    "versions": str,
    "commit": str,
    "date": str,
    "device": str,
}

"""Commands with a time limit, read line by line, so that their output before the end is kept."""

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence

from bench.common import ROOT


class Watch:
    """Kills a process group at its limit, or when it prints nothing for `silence` seconds after its first line."""

    def __init__(self, process: subprocess.Popen, seconds: float, silence: float | None):
        self.process, self.silence, self.why = process, silence, None
        self.end, self.heard = time.monotonic() + seconds, float("inf")  # before its first line it imports
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._run, args=(seconds,), daemon=True)
        self.thread.start()

    def _run(self, seconds: float) -> None:
        while not self.done.wait(0.2):
            now = time.monotonic()
            if now > self.end:
                self.why = f"timed out after {seconds:.0f} s"
            elif self.silence is not None and now > self.heard + self.silence:
                self.why = f"said nothing for {self.silence:.0f} s"
            if self.why:
                kill(self.process)
                return


def kill(process: subprocess.Popen) -> None:
    """Kill the process and its children."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def stream(
    command: Sequence[str], seconds: float, on_line: Callable[[str], None], silence: float | None = None
) -> str | None:
    """Run `command` in the checkout and pass each line of its output to `on_line`; returns what went wrong, or None.

    The command is killed after `seconds`, or after `silence` seconds without another line.
    """
    try:
        # The command gets a process group of its own in this session, so that the session's end is its end too.
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            process_group=0,
        )  # fmt: skip
    except OSError as error:
        return str(error)
    watch = Watch(process, max(seconds, 0), silence)
    try:
        for text in process.stdout:
            watch.heard = time.monotonic()
            on_line(text.rstrip("\n"))
        process.wait()
    finally:
        watch.done.set()
        watch.thread.join()
        kill(process)
    if watch.why:
        return watch.why
    code = process.returncode
    return None if code == 0 else f"ended by signal {-code}" if code < 0 else f"exit status {code}"

"""A model server for the time of one generation: it is started with that round's weights, awaited, and ended."""

import contextlib
import ctypes
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

_PR_SET_PDEATHSIG = 1


@contextlib.contextmanager
def serving(
    command: str, model: str, log_file: str | Path, *, timeout: float = 600.0
) -> Iterator[tuple[str, Callable[[], None]]]:
    """Start a server by `command`, in which {model} and {port} are filled in, and yield (url, check).

    The server's output goes to `log_file`. This waits, for `timeout` seconds at most, until the server says that it is
    ready (/health, or /v1/models where there is no /health).
    `check()` raises ValueError when the server has ended. Raises ValueError for a command that cannot work.
    """
    for name in ("{model}", "{port}"):
        if name not in command:
            raise ValueError(f"serve must hold {name}, such as: vllm serve {{model}} --port {{port}}")
    port = _free_port()
    words = [word.replace("{model}", model).replace("{port}", str(port)) for word in shlex.split(command)]
    with open(log_file, "ab") as log:
        try:
            # The server gets a process group of its own, so that its workers end with it.
            process = subprocess.Popen(
                words, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_end_with_us
            )
        except OSError as error:
            raise ValueError(f"serve cannot start {words[0]}: {error.strerror}") from None

        def check() -> None:
            if process.poll() is not None:
                raise ValueError(
                    f"the server ended with status {process.returncode} ({_last_line(log_file)}); see {log_file}. What "
                    "was generated is kept: run the same command again to go on"
                )

        try:
            url = f"http://127.0.0.1:{port}"
            _wait(url, check, timeout, log_file)
            yield url, check
        finally:
            _end(process)


def _end_with_us() -> None:
    """Have the server end when this process does, even by a kill: otherwise it would keep the accelerator's memory."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait(url: str, check: Callable[[], None], timeout: float, log_file) -> None:
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        check()
        if _status(url + "/health") == 200 or (_status(url + "/health") == 404 and _status(url + "/v1/models") == 200):
            return
        time.sleep(0.2)
    raise ValueError(f"the server did not answer within {timeout:g} s; see {log_file}")


def _status(url: str) -> int | None:
    """The HTTP status of a request, or None where nobody answers."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


def _end(process: subprocess.Popen) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=20)
    process.wait()


def _last_line(path) -> str:
    lines = Path(path).read_text(errors="replace").split("\n")
    return next((line.strip()[:200] for line in reversed(lines) if line.strip()), "it printed nothing")

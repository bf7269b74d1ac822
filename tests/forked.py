"""Programs in processes of their own that start at once: forks of one process that has imported what all of them import.

The imports of torch, transformers and the trainer take longer than most runs of a test. The process that is forked (a
`forkserver` of the standard library) has imported them and computed nothing, so that a fork is as good as a new process: it
has its own pid, signals, environment, folder, output and exit status. What is read from the environment while torch or
transformers is imported cannot be set.
"""

import contextlib
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from multiprocessing import forkserver
from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
IMPORTED = [
    "dpo_fast.train",
    "dpo_fast.training.trainer",
    "transformers.models.llama",
    "peft",
    "datasets",
    "tiny",
    "frozen",
]


def context():
    """`multiprocessing`'s context whose processes are forks of the one that has imported everything."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(IMPORTED)
    before = dict(os.environ)
    os.environ.update(PYTHONPATH=f"{ROOT}{os.pathsep}{TESTS}", OMP_NUM_THREADS="1")
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return found


def _run(program: str, arguments: list[str], environment: dict, cwd: str, out: str, err: str) -> None:
    """The fork's work: `program` is the path of a file, or the name of a module as after `python -m`."""
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv = [program, *arguments]
    if program.endswith(".py"):
        sys.path.insert(0, str(Path(program).parent))
        runpy.run_path(program, run_name="__main__")
    else:
        sys.modules.pop(program, None)
        runpy.run_module(program, run_name="__main__", alter_sys=True)


class Forked:
    """A running program, with the methods of `subprocess.Popen`; `out` and `err` are the files of its output."""

    def __init__(self, program, *arguments, env: dict | None = None, cwd=ROOT):
        self._folder = tempfile.TemporaryDirectory()
        self.out, self.err = (Path(self._folder.name) / name for name in ("out", "err"))
        self.args = [str(program), *map(str, arguments)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(env or {})}
        places = (str(cwd), str(self.out), str(self.err))
        self._process = context().Process(target=_run, args=(self.args[0], self.args[1:], environment, *places))
        self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float = 300) -> subprocess.CompletedProcess:
        """The end of the program, with its exit status (negative for a signal) and its output."""
        self._process.join(timeout)
        if self.poll() is None:
            self.send_signal(signal.SIGKILL)
            raise subprocess.TimeoutExpired(self.args, timeout, stderr=self.err.read_bytes())
        texts = [path.read_text() if path.exists() else "" for path in (self.out, self.err)]
        return subprocess.CompletedProcess(self.args, self.poll(), *texts)

    def send_signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)


def run(program, *arguments, timeout: float = 300, **options) -> subprocess.CompletedProcess:
    """As `subprocess.run` with captured text."""
    return Forked(program, *arguments, **options).wait(timeout)


def run_ranks(processes: int, program, *arguments, timeout: float = 300, env: dict | None = None) -> None:
    """The ranks of one group on this machine, as torchrun starts them; one that fails ends all, with its error."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(processes)}
    group |= {"LOCAL_WORLD_SIZE": str(processes)}
    ranks = [
        Forked(program, *arguments, env={**(env or {}), **group, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(processes)
    ]
    failed = []

    def watch(rank):
        try:
            done = rank.wait(timeout)
        except subprocess.TimeoutExpired as error:
            failed.append(f"still running after {timeout} s: {error.stderr.decode()[-3000:]}")
            return
        if done.returncode:
            failed.append(done.stderr[-3000:] or str(done.returncode))
            for other in ranks:
                other.send_signal(signal.SIGKILL)

    watching = [threading.Thread(target=watch, args=(rank,)) for rank in ranks]
    for thread in watching:
        thread.start()
    for thread in watching:
        thread.join()
    assert not failed, failed[0]

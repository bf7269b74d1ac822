"""Run by test_loop_kills.py: kills a loop at many moments, goes on, and says what differs from a loop that was not killed.

Each run is a fork of this process, which has imported everything and trained nothing.
"""

import contextlib
import gc
import hashlib
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import crowdkit.aggregation  # noqa: F401 the loop imports it when it needs it: once here, not in each fork
import torch
from loop_tools import make_folder, settings
from transformers import AutoModelForCausalLM

from dpo_fast.loop import candidates, report, round_training, rounds, store
from dpo_fast.loop.rounds import run_loop

OPTIONS = {"replay": 1, "reference": "start"}
# What a process kills itself in, and at which call of it: in the first round, and in the second one.
FIRST = {
    "while the start is sampled": (candidates.CandidateFile, "add", 2),
    "while candidates are written": (candidates.CandidateFile, "add", 9),
    "before the first label": (store.LabelStore, "add_annotator", 1),
    "in the middle of labelling": (store.LabelStore, "add_label", 8),
    "before the pairs are written": (round_training, "write_rows", 1),
    "in training": (round_training.DPOTrainer, "training_step", 2),
    "before the model is saved": (round_training, "_save", 1),
    "when the model is saved and has no name": (round_training.Path, "rename", 1),
    "when the round is whole and has no name": (rounds.Path, "rename", 2),
}
SECOND = {
    "in labelling": (store.LabelStore, "add_label", 8),
    "in training": (round_training.DPOTrainer, "training_step", 3),
    "in the report": (rounds, "write_report", 1),
}


def forked(function) -> int:
    """The exit status of `function()` in a child process, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        with open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
            function()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def deadly(owner, name: str, call: int) -> None:
    """The given call of `owner.name` kills the process."""
    original, calls = getattr(owner, name), [0]

    def wrapper(*args, **kwargs):
        calls[0] += 1
        if calls[0] == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, wrapper)


def state(folder: Path) -> dict[str, str]:
    """Digests of a loop's results; the order of candidates and the time of labels do not count."""
    found = {}
    for path in sorted(folder.glob("loop/**/*")):
        if path.name in (
            "metrics.json",
            "training_pairs.jsonl",
            "samples.jsonl",
            "model.safetensors",
            "candidates.jsonl",
        ):
            lines = sorted(path.read_bytes().split(b"\n")) if path.suffix == ".jsonl" else [path.read_bytes()]
            found[str(path.relative_to(folder))] = hashlib.sha256(b"\n".join(lines)).hexdigest()
    return found


def kill_and_go_on(place: Path, output: Path, where, count: int, expected: dict) -> str:
    """What is wrong with a loop of `count` rounds that is killed and started again; "" where it is as it should be."""
    run = lambda: run_loop(settings(place, output, rounds=count, **OPTIONS))  # noqa: E731
    died = forked(lambda: (deadly(*where), run()))
    resumed, found = forked(run), state(output)
    differ = [name for name in expected.keys() | found.keys() if found.get(name) != expected.get(name)]
    fine = died == -signal.SIGKILL and resumed == 0 and not differ
    return "" if fine else f"killed {died}, resumed {resumed}, differ {differ}"


def main() -> int:
    torch.set_num_threads(1)
    report.curves = lambda history: b""  # pictures take long and are not compared
    failed = 0
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        whole, kept = place / "whole", place / "kept"
        make_folder(place)
        AutoModelForCausalLM.from_pretrained(place / "model")  # transformers keeps its table of conversions from now on
        gc.freeze()  # what is there stays: the collections of every run need not go through it
        assert forked(lambda: run_loop(settings(place, whole, rounds=1, **OPTIONS))) == 0
        shutil.copytree(whole, kept, symlinks=True)
        first = state(whole)
        assert forked(lambda: run_loop(settings(place, whole, rounds=2, **OPTIONS))) == 0
        second = state(whole)
        assert 5 <= len(first) < len(second)
        for moment, where in FIRST.items():
            wrong = kill_and_go_on(place, place / moment.replace(" ", "_"), where, 1, first)
            failed += bool(wrong)
            print(f"first round, {moment}: {wrong or 'as it should be'}")
        for moment, where in SECOND.items():
            shutil.rmtree(whole)
            shutil.copytree(kept, whole, symlinks=True)
            wrong = kill_and_go_on(place, whole, where, 2, second)
            failed += bool(wrong)
            print(f"second round, {moment}: {wrong or 'as it should be'}")
    return failed


if __name__ == "__main__":
    sys.exit(main())

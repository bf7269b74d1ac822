"""Run by test_loop_kills.py: kills a loop at many moments, goes on, and says what differs from a loop that was not killed.

Each run is a fork of this process, which has imported everything and computed nothing.
"""

import contextlib
import hashlib
import os
import signal
import sys
import tempfile
from pathlib import Path

import torch
from loop_tools import make_folder, settings

from dpo_fast.loop import candidates, round_training, rounds, store
from dpo_fast.loop.rounds import run_loop

# (where the process kills itself, at which call of it)
MOMENTS = {
    "while the start is sampled": (candidates.CandidateFile, "add", 2),
    "while candidates are written": (candidates.CandidateFile, "add", 9),
    "before the first label": (store.LabelStore, "add_annotator", 1),
    "in the middle of labelling": (store.LabelStore, "add_label", 8),
    "before the pairs are written": (round_training, "write_rows", 1),
    "in training": (round_training.DPOTrainer, "training_step", 2),
    "before the model is saved": (round_training, "_save", 1),
    "when the model is saved and has no name": (round_training.Path, "rename", 1),
    "when the first round is whole and has no name": (rounds.Path, "rename", 2),
    "in the second round's labelling": (store.LabelStore, "add_label", 40),
    "in the second round's training": (round_training.DPOTrainer, "training_step", 5),
    "in the second report": (rounds, "write_report", 2),
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


def main() -> int:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        forked(lambda: make_folder(place))
        options = {"replay": 1, "reference": "start"}
        assert forked(lambda: run_loop(settings(place, place / "whole", **options))) == 0
        expected, failed = state(place / "whole"), 0
        assert len(expected) >= 10
        for moment, where in MOMENTS.items():
            output = place / moment.replace(" ", "_")

            def killed(output=output, where=where):
                deadly(*where)
                run_loop(settings(place, output, **options))

            died = forked(killed)
            resumed = forked(lambda output=output: run_loop(settings(place, output, **options)))
            found = state(output)
            differ = [name for name in expected if found.get(name) != expected[name]]
            fine = died == -signal.SIGKILL and resumed == 0 and not differ and found.keys() == expected.keys()
            failed += not fine
            print(
                f"{moment}: killed {died}, resumed {resumed}, differ {differ}, same files {found.keys() == expected.keys()}"
            )
    return failed


if __name__ == "__main__":
    sys.exit(main())

"""Checkpoints that a kill at any moment leaves whole: a directory counts once its marker file is written, last of all."""

import json
import os
import re
import shutil
from pathlib import Path

MARKER = "complete.json"


def mark_complete(folder: str | os.PathLike, **facts) -> None:
    """Write the marker, atomically, after everything else in `folder`."""
    folder = Path(folder)
    temporary = folder / (MARKER + ".tmp")
    with open(temporary, "w") as file:
        json.dump(facts, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / MARKER)


def mark_incomplete(folder: str | os.PathLike) -> None:
    """Take the marker away before files in `folder` are written again."""
    Path(folder, MARKER).unlink(missing_ok=True)


def complete_checkpoints(run_dir: str | os.PathLike) -> list[Path]:
    """Whole checkpoints of a run, oldest step first."""
    found = []
    for path in Path(run_dir).glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if match and (path / MARKER).exists():
            found.append((int(match[1]), path))
    return [path for _, path in sorted(found)]


def resolve(resume, run_dir: str | os.PathLike) -> str | None:
    """The folder to resume from: None for no resume, the last whole checkpoint for True, else the one that is named.

    Raises ValueError where there is none, or where the named one was interrupted while it was written.
    """
    if not resume:
        return None
    whole = complete_checkpoints(run_dir)
    if resume is True:
        if not whole:
            raise ValueError(f"resume_from_checkpoint=True, but {run_dir} holds no whole checkpoint: train without it")
        return str(whole[-1])
    if not Path(resume, MARKER).exists():
        last = f"the last whole one is {whole[-1]}" if whole else "there is no whole one beside it"
        raise ValueError(
            f"{resume} has no {MARKER}: it does not exist, was interrupted while being written, or comes from another "
            f"program; {last}"
        )
    return str(resume)


def rotate(run_dir: str | os.PathLike, limit: int | None, keep: str | None = None) -> None:
    """Delete whole checkpoints beyond the newest `limit`, and never `keep` (the best one)."""
    if not limit:
        return
    whole = complete_checkpoints(run_dir)
    kept = {Path(keep).resolve()} if keep else set()
    for path in reversed(whole):
        if len(kept) < limit or path == whole[-1]:
            kept.add(path.resolve())
    for path in whole:
        if path.resolve() not in kept:
            mark_incomplete(path)
            shutil.rmtree(path, ignore_errors=True)

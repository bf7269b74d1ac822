"""Checkpoints that a kill at any moment leaves whole: a folder counts once its marker file is written, last of all.

The marker, `complete.json`, holds the checkpoint's step and run (`run` is a random name that a resumed run inherits), the
time when it was written, what a run that resumes it must agree with (`fingerprint`, see fingerprint.py), and its files:
`files` maps each name to its size in bytes and its CRC-32.
"""

import json
import os
import re
import shutil
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

MARKER = "complete.json"
_BLOCK = 1 << 24  # bytes read at once for a checksum


def mark_complete(folder: str | os.PathLike, **facts) -> None:
    """Write the marker with `facts`, the time and the files of `folder`, atomically and after everything else there."""
    folder = Path(folder)
    temporary = folder / (MARKER + ".tmp")
    facts = {**facts, "written": time.time(), "files": _checksums(folder, _files(folder))}
    with open(temporary, "w") as file:
        json.dump(facts, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / MARKER)


def mark_incomplete(folder: str | os.PathLike) -> None:
    """Remove the marker before files in `folder` are written again."""
    Path(folder, MARKER).unlink(missing_ok=True)


def read_marker(folder: str | os.PathLike) -> dict:
    """The facts that `mark_complete` wrote. Raises ValueError where they cannot be read."""
    path = Path(folder, MARKER)
    try:
        facts = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError):
        facts = None
    if not isinstance(facts, dict) or not {"step", "files", "fingerprint"} <= facts.keys():
        raise ValueError(f"{path} is damaged or of another version: resume from another checkpoint, or start anew")
    return facts


def _files(folder: Path) -> list[str]:
    paths = (path for path in folder.rglob("*") if path.is_file() and path.parent / path.name != folder / MARKER)
    return sorted(str(path.relative_to(folder)) for path in paths if path.name != MARKER + ".tmp")


def _checksums(folder: Path, names: list[str]) -> dict[str, list[int]]:
    """Name -> [bytes, CRC-32], computed by up to 8 threads."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(names, pool.map(lambda name: _checksum(folder / name), names), strict=True))


def _checksum(path: Path) -> list[int]:
    size = crc = 0
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return [size, crc]


def check_sizes(folder: str | os.PathLike) -> None:
    """Raise ValueError, naming the first such file, where a file of the checkpoint is missing or has another size."""
    for name, (size, _) in read_marker(folder)["files"].items():
        path = Path(folder, name)
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            what = "is missing" if found is None else f"has {found:,} of {size:,} bytes"
            raise ValueError(f"{path} {what}: the checkpoint is damaged, resume from another one")


def check_contents(folder: str | os.PathLike) -> None:
    """Raise ValueError, naming the first such file, where a file does not hold what was written."""
    check_sizes(folder)
    files = read_marker(folder)["files"]
    for name, found in _checksums(Path(folder), list(files)).items():
        if found != files[name]:
            raise ValueError(
                f"{Path(folder, name)} is damaged (its checksum is another than when it was written): resume from "
                "another checkpoint"
            )


def complete_checkpoints(run_dir: str | os.PathLike) -> list[Path]:
    """The whole checkpoints in `run_dir`, of any run, in the order in which they were written."""
    found = []
    for path in Path(run_dir).glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if match and (path / MARKER).exists():
            found.append((_written(path), int(match[1]), path))
    return [path for _, _, path in sorted(found)]


def _written(folder: Path) -> float:
    return _lenient(folder).get("written", 0.0)


def _lenient(folder: Path) -> dict:
    """The marker's facts, or {} where it is damaged, since another checkpoint may still be whole."""
    try:
        return json.loads((folder / MARKER).read_text())
    except (OSError, ValueError):
        return {}


def find_checkpoint(resume, run_dir: str | os.PathLike) -> str | None:
    """The folder to resume from: None where `resume` is false, the last whole checkpoint for True, else the named one.

    Raises ValueError where there is none, where writing the named one was interrupted, and where one of its files is
    missing or too short.
    """
    if not resume:
        return None
    whole = complete_checkpoints(run_dir)
    if resume is True:
        if not whole:
            raise ValueError(f"resume_from_checkpoint=True, but {run_dir} holds no whole checkpoint: train without it")
        resume = whole[-1]
    elif not Path(resume, MARKER).exists():
        last = f"the last whole one is {whole[-1]}" if whole else "there is no whole one beside it"
        raise ValueError(
            f"{resume} has no {MARKER}: it does not exist, was interrupted while being written, or comes from another "
            f"program; {last}"
        )
    check_sizes(resume)
    return str(resume)


def rotate(run_dir: str | os.PathLike, limit: int | None, keep: str | None = None, run: str | None = None) -> None:
    """Delete whole checkpoints of `run` beyond the newest `limit`, but never `keep` (the best one)."""
    if not limit:
        return
    whole = [path for path in complete_checkpoints(run_dir) if _lenient(path).get("run") == run]
    kept = {Path(keep).resolve()} if keep else set()
    for path in reversed(whole):
        if len(kept) < limit or path == whole[-1]:
            kept.add(path.resolve())
    for path in whole:
        if path.resolve() not in kept:
            mark_incomplete(path)
            shutil.rmtree(path, ignore_errors=True)

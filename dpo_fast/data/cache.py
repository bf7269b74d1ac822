"""Where rows (store.py) and tokens (mapped.py) lie as Arrow files, and how they go: `python -m dpo_fast.data.cache`.

They lie below `datasets`' own cache (HF_DATASETS_CACHE), one folder per content, whose `lock` was last opened when the
folder was last used. All of it is made again where it is missing.
"""

import argparse
import contextlib
import dataclasses
import errno
import fcntl
import functools
import os
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path

_TEMPORARY = ("*.part", "tmp*")  # ours, and those of `datasets`
_DAY = 86400


def cache_folder() -> Path:
    """The folder of all folders."""
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE) / "dpo_fast"


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time; the others wait, however long it takes, and one that is killed lets go.

    Raises OSError that says what to do where the disk is full, and keeps nothing half written then.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w") as file:  # closing it releases the lock
            fcntl.flock(file, fcntl.LOCK_EX)
            os.utime(path)
            yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        for left in _left_in(path.parent):
            left.unlink(missing_ok=True)
        raise OSError(
            f"the disk of {cache_folder()} is full, {shutil.disk_usage(path.parent).free / 1e6:,.0f} MB are left: delete what is "
            "not used (python -m dpo_fast.data.cache --prune DAYS), or set HF_DATASETS_CACHE to a folder of another disk"
        ) from error


def _left_in(folder: Path) -> list[Path]:
    return [path for pattern in _TEMPORARY for path in folder.glob(pattern)]


@contextlib.contextmanager
def _if_free(path: Path) -> Iterator[bool]:
    """Whether nobody holds the lock, which is then held here; False where its folder has just been deleted."""
    with contextlib.ExitStack() as held:
        try:
            file = held.enter_context(open(path, "a"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, FileNotFoundError):
            yield False
            return
        yield True


def _stat(path: Path) -> os.stat_result | None:
    """None where another process has just renamed or deleted the file."""
    try:
        return path.stat()
    except FileNotFoundError:
        return None


@dataclasses.dataclass
class Folder:
    """What was made of one content: its bytes, and the time of its last use in seconds."""

    path: Path
    bytes: int
    used: float


def folders() -> list[Folder]:
    """All of them, the one that was used last at the end."""
    found = []
    for lock in cache_folder().glob("*/lock"):
        used, files = _stat(lock), map(_stat, lock.parent.glob("*"))
        if used:
            size = sum(file.st_size for file in files if file and stat.S_ISREG(file.st_mode))
            found.append(Folder(lock.parent, size, used.st_mtime))
    return sorted(found, key=lambda folder: folder.used)


@functools.cache
def sweep() -> int:
    """Delete what killed processes left half written, once per process; the number of files."""
    count = 0
    for lock in cache_folder().glob("*/lock"):
        left = _left_in(lock.parent)
        if not left:
            continue
        with _if_free(lock) as free:
            for path in left if free else ():
                path.unlink(missing_ok=True)
                count += 1
    return count


def prune(days: float) -> list[Folder]:
    """Delete the folders that no run has used for so many days, and return them; one that is being written stays."""
    gone = []
    for folder in folders():
        if time.time() - folder.used < days * _DAY:
            continue
        with _if_free(folder.path / "lock") as free:
            if free:
                shutil.rmtree(folder.path)
                gone.append(folder)
    for digest in (cache_folder() / "files").glob("*"):  # see `store.content_digest`; tiny, read again where missing
        if time.time() - digest.stat().st_mtime >= days * _DAY:
            digest.unlink(missing_ok=True)
    return gone


def main(argv: list[str] | None = None) -> int:
    """List the folders, or delete those that are not used any more."""
    parser = argparse.ArgumentParser(prog="python -m dpo_fast.data.cache", description=main.__doc__)
    parser.add_argument("--prune", type=float, metavar="DAYS", help="Delete what no run has used for so many days.")
    days = parser.parse_args(argv).prune
    if days is not None and not days >= 0:
        parser.error(f"--prune is {days:g}: give a number of days")
    sweep()
    if days is not None:
        gone = prune(days)
        print(f"deleted {len(gone)} folders, {megabytes(gone)}")
    left = folders()
    for folder in left:
        day = time.strftime("%Y-%m-%d", time.localtime(folder.used))
        print(f"{folder.path}  {megabytes([folder])}  last used {day}")
    print(f"{cache_folder()}: {megabytes(left)} in {len(left)} folders")
    return 0


def megabytes(some: list[Folder]) -> str:
    """The size of them together."""
    return f"{sum(folder.bytes for folder in some) / 1e6:,.1f} MB"


if __name__ == "__main__":
    raise SystemExit(main())

"""Full disks: they are looked for before a write and recognised where one fails; the error says how much is needed."""

import contextlib
import errno
import os
import shutil
from pathlib import Path

_FULL = (errno.ENOSPC, errno.EDQUOT)
# The words of torch and safetensors for a failed write; their errors have no errno.
_FULL_WORDS = ("No space left", "Disk quota", "file write failed", "failed writing file", "iostream error")


def is_full(error: Exception) -> bool:
    """Whether `error` comes from a write that found no room."""
    return getattr(error, "errno", None) in _FULL or any(words in str(error) for words in _FULL_WORDS)


@contextlib.contextmanager
def room_for(folder: str | os.PathLike, needed: int, what: str, kept: str):
    """Raise OSError where the disk of `folder` lacks the `needed` bytes, before the writes inside or in place of their error.

    For the message, `what` names the thing that is written, such as "checkpoint-4", and `kept` says what is still there.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(folder).free < needed:
        raise OSError(full_disk(folder, needed, what, kept))
    try:
        yield
    except Exception as error:
        if is_full(error):
            raise OSError(full_disk(folder, needed, what, kept)) from error
        raise


def full_disk(folder: Path, needed: int, what: str, kept: str) -> str:
    """The error message: how much is needed, how much is left, and what is still there."""
    free = shutil.disk_usage(folder).free
    return f"the disk is full: {what} needs about {size(needed)} and {folder} has {size(free)} left. {kept}"


def size(count: int) -> str:
    """A number of bytes in a unit that people can read."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"

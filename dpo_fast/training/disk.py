"""Full disks: looked for before a write, recognised where a write fails, and told with how much is needed."""

import contextlib
import errno
import os
import shutil
from pathlib import Path

_FULL = (errno.ENOSPC, errno.EDQUOT)
# What torch and safetensors say where a write failed; their errors have no number.
_FULL_WORDS = ("No space left", "Disk quota", "file write failed", "failed writing file", "iostream error")


def is_full(error: Exception) -> bool:
    """Whether `error` is that of a write that found no room."""
    return getattr(error, "errno", None) in _FULL or any(words in str(error) for words in _FULL_WORDS)


@contextlib.contextmanager
def room_for(folder: str | os.PathLike, needed: int, what: str, kept: str):
    """Raise OSError, before and instead of what failed inside, where `folder`'s disk has not the `needed` bytes.

    what: of what, such as "checkpoint-4"; kept: what is still there, for the message.
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
    """The message: how much is needed, how much is left, and what is still there."""
    free = shutil.disk_usage(folder).free
    return f"the disk is full: {what} needs about {size(needed)} and {folder} has {size(free)} left. {kept}"


def size(count: int) -> str:
    """Bytes as people read them."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"

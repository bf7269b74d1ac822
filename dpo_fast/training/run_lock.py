"""One run per output folder, kept by a lock that ends with its process, however that ends."""

import fcntl
import logging
import os
import socket
from pathlib import Path

logger = logging.getLogger(__name__)
LOCK = ".run.lock"
_held: dict[str, int] = {}  # resolved folder -> file descriptor, open until the process ends


def hold(folder: str | os.PathLike) -> None:
    """Lock `folder` for this process, which may call this again. Raises ValueError while another process has it.

    The kernel releases the `flock` when the process is gone, killed or not. On a file system without `flock` a warning
    says so and nothing is locked.
    """
    folder = Path(folder)
    key = str(folder.resolve())
    if key in _held:
        return
    folder.mkdir(parents=True, exist_ok=True)
    file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.read(file, 200).decode(errors="replace").strip()
        os.close(file)
        raise ValueError(
            f"another run ({owner or 'of this machine or another'}) is writing into {folder}: wait until it ends, or "
            "give another output_dir"
        ) from None
    except OSError as error:
        os.close(file)
        logger.warning("%s cannot be locked (%s): start no second run in it", folder, error.strerror)
        return
    os.ftruncate(file, 0)
    os.write(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    _held[key] = file

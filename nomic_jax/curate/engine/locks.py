"""Locks between processes that share an output directory."""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO


@contextlib.contextmanager
def claim(file: Path) -> Iterator[bool]:
    """Yields whether this process alone may make ``file`` now. A claim ends with its process, even a killed one.

    It is a lock (flock) on a file beside ``file``. Processes of several hosts need a shared file system with flock.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    path = file.with_name(f".{file.name}.lock")
    with path.open("a+") as lock:
        is_ours = take_lock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield is_ours
        # Remove the lock file only if ``file`` exists: all processes that still need ``file`` must lock the same one.
        if is_ours and file.exists():
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def exclusive_lock(path: Path) -> Iterator[None]:
    """Runs the block in one process at a time; the others wait."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as lock:
        take_lock(lock, fcntl.LOCK_EX)
        yield


def take_lock(file: IO[str], kind: int) -> bool:
    try:
        fcntl.flock(file, kind)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            folder = os.path.dirname(file.name)
            raise ValueError(
                f"the file system of {folder} does not support locks (flock); give another --output"
            ) from error
        raise
    return True

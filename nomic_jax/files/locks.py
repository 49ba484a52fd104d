"""Locks between processes that share a folder."""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from nomic_jax.files.writing import open_own


@contextlib.contextmanager
def claim(file: Path) -> Iterator[bool]:
    """Yields whether this process alone may make ``file`` now. A claim ends with its process, even a killed one.

    It is a lock (flock) on a file beside ``file``. Processes of several hosts need a shared file system with flock.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    path = file.with_name(f".{file.name}.lock")
    with _open_lock(path) as lock:
        is_ours = take_lock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield is_ours
        # Remove the lock file only if ``file`` exists: all processes that still need ``file`` must lock the same one.
        if is_ours and file.exists():
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def exclusive_lock(path: Path) -> Iterator[None]:
    """Runs the block in one process at a time; the others wait."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _open_lock(path) as lock:
        take_lock(lock, fcntl.LOCK_EX)
        yield


def _open_lock(path: Path) -> IO[str]:
    return os.fdopen(open_own(path, os.O_RDWR | os.O_APPEND), "a+", encoding="utf-8")


def take_lock(file: IO[str], kind: int) -> bool:
    try:
        fcntl.flock(file, kind)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            raise ValueError(
                "the file system of the output does not support locks (flock); give another --output"
            ) from error
        raise
    return True

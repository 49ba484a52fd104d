"""What differs between Linux, macOS and Windows: flags of ``os.open``, locks, and what may happen to an open file."""

import contextlib
import os
import time
from collections.abc import Callable
from typing import Any

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None  # type: ignore[assignment]

# A flag that the system lacks is 0. Windows needs O_BINARY, or it changes line ends.
O_CLOEXEC = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOINHERIT", 0) | getattr(os, "O_BINARY", 0)
O_DIRECTORY = getattr(os, "O_DIRECTORY", 0)
O_NOCTTY = getattr(os, "O_NOCTTY", 0)
O_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)
O_NONBLOCK = getattr(os, "O_NONBLOCK", 0)
# On Windows, fsync needs a file that may be written.
O_SYNCED = os.O_RDONLY if fcntl else os.O_RDWR
# Whether a folder can be opened, and an open file be renamed and deleted.
HAS_INODES = fcntl is not None

_LOCKED_BYTE = (1 << 31) - 2  # Windows locks bytes, and nobody else can read them: this one is beyond all lock files
_WAIT_SECONDS = 0.1


def lock(descriptor: int, *, shared: bool = False, wait: bool = False) -> None:
    """Locks an open file (flock) until it is closed. On Windows a shared lock is exclusive too.

    Raises:
      BlockingIOError: another process holds a lock, and ``wait`` is not set.
      OSError: the file system has no locks.
    """
    if fcntl:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        return
    import msvcrt

    windows: Any = msvcrt  # typed on Windows only
    place = os.lseek(descriptor, 0, os.SEEK_CUR)
    try:
        os.lseek(descriptor, _LOCKED_BYTE, os.SEEK_SET)
        if shared:  # this process may hold the exclusive lock
            with contextlib.suppress(OSError):
                windows.locking(descriptor, windows.LK_UNLCK, 1)
        while True:
            try:
                return windows.locking(descriptor, windows.LK_NBLCK, 1)
            except OSError as error:
                if not wait:
                    raise BlockingIOError(*error.args) from error
            time.sleep(_WAIT_SECONDS)
    finally:
        os.lseek(descriptor, place, os.SEEK_SET)


def read_at(descriptor: int, size: int, offset: int) -> bytes:
    """Reads up to ``size`` bytes at ``offset``; the position of the file stays where it is."""
    if hasattr(os, "pread"):
        return os.pread(descriptor, size, offset)
    place = os.lseek(descriptor, 0, os.SEEK_CUR)
    try:
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.read(descriptor, size)
    finally:
        os.lseek(descriptor, place, os.SEEK_SET)


def after_fork_in_child(function: Callable[[], None]) -> None:
    """Calls ``function`` in every child that this process forks; nothing forks on Windows."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=function)


def has_ended(pid: int) -> bool:
    """Returns whether no process of this host has the number; False if that cannot be known."""
    if not fcntl:  # os.kill(pid, 0) would send a signal
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        return False
    return False

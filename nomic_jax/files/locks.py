"""Locks between processes that share a folder."""

import contextlib
import datetime
import errno
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from nomic_jax.files import system
from nomic_jax.files.printable import printable
from nomic_jax.files.writing import open_own, try_lock

_held: set[int] = set()


class InUse(ValueError):
    """Another process uses a folder; the message says which process, and since when."""


def _let_go() -> None:
    """Without this, a lock would last until the last forked child has ended."""
    for descriptor in _held:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _held.clear()


system.after_fork_in_child(_let_go)


@contextlib.contextmanager
def held(path: Path, what: str, *, wait: bool = False) -> Iterator[None]:
    """Holds the file ``path`` for this process, and removes it at the end.

    The file is locked (flock) and says which process holds it. The kernel releases the lock of a process that ends in
    any way, also on file systems that hosts share, if they have flock (NFS 4, Lustre with -o flock, CephFS, GPFS). On a
    file system without locks only the content of the file counts: the file of a dead process of this host is taken
    over; that of another host must be deleted by hand.

    Args:
      what: the holder for messages, such as "another training".
      wait: wait for the other process.

    Raises:
      InUse: another process holds it.
    """
    while True:
        try:
            descriptor, is_new = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | system.O_CLOEXEC, 0o666), True
        except FileExistsError:
            descriptor, is_new = open_own(path, os.O_RDWR), False
        locked = try_lock(descriptor)
        if locked is False and wait:
            system.lock(descriptor, wait=True)
            locked = True
        holder = _read_holder(descriptor)
        if locked is False or (locked is None and not is_new and not _is_dead(holder)):
            os.close(descriptor)
            message = f"{path.parent}: {what} uses this folder: {_describe(holder)}"
            if locked is None:
                message += f". This file system has no locks: if that process has ended, delete {path}"
            raise InUse(message)
        # A process that ended may have removed the file before it was locked here. The lock would have no effect.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.lstat(path), os.fstat(descriptor)):
                break
        os.close(descriptor)
    _held.add(descriptor)
    try:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        content = {"host": socket.gethostname(), "pid": os.getpid(), "since": now}
        os.ftruncate(descriptor, 0)
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.write(descriptor, json.dumps(content).encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        _held.discard(descriptor)
        os.close(descriptor)


def _read_holder(descriptor: int) -> dict[str, Any]:
    try:
        content = json.loads(system.read_at(descriptor, 10_000, 0))
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _describe(holder: dict[str, Any]) -> str:
    if not holder:
        return "a process that has just started"
    return printable(f"process {holder.get('pid')} on {holder.get('host')}, since {holder.get('since')}")[:300]


def _is_dead(holder: dict[str, Any]) -> bool:
    """Returns whether the process was one of this host and has ended."""
    if holder.get("host") != socket.gethostname() or type(pid := holder.get("pid")) is not int or pid <= 0:
        return False
    return system.has_ended(pid)


@contextlib.contextmanager
def claim(file: Path) -> Iterator[bool]:
    """Yields whether this process alone may make ``file`` now. A claim ends with its process, even a killed one.

    It is a lock (flock) on a file beside ``file``. Processes of several hosts need a shared file system with flock.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    path = file.with_name(f".{file.name}.lock")
    with open_lock(path) as lock:
        is_ours = take_lock(lock)
        yield is_ours
        # Remove the lock file only if ``file`` exists: all processes that still need ``file`` must lock the same one.
        if is_ours and file.exists():
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def exclusive_lock(path: Path) -> Iterator[None]:
    """Runs the block in one process at a time; the others wait."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_lock(path) as lock:
        take_lock(lock, wait=True)
        yield


def open_lock(path: Path) -> IO[str]:
    return os.fdopen(open_own(path, os.O_RDWR | os.O_APPEND), "a+", encoding="utf-8")


def take_lock(file: IO, *, shared: bool = False, wait: bool = False) -> bool:
    """Locks an open file and returns whether that succeeded; always, with ``wait``.

    Raises:
      ValueError: the file system has no locks.
    """
    try:
        system.lock(file.fileno(), shared=shared, wait=wait)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            raise ValueError(
                "the file system of the output does not support locks (flock); give another --output"
            ) from error
        raise
    return True

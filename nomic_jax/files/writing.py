"""Writes files and folders that appear complete or not at all.

A file is written as .NAME.<random>.part in its folder and renamed. The part is opened exclusively, so that a link or a
file that somebody put there is not followed or overwritten. While it is written it is locked. A killed process leaves
its part; the next process that writes NAME removes the parts of NAME that nobody locks.
"""

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO

from nomic_jax.files import system
from nomic_jax.files.folders import is_file, is_folder, remove_folder
from nomic_jax.files.reading import FileRefused, kind_of

# Without locks on a file system, an older part is taken for that of a dead process.
_OLD_SECONDS = 86_400
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_RENAME_EXCHANGE = 2


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike, *, sync: bool = True) -> Iterator[Path]:
    """Yields the path of a new, empty file, and renames it to ``path`` on success. An error or a kill changes nothing.

    If ``path`` is a link, the link is replaced; what it led to stays as it is.

    Args:
      sync: wait until the disk has the file, so that a power failure leaves the old or the new one.

    Raises:
      FileRefused: ``path`` is a folder, a pipe, a socket or a device.
      OSError: names ``path`` and the cause.
    """
    path = Path(path)
    with named_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _check_target(path)
        remove_leftovers(path, is_file)
        part, lock = new_part(path, folder=False)
        try:
            yield part
            if sync:
                sync_file(part)
            part.replace(path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        finally:
            if lock is not None:
                os.close(lock)


def sync_file(path: Path) -> None:
    """Waits until the disk has a file."""
    descriptor = os.open(path, system.O_SYNCED | system.O_NOFOLLOW | system.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Yields the path of a new, empty folder, and puts it in the place of ``path`` on success, in one step.

    An earlier folder at ``path`` is exchanged for it and deleted. Where the file system cannot exchange, the earlier
    folder is deleted first.

    Raises:
      FileRefused: ``path`` is a link or no folder.
      OSError: names ``path`` and the cause.
    """
    path = Path(path)
    with named_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(path) and not is_folder(path):
            raise FileRefused(f"{path}: is {kind_of(os.lstat(path).st_mode)}; expected a folder or nothing")
        remove_leftovers(path, is_folder)
        part, lock = new_part(path, folder=True)
        try:
            yield part
            if not is_folder(path):
                part.rename(path)
            elif exchange(part, path):
                remove_folder(part)
            else:
                remove_folder(path)
                part.rename(path)
        except BaseException:
            with contextlib.suppress(FileRefused):
                remove_folder(part)
            raise
        finally:
            if lock is not None:
                os.close(lock)


def atomic_link(path: Path, target: Path) -> None:
    """Makes ``path`` a link to ``target``, in one step if it is a link to something else.

    Raises:
      FileRefused: ``path`` is something else than a link.
    """
    if os.path.lexists(path) and not path.is_symlink():
        raise FileRefused(f"{path}: is {kind_of(os.lstat(path).st_mode)}; expected a link or nothing. Remove it")
    for name in os.listdir(path.parent):
        if _is_part(name, path) and path.with_name(name).is_symlink():
            path.with_name(name).unlink(missing_ok=True)
    part = path.with_name(f".{_stem(path)}.{secrets.token_hex(8)}.part")
    part.symlink_to(target)
    part.replace(path)


def exchange(a: Path, b: Path) -> bool:
    """Exchanges two existing paths in one step (renameat2); returns False where the system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, TypeError):  # not Linux, or a libc of before 2018
        return False
    at_cwd = -100
    if renameat2(at_cwd, os.fsencode(a), at_cwd, os.fsencode(b), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), str(b))


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a UTF-8 file. It appears complete or not at all."""
    with atomic_file(path) as part:
        part.write_text(text, encoding="utf-8", newline="")


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes a JSON file. It appears complete or not at all.

    Raises:
      ValueError: a number is NaN or infinite, which JSON cannot hold.
    """
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True, allow_nan=False) + "\n")


def append(path: str | os.PathLike) -> IO[str]:
    """Opens a UTF-8 file to append lines to it, such as a log; it is made if it is not there.

    Raises:
      FileRefused: the path is a link, a folder, a pipe, a socket or a device.
      OSError: names ``path`` and the cause.
    """
    return os.fdopen(open_own(path, os.O_WRONLY | os.O_APPEND), "a", encoding="utf-8")


def open_new(path: str | os.PathLike) -> BinaryIO:
    """Opens a new file to write and read bytes. A file or link that a killed process or somebody else left is removed.

    Raises:
      FileRefused: the path is a folder, a pipe, a socket or a device.
      OSError: names ``path`` and the cause.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _check_target(path)
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | system.O_NOFOLLOW | system.O_CLOEXEC, 0o666)
    return os.fdopen(descriptor, "w+b")


def open_own(path: str | os.PathLike, flags: int) -> int:
    """Opens (or makes) a regular file that is no link, and returns its descriptor.

    Raises:
      FileRefused: the path is a link, a folder, a pipe, a socket or a device.
      OSError: names ``path`` and the cause.
    """
    with contextlib.suppress(FileNotFoundError):
        mode = os.lstat(path).st_mode
        if not stat.S_ISREG(mode):
            raise FileRefused(f"{path}: is {kind_of(mode)}; expected a file or nothing. Remove it")
    # What was just checked may have been replaced since.
    flags |= os.O_CREAT | system.O_NOFOLLOW | system.O_NONBLOCK | system.O_CLOEXEC | system.O_NOCTTY
    descriptor = os.open(path, flags, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise FileRefused(f"{path}: is not a regular file; remove it")
    return descriptor


@contextlib.contextmanager
def named_errors(path: str | os.PathLike) -> Iterator[None]:
    """Turns the errors of writing a file into OSErrors that name ``path`` and the cause.

    Python's errors do not name an open file, and name a part where they name a file; numpy's ("8 requested and 0
    written") lack the cause; those of faiss and of libraries in Rust (safetensors, tokenizers) are no OSErrors.
    """
    try:
        yield
    except Exception as error:
        number = None
        if isinstance(error, OSError):
            if error.filename is None:
                # Other errors without a name may be those of an input.
                number = error.errno if error.errno in _FULL else None
                number = errno.ENOSPC if error.errno is None and "requested and" in str(error) else number
            elif _is_part_of(os.fsdecode(error.filename), Path(path)):
                number = error.errno
        elif code := re.search(r"Os \{ code: (\d+)|\(os error (\d+)\)", str(error)):
            number = int(code[1] or code[2])
        elif isinstance(error, RuntimeError):  # faiss
            number = next((full for full in _FULL if f"({os.strerror(full)})" in str(error)), None)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def _is_part_of(file: str, path: Path) -> bool:
    return any(_is_part(name, path) for name in Path(file).parts)


def _check_target(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        mode = os.lstat(path).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
            raise FileRefused(f"{path}: is {kind_of(mode)}; choose another path for the file")


def _stem(path: Path) -> str:
    name = os.fsencode(path.name)
    # A name has at most 255 bytes.
    return path.name if len(name) < 220 else hashlib.sha256(name).hexdigest()


def _is_part(name: str, path: Path) -> bool:
    stem = f".{_stem(path)}."
    return name.startswith(stem) and re.fullmatch(r"[0-9a-f]{16}\.part", name[len(stem) :]) is not None


def new_part(path: Path, folder: bool) -> tuple[Path, int | None]:
    """Makes .NAME.<random>.part as a file or folder, and returns it and the descriptor that locks it.

    There is no descriptor on Windows, which neither renames an open file nor opens a folder.
    """
    while True:
        part = path.with_name(f".{_stem(path)}.{secrets.token_hex(8)}.part")
        if folder:
            part.mkdir()
            if not system.HAS_INODES:
                return part, None
            descriptor = os.open(part, os.O_RDONLY | system.O_NOFOLLOW | system.O_CLOEXEC | system.O_DIRECTORY)
        else:
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | system.O_NOFOLLOW | system.O_CLOEXEC
            descriptor = os.open(part, flags, 0o666)
        if not system.HAS_INODES:
            os.close(descriptor)
            return part, None
        try_lock(descriptor)
        # Between making and locking it, another process may have removed it as a leftover.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.lstat(part), os.fstat(descriptor)):
                return part, descriptor
        os.close(descriptor)


def try_lock(descriptor: int) -> bool | None:
    """Locks an open file (flock) and returns whether that succeeded; None where the file system has no locks."""
    try:
        system.lock(descriptor)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return None
        raise
    return True


def remove_leftovers(path: Path, is_kind: Any) -> None:
    """Removes the parts of ``path`` that dead processes have left in its folder."""
    try:
        names = os.listdir(path.parent)
    except PermissionError:  # a folder that one may write to, but not read
        return
    for name in names:
        part = path.with_name(name)
        if not _is_part(name, path) or not is_kind(part):
            continue
        try:
            descriptor = os.open(part, os.O_RDONLY | system.O_NOFOLLOW | system.O_NONBLOCK | system.O_CLOEXEC)
        except OSError:  # another process was faster, or the part belongs to another user
            continue
        try:
            locked = try_lock(descriptor)
            if locked is None or not system.HAS_INODES:
                locked = time.time() - os.fstat(descriptor).st_mtime > _OLD_SECONDS
            if locked:
                with contextlib.suppress(OSError, FileRefused):
                    remove_folder(part) if is_folder(part) else part.unlink()
        finally:
            os.close(descriptor)

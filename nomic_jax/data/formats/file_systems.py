"""Opens files: local ones, which must be regular files, and URLs of the file systems that are allowed.

fsspec knows some 50 protocols. A few of them run code that a file describes (``reference://`` with templates), or reach
into other hosts and programs. A mixture or a record from somebody else can name any URL, so only PROTOCOLS are opened.
"""

import contextlib
import errno
import os
import re
from collections.abc import Iterable
from typing import Any, BinaryIO

import fsspec
from fsspec.implementations.local import LocalFileSystem

from nomic_jax.data.formats.text import zip_members
from nomic_jax.files.reading import FileRefused, open_regular

PROTOCOLS = frozenset({"file", "local", "s3", "s3a", "gs", "gcs", "http", "https", "hf", "memory"})
_allowed = set(PROTOCOLS)
POINTER, LARGEST_POINTER = b"version https://git-lfs.github.com/spec/", 1024  # start and size of what Git LFS leaves


def allow_protocols(names: Iterable[str]) -> None:
    """Allows ``expand_files`` further protocols of fsspec, in this process (--allow_protocols)."""
    _allowed.update(names)


def check_protocols(name: str) -> None:
    """Checks the protocols of a URL, also those of a chain such as ``simplecache::s3://bucket/file``.

    Raises:
      ValueError: a protocol is not allowed.
    """
    for part in name.split("::"):
        protocol, separator, _ = part.partition("://")
        # fsspec takes a part of small letters for a protocol, and any other one for a local path.
        if (separator or ("::" in name and re.fullmatch("[a-z]*", part))) and protocol not in _allowed:
            raise ValueError(
                f"{name}: the protocol {protocol[:80]!r} is not allowed, because a file system may run code; allowed "
                f"are {', '.join(sorted(_allowed))}. If you trust this URL, add --allow_protocols={protocol[:80]}"
            )


def is_local(name: str) -> bool:
    """Returns whether a name is a local path. A path that exists is that path, whatever it looks like."""
    if "://" not in name and not re.match(r"[a-z0-9]+::", name):
        return True
    with contextlib.suppress(OSError, ValueError):
        return os.path.lexists(name)
    return False


def file_system(name: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Returns the file system of a path or URL, and the path in it.

    A URL from outside must have passed ``check_protocols``; names from ``expand_files`` have.

    Raises:
      ImportError: the file system needs a package that is not installed.
    """
    if is_local(name):
        path = name if os.path.lexists(name) else os.path.expanduser(name)
        return LocalFileSystem(), os.path.abspath(path)
    return fsspec.core.url_to_fs(name)


def open_stored(name: str) -> BinaryIO | Any:
    """Opens a file for reading its stored bytes, without decompression; of a member of a zip archive, its own bytes.

    Raises:
      FileRefused: a local path is a pipe, a socket or a device, or the file is a pointer that Git LFS left.
      OSError, ImportError: as ``file_system``; the file cannot be opened.
    """
    if zip_members.is_member(name) and not is_local(name):
        return zip_members.open_member(name, open_stored)
    fs, path = file_system(name)
    if "file" not in fs.protocol:
        return fs.open(path, "rb")
    if os.path.isdir(path):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    f = open_regular(path)
    try:
        if os.fstat(f.fileno()).st_size < LARGEST_POINTER and f.read(len(POINTER)) == POINTER:
            raise FileRefused(f"{name}: is a Git LFS pointer, not the file; run git lfs pull in its repository")
        f.seek(0)
    except BaseException:
        f.close()
        raise
    return f

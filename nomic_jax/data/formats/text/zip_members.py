"""Files inside zip archives, named as by fsspec: ``zip://MEMBER::ARCHIVE``. They are read in place, never extracted."""

import contextlib
import errno
import fnmatch
import io
import lzma
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from nomic_jax.files.reading import FileRefused

PREFIX = "zip://"
MOST_MEMBERS = 100_000
# Deflate makes text at most some ten times smaller, and anything at most 1,032 times.
LARGEST_RATIO, FREE_BYTES = 1000, 1 << 26
_ENCRYPTED = 0x1
DAMAGED_MEMBER = (zipfile.BadZipFile, zlib.error, EOFError, lzma.LZMAError)  # raised while a member is read
_FAULTS = (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, ValueError, OverflowError, struct.error)


def is_member(name: str) -> bool:
    return name.startswith(PREFIX) and "::" in name


def split(name: str) -> tuple[str, str]:
    """Returns the member's name and the path or URL of the archive."""
    member, _, archive = name.removeprefix(PREFIX).partition("::")
    return member, archive


def name_inside(file: str) -> str:
    """Returns the name that says what is in a file: of a member, its name in the archive; of another file, its own."""
    return split(file)[0] if is_member(file) else file


def stored_in(file: str) -> str:
    """Returns the file that is stored: of a member, its archive; of another file, the file itself."""
    return split(file)[1] if is_member(file) else file


def members(archive: str, open_stored: Callable[[str], Any], pattern: str, endings: tuple[str, ...]) -> list[str]:
    """Returns the names of the members of an archive that match a pattern, or that have one of the endings.

    Args:
      open_stored: opens the archive.
      pattern: a member's name, or a glob; "" for all members with one of ``endings``.

    Raises:
      FileNotFoundError: no member matches.
      FileRefused: the archive, or a member that matches, is refused; see ``open_member``.
    """
    with _opened(archive, open_stored) as opened:
        entries = [entry for entry in opened.infolist() if not entry.is_dir()]
    names = [entry.filename for entry in entries if not entry.filename.startswith("__MACOSX/")]
    if pattern in names:
        found = [pattern]
    elif pattern:
        found = sorted(fnmatch.filter(names, pattern))
    else:
        found = sorted(name for name in names if name.endswith(endings))
    if not found:
        has = ", ".join(repr(name[:80]) for name in names[:10]) or "nothing"
        wanted = f"matches {pattern!r}" if pattern else f"ends in {', '.join(endings)}"
        raise FileNotFoundError(f"{archive}: no file in it {wanted}; it has {has}{' ...' if len(names) > 10 else ''}")
    by_name = {entry.filename: entry for entry in entries}
    for name in found:
        _check_member(by_name[name], archive)
    return [f"{PREFIX}{name}::{archive}" for name in found]


def open_member(name: str, open_stored: Callable[[str], Any]) -> io.BufferedIOBase:
    """Opens a member for reading its bytes.

    Raises:
      FileRefused: the archive is broken, has more than MOST_MEMBERS files or files that overlap; the member is
        encrypted, a link, named as a place outside, of an unknown compression, or packed more than LARGEST_RATIO times.
      FileNotFoundError: there is no such member.
    """
    member, archive = split(name)
    stack = contextlib.ExitStack()
    try:
        opened = stack.enter_context(_opened(archive, open_stored))
        try:
            entry = opened.getinfo(member)
        except KeyError:
            raise FileNotFoundError(f"{archive}: there is no file {member!r} in it") from None
        _check_member(entry, archive)
        with _explained(name, "cannot be read", "pack it again with zip, or unpack it"):
            f = stack.enter_context(opened.open(entry))
    except BaseException:
        stack.close()
        raise
    return _Member(f, stack)


@contextlib.contextmanager
def _explained(name: str, what: str, advice: str) -> Iterator[None]:
    """Raises FileRefused in place of the errors that zipfile has for content that it does not expect."""
    try:
        yield
    except (*_FAULTS, OSError) as error:
        # The position of a member may lie outside of the archive. Other errors are those of the file system.
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        raise FileRefused(f"{name}: {what} ({error}); {advice}") from error


class _Member(io.BufferedReader):
    """A member that closes its archive with itself."""

    def __init__(self, f: Any, stack: contextlib.ExitStack):
        super().__init__(f)
        self._stack = stack

    def close(self) -> None:
        super().close()
        self._stack.close()


@contextlib.contextmanager
def _opened(archive: str, open_stored: Callable[[str], Any]) -> Iterator[zipfile.ZipFile]:
    with open_stored(archive) as f:
        with _explained(archive, "is not a readable zip archive", "fetch or pack it again"):
            opened = zipfile.ZipFile(f)
        with opened:
            entries = opened.infolist()
            if len(entries) > MOST_MEMBERS:
                raise FileRefused(f"{archive}: has more than {MOST_MEMBERS:,} files; unpack it")
            size = f.seek(0, io.SEEK_END)
            if sum(entry.compress_size for entry in entries) > size:
                raise FileRefused(f"{archive}: files in it overlap, so that they would count twice; unpack it yourself")
            names = [entry.filename for entry in entries]
            if len(set(names)) < len(names):
                raise FileRefused(f"{archive}: holds two files of the same name; unpack it yourself")
            yield opened


def _check_member(entry: zipfile.ZipInfo, archive: str) -> None:
    name = f"{archive}: {entry.filename!r}"
    if entry.filename.startswith("/") or re.search(r"(^|/)\.\.(/|$)|\\|::|^[A-Za-z]:", entry.filename):
        raise FileRefused(f"{name} is named as a place outside of the archive, or with '::'; unpack it yourself")
    if stat.S_ISLNK(entry.external_attr >> 16):
        raise FileRefused(f"{name} is a link; put the file itself into the archive")
    if entry.flag_bits & _ENCRYPTED:
        raise FileRefused(f"{name} is encrypted; unpack it with its password")
    if entry.file_size > FREE_BYTES + LARGEST_RATIO * entry.compress_size:
        raise FileRefused(
            f"{name} unpacks from {entry.compress_size:,} to {entry.file_size:,} bytes, which text does not; if it is "
            f"right, unpack it yourself"
        )

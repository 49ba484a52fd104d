"""The interface that every file format implements, and what the formats share."""

import abc
import contextlib
import errno
import hashlib
import os
from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

import fsspec

from nomic_jax.data.formats.row_checks import BadRow, RawRow

# Of the file itself; what a network or a full table of files says may be otherwise in a minute.
_UNREADABLE = (errno.EISDIR, errno.EACCES, errno.EPERM, errno.EIO)


class Mark(NamedTuple):
    """A place in a file where reading can start: the row, and for jsonl its line (from 0) and uncompressed byte."""

    row: int
    line: int = 0
    byte: int = 0


class Scan(NamedTuple):
    """What one pass over a file finds out.

    Attributes:
      sha256: of its bytes as they are stored; empty if not even those can be read.
      rows: of the file, bad ones included; of a broken one those that are known of.
      marks: where the spans of the file begin, the first one at row 0.
      ends_sha256: of jsonl, the digest of all rows' ends (int64 bytes), to compare the original's offsets with.
      broken: why the file cannot be read to its end; empty if it can.
    """

    sha256: str
    rows: int
    marks: tuple[Mark, ...]
    ends_sha256: str = ""
    broken: str = ""


class FileRows(abc.ABC):
    """The rows of one file, with random access; opening is cheap, and no file is held in memory.

    Args:
      file: path or URL.
      columns: name -> ``str`` or ``list``; see ``nomic_jax.data.formats.reading.read_rows``.
      others: further columns to decode; None for all.
    """

    def __init__(self, file: str, columns: Mapping[str, type], others: Collection[str] | None):
        self.file, self.columns, self.others = file, columns, others

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def numbered(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[str, RawRow]]:
        """(where it stands, in words; the row) of the rows start ... stop - 1.

        Raises:
          BadRow: the file is broken, or has not the columns.
        """

    @abc.abstractmethod
    def scan(self, span_bytes: int) -> Scan:
        """Reads the whole file; a span gets about ``span_bytes`` of uncompressed data."""

    @property
    def wanted(self) -> list[str] | None:
        """The columns to decode; None for all."""
        return None if self.others is None else list(dict.fromkeys([*self.columns, *self.others]))


@contextlib.contextmanager
def named_if_unreadable(file: str) -> Iterator[None]:
    """Makes a BadRow of what the file system says of a folder in place of a file, of one it may not or cannot read."""
    try:
        yield
    except OSError as error:
        if error.errno not in _UNREADABLE:
            raise
        raise BadRow(f"{file}: cannot be read ({os.strerror(error.errno)}); write or fetch it again") from error


def sha256_of_file(file: str) -> str:
    """Raises BadRow if the file is a folder, or may not be read."""
    digest = hashlib.sha256()
    with named_if_unreadable(file), fsspec.open(file, "rb") as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def marks_of_sizes(sizes: Iterator[tuple[int, int]], span_bytes: int) -> tuple[int, tuple[Mark, ...]]:
    """(rows, marks) of (rows, bytes) of consecutive groups of rows; a span starts where a group does."""
    rows, held, marks = 0, span_bytes, []
    for count, size in sizes:
        if held >= span_bytes and count:
            marks.append(Mark(rows))
            held = 0
        rows += count
        held += size
    return rows, tuple(marks)

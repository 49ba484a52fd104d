"""The interface that every file format implements, and helpers that the formats share."""

import abc
import contextlib
import errno
import hashlib
import os
from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

from nomic_jax.data.formats.file_systems import open_stored
from nomic_jax.data.formats.row_checks import BadRow, RawRow
from nomic_jax.data.formats.text.zip_members import DAMAGED_MEMBER
from nomic_jax.files.reading import FileRefused

# Errors of the file itself. Others, such as a network error or too many open files, may be temporary.
_UNREADABLE = (errno.EISDIR, errno.EACCES, errno.EPERM, errno.EIO)


# Memory holds a row several times over. The longest books have 10 MB.
MAX_ROW_MIB = 64
_MAX_ROW = "NOMIC_JAX_MAX_ROW_MIB"


def set_max_row_mib(mib: int) -> None:
    """Sets the size of the largest row in this process and those that it starts (--max_row_mib)."""
    os.environ[_MAX_ROW] = str(mib)


def max_row_bytes() -> int:
    """Returns the size of the largest row that is read: of a line of jsonl, or of the values of another format."""
    return int(os.environ.get(_MAX_ROW, MAX_ROW_MIB)) << 20


def too_large(where: str) -> BadRow:
    return BadRow(f"{where}: is larger than {max_row_bytes() >> 20} MiB; set --max_row_mib if it should be read")


class Mark(NamedTuple):
    """A position where reading can start: the row and, for jsonl, its line (from 0) and uncompressed byte offset."""

    row: int
    line: int = 0
    byte: int = 0


class Scan(NamedTuple):
    """The result of one pass over a file.

    Attributes:
      sha256: digest of the stored bytes; empty if they cannot be read.
      rows: number of rows, bad ones included; for a broken file, the number of rows found.
      marks: start of each span of the file; the first is at row 0.
      ends_sha256: for jsonl, digest of the end offsets of all rows (int64 bytes), compared with the original's offsets.
      broken: why the file cannot be read to its end; empty if it can.
    """

    sha256: str
    rows: int
    marks: tuple[Mark, ...]
    ends_sha256: str = ""
    broken: str = ""


class FileRows(abc.ABC):
    """The rows of one file, with random access. Opening is cheap, and the file is not loaded into memory.

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
        """Yields (location for messages, row) of the rows start ... stop - 1.

        Raises:
          BadRow: the file is broken or lacks the columns.
        """

    @abc.abstractmethod
    def scan(self, span_bytes: int) -> Scan:
        """Reads the whole file. A span has about ``span_bytes`` of uncompressed data."""

    @property
    def decoded_columns(self) -> list[str] | None:
        """The columns to decode; None for all."""
        return None if self.others is None else list(dict.fromkeys([*self.columns, *self.others]))


@contextlib.contextmanager
def unreadable_as_bad_row(file: str) -> Iterator[None]:
    """Raises BadRow in place of the error for a path that is no regular file, lacks permission or cannot be read."""
    try:
        yield
    except FileRefused as error:
        raise BadRow(str(error)) from error
    except DAMAGED_MEMBER as error:
        raise BadRow(f"{file}: cannot be read ({error}); fetch it again") from error
    except OSError as error:
        if error.errno not in _UNREADABLE:
            raise
        raise BadRow(f"{file}: cannot be read ({os.strerror(error.errno)}); write or fetch it again") from error


def sha256_of_file(file: str) -> str:
    """Returns the digest of the stored bytes. Raises BadRow if the path is a folder or cannot be read."""
    digest = hashlib.sha256()
    with unreadable_as_bad_row(file), open_stored(file) as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def marks_of_sizes(sizes: Iterator[tuple[int, int]], span_bytes: int) -> tuple[int, tuple[Mark, ...]]:
    """Returns (rows, marks) for consecutive groups of (rows, bytes). A span starts at the start of a group."""
    rows, held, marks = 0, span_bytes, []
    for count, size in sizes:
        if held >= span_bytes and count:
            marks.append(Mark(rows))
            held = 0
        rows += count
        held += size
    return rows, tuple(marks)

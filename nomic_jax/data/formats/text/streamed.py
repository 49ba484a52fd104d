"""What the formats of text that are parsed in one pass share: random access by positions where rows start."""

import abc
import hashlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

from nomic_jax.data.formats.file_format import FileRows, Mark, Scan, unreadable_as_bad_row
from nomic_jax.data.formats.file_systems import open_stored
from nomic_jax.data.formats.row_checks import BadRow, RawRow
from nomic_jax.data.formats.text.compression import HashingReader, decompressed, explained

INDEX_BYTES = 1 << 16  # between two positions where random access can start


class Parsed(NamedTuple):
    """A row of a file: where it starts, its line for messages (from 1), and its values."""

    mark: Mark
    line: int
    row: RawRow


class StreamedRows(FileRows):
    """The rows of a file that ``parse`` reads; see ``FileRows``.

    Args:
      marks: known positions where rows start; the start of the file is always included.
    """

    def __init__(
        self,
        file: str,
        columns: Mapping[str, type],
        others: Collection[str] | None = None,
        marks: Collection[Mark] = (),
    ):
        super().__init__(file, columns, others)
        self.marks = sorted({Mark(0), *marks})
        self._rows: int | None = None

    @abc.abstractmethod
    def parse(self, f: Any, mark: Mark) -> Iterator[Parsed]:
        """Yields the rows of the uncompressed file ``f`` from a mark on.

        Raises:
          BadRow: the file is broken, or lacks the columns. A row that alone cannot be used is yielded as such.
        """

    def __len__(self) -> int:
        if self._rows is None:
            scan = self.scan(INDEX_BYTES)
            if scan.broken:
                raise BadRow(scan.broken)
            self._rows, self.marks = scan.rows, list(scan.marks) or [Mark(0)]
        return self._rows

    def numbered(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[str, RawRow]]:
        if stop is not None and stop <= start:
            return
        mark = max((mark for mark in self.marks if mark.row <= start), default=Mark(0))
        line = mark.line
        with explained(self.file, lambda: line), open_stored(self.file) as stored, decompressed(self.file, stored) as f:
            for parsed in self.parse(f, mark):
                line = parsed.line
                if parsed.mark.row >= start:
                    yield f"{self.file}:{line}", parsed.row
                if parsed.mark.row + 1 == stop:  # later bytes may be broken
                    return

    def scan(self, span_bytes: int) -> Scan:
        sha256 = hashlib.sha256()
        marks: list[Mark] = []
        rows = line = 0
        broken = ""
        with unreadable_as_bad_row(self.file), open_stored(self.file) as stored:
            hashing = HashingReader(stored, sha256)
            try:
                with explained(self.file, lambda: line), decompressed(self.file, hashing) as f:
                    for parsed in self.parse(f, Mark(0)):
                        if not marks or parsed.mark.byte >= marks[-1].byte + span_bytes:
                            marks.append(parsed.mark)
                        rows, line = parsed.mark.row + 1, parsed.line
            except BadRow as error:
                broken = str(error)
            broken = hashing.drain(self.file, broken)
        return Scan(sha256.hexdigest(), rows, tuple(marks), broken=broken)

"""Reads jsonl files, plain or compressed (.gz, .bz2, .xz, .zst). A row is a line that is not blank."""

import hashlib
import io
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import IO

import numpy as np

from nomic_jax.data.formats.file_format import FileRows, Mark, Scan, max_row_bytes, too_large, unreadable_as_bad_row
from nomic_jax.data.formats.file_systems import open_stored
from nomic_jax.data.formats.row_checks import BadRow, RawRow
from nomic_jax.data.formats.text.compression import BROKEN, HashingReader, decompressed, explained

CHUNK = 1 << 22  # bytes processed at once
INDEX_BYTES = 1 << 16  # between two positions where random access can start
_BLANKS = np.frombuffer(b" \t\n\r\x0b\x0c", np.uint8)


class JsonlRows(FileRows):
    """The rows of a jsonl file; see ``FileRows``. Random access to a compressed file decompresses it up to the row.

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
        self._open: IO[bytes] | None = None

    def __len__(self) -> int:
        if self._rows is None:
            scan = self.scan(INDEX_BYTES)
            if scan.broken:
                raise BadRow(scan.broken)
            self._rows, self.marks = scan.rows, list(scan.marks)
        return self._rows

    def numbered(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[str, RawRow]]:
        if stop is not None and stop <= start:
            return
        mark = max((mark for mark in self.marks if mark.row <= start), default=Mark(0))
        row, line = mark.row, mark.line
        found_any = line > 0
        with explained(self.file, lambda: line), open_stored(self.file) as stored, decompressed(self.file, stored) as f:
            if mark.byte:
                f.seek(mark.byte)
            limit = max_row_bytes()
            while raw := f.readline(limit + 1):
                line += 1
                if len(raw) > limit:
                    raise too_large(f"{self.file}:{line}")
                found_any = True
                if not raw.strip():
                    continue
                if row >= start:
                    yield f"{self.file}:{line}", raw
                row += 1
                if row == stop:  # later bytes may be broken
                    return
        if not found_any:
            raise self._empty()

    def scan(self, span_bytes: int) -> Scan:
        sha256, ends_sha256 = hashlib.sha256(), hashlib.sha256()
        marks: list[Mark] = []
        row = line = 0
        byte = 0  # offset of the line at the start of ``parts``
        parts: list[bytes] = []  # of an incomplete line; joined only once, so that long lines stay cheap
        held = 0  # bytes in ``parts``
        broken = ""
        with unreadable_as_bad_row(self.file), open_stored(self.file) as stored:
            hashing = HashingReader(stored, sha256)
            chunks = self._chunks(hashing, lambda: line)
            try:
                for chunk in chunks:
                    parts.append(chunk)
                    held += len(chunk)
                    if chunk and b"\n" not in chunk:
                        if held > max_row_bytes():
                            raise too_large(f"{self.file}:{line + 1}")
                        continue
                    text = b"".join(parts)
                    if not chunk:
                        starts, ends = _lines(text, ends_with_file=True)
                    else:
                        starts, ends = _lines(text, ends_with_file=False)
                    is_row = _not_blank(text, starts, ends)
                    first_row, first_line = row, line
                    row += int(is_row.sum())
                    line += len(starts)
                    ends_sha256.update((byte + ends[is_row]).astype("<i8").tobytes())
                    # Reading could start at each of these lines; a mark is set at the first line of each span.
                    candidates = np.flatnonzero(is_row)
                    while len(candidates):
                        due = marks[-1].byte + span_bytes if marks else 0
                        later = candidates[np.searchsorted(byte + starts[candidates], due) :]
                        if not len(later):
                            break
                        i = int(later[0])
                        marks.append(Mark(first_row + int(is_row[:i].sum()), first_line + i, byte + int(starts[i])))
                        candidates = later[1:]
                    done = int(ends[-1]) if len(ends) else 0
                    byte += done
                    parts = [text[done:]]
                    held = len(parts[0])
            except BadRow as error:
                broken = str(error)
            broken = hashing.drain(self.file, broken)
        if line == 0 and not broken:
            raise self._empty()
        return Scan(sha256.hexdigest(), row, tuple(marks), ends_sha256.hexdigest(), broken)

    def _chunks(self, stored: io.RawIOBase, lines_read: Callable[[], int]) -> Iterator[bytes]:
        """Yields CHUNK bytes at a time and b"" at the end. Yields a broken file up to the break, then raises BadRow."""
        with explained(self.file, lines_read), decompressed(self.file, stored) as f:
            while True:
                parts, missing = [], CHUNK
                try:
                    while missing and (part := f.read1(missing)):
                        parts.append(part)
                        missing -= len(part)
                except (*BROKEN, OSError):
                    if parts:
                        yield b"".join(parts)
                    raise
                yield b"".join(parts)
                if missing == CHUNK:
                    return

    def _empty(self) -> BadRow:
        return BadRow(f"{self.file}: the file is empty; expected jsonl rows with the columns {', '.join(self.columns)}")


def _lines(text: bytes, *, ends_with_file: bool) -> tuple[np.ndarray, np.ndarray]:
    """Returns (starts, ends) of the complete lines. A line ends after its line feed."""
    ends = np.flatnonzero(np.frombuffer(text, np.uint8) == ord("\n")).astype(np.int64) + 1
    if ends_with_file and len(text) > (ends[-1] if len(ends) else 0):
        ends = np.append(ends, len(text))
    return np.concatenate([[0], ends[:-1]]).astype(np.int64)[: len(ends)], ends


def _not_blank(text: bytes, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    is_row = np.ones(len(starts), bool)
    for i in np.flatnonzero(np.isin(np.frombuffer(text, np.uint8)[starts], _BLANKS)):
        is_row[i] = bool(text[starts[i] : ends[i]].strip())
    return is_row

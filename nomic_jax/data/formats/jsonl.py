"""Rows of jsonl files, plain or compressed (.gz, .bz2, .xz, .zst): a row is a line that is not blank."""

import contextlib
import gzip
import hashlib
import io
import lzma
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import IO, Any

import fsspec
import fsspec.compression
import fsspec.utils
import numpy as np

from nomic_jax.data.formats.file_format import FileRows, Mark, Scan, named_if_unreadable
from nomic_jax.data.formats.row_checks import BadRow, RawRow

CHUNK = 1 << 22  # bytes looked at together
INDEX_BYTES = 1 << 16  # between two places where random access can start
_BLANKS = np.frombuffer(b" \t\n\r\x0b\x0c", np.uint8)
_BROKEN = (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError)


class JsonlRows(FileRows):
    """See ``FileRows``. In a compressed file, random access decompresses all that lies before.

    Args:
      marks: known places where rows start; the beginning is always one.
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
        with self._errors(lambda: line), fsspec.open(self.file, "rb", compression="infer") as f:
            if mark.byte:
                f.seek(mark.byte)
            for raw in f:
                line += 1
                found_any = True
                if not raw.strip():
                    continue
                if row >= start:
                    yield f"{self.file}:{line}", raw
                row += 1
                if row == stop:  # the file may be broken behind it
                    return
        if not found_any:
            raise self._empty()

    def scan(self, span_bytes: int) -> Scan:
        sha256, ends_sha256 = hashlib.sha256(), hashlib.sha256()
        marks: list[Mark] = []
        row = line = 0
        byte = 0  # where the line that begins ``parts`` starts
        parts: list[bytes] = []  # of a line that has not ended; put together once, however long it is
        broken = ""
        with named_if_unreadable(self.file), fsspec.open(self.file, "rb") as stored:
            hashing = _HashingReader(stored, sha256)
            chunks = self._chunks(hashing, lambda: line)
            try:
                for chunk in chunks:
                    parts.append(chunk)
                    if chunk and b"\n" not in chunk:
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
                    # Each of these lines would be a place to start; of every span the first one is kept.
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
            except BadRow as error:
                broken = str(error)
            hashing.drain()
        if line == 0 and not broken:
            raise self._empty()
        return Scan(sha256.hexdigest(), row, tuple(marks), ends_sha256.hexdigest(), broken)

    def _chunks(self, stored: io.RawIOBase, lines_read: Callable[[], int]) -> Iterator[bytes]:
        """CHUNK bytes at a time, at the end b""; of a broken file all that comes before the break, then a BadRow."""
        with self._errors(lines_read), _decompressed(self.file, stored) as f:
            while True:
                parts, missing = [], CHUNK
                try:
                    while missing and (part := f.read1(missing)):
                        parts.append(part)
                        missing -= len(part)
                except (*_BROKEN, OSError):
                    if parts:
                        yield b"".join(parts)
                    raise
                yield b"".join(parts)
                if missing == CHUNK:
                    return

    @contextlib.contextmanager
    def _errors(self, lines_read: Callable[[], int]) -> Iterator[None]:
        try:
            yield
        except (*_BROKEN, OSError) as error:
            if isinstance(error, OSError) and (error.errno is not None or not is_compressed(self.file)):
                with named_if_unreadable(self.file):
                    raise  # of the file system; decompressors give no number
            raise BadRow(
                f"{self.file}: the compressed file breaks off after line {lines_read()} ({error}); fetch it again"
            ) from error

    def _empty(self) -> BadRow:
        return BadRow(f"{self.file}: the file is empty; expected jsonl rows with the columns {', '.join(self.columns)}")


def _lines(text: bytes, *, ends_with_file: bool) -> tuple[np.ndarray, np.ndarray]:
    """(starts, ends) of the complete lines; an end is behind the line feed."""
    ends = np.flatnonzero(np.frombuffer(text, np.uint8) == ord("\n")).astype(np.int64) + 1
    if ends_with_file and len(text) > (ends[-1] if len(ends) else 0):
        ends = np.append(ends, len(text))
    return np.concatenate([[0], ends[:-1]]).astype(np.int64)[: len(ends)], ends


def _not_blank(text: bytes, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    is_row = np.ones(len(starts), bool)
    for i in np.flatnonzero(np.isin(np.frombuffer(text, np.uint8)[starts], _BLANKS)):
        is_row[i] = bool(text[starts[i] : ends[i]].strip())
    return is_row


class _HashingReader(io.RawIOBase):
    """Hashes the bytes that pass through."""

    def __init__(self, f: IO[bytes], digest: Any):
        self.f, self.digest = f, digest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.f.read(len(buffer))
        buffer[: len(data)] = data
        self.digest.update(data)
        return len(data)

    def drain(self) -> None:
        """A decompressor may stop before the end of the file."""
        while self.read(1 << 20):
            pass


def is_compressed(file: str) -> bool:
    return fsspec.utils.infer_compression(file) is not None


@contextlib.contextmanager
def _decompressed(file: str, f: io.RawIOBase) -> Iterator[Any]:
    name = fsspec.utils.infer_compression(file)
    buffered = io.BufferedReader(f, 1 << 20)
    try:
        yield fsspec.compression.compr[name](buffered, mode="rb") if name else buffered
    finally:
        buffered.detach()  # closing it would close the file, of which there may be more to hash

"""Reads a json file that holds one array of objects, element by element."""

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any

from nomic_jax.data.formats.file_format import Mark, max_row_bytes, too_large
from nomic_jax.data.formats.file_systems import open_stored
from nomic_jax.data.formats.row_checks import ROW_JSON, BadRow, UnusableRow
from nomic_jax.data.formats.text.compression import decompressed, explained
from nomic_jax.data.formats.text.streamed import Parsed, StreamedRows

CHUNK = 1 << 20  # bytes read at once
_SPACE = re.compile(r"[ \t\r\n]*")
_NEAR_END = 16  # characters before the end where an error may be that the rest is not read yet


class JsonArrayRows(StreamedRows):
    """The rows of a json file that holds an array; see ``FileRows``. An element that is no object cannot be used."""

    def parse(self, f: Any, mark: Mark) -> Iterator[Parsed]:
        text = _Text(f, self.file, mark)
        if not mark.byte:
            text.take("[", "expected an array of objects")
        row = mark.row
        if text.peek() == "]" and not mark.byte:
            text.take("]", "")
        else:
            while True:
                start, value = text.element(row)
                if not isinstance(value, dict):
                    value = UnusableRow(
                        f"expected an object with named columns, found {type(value).__name__}",
                        json.dumps(value).encode()[:1000],
                    )
                yield Parsed(start, start.line + 1, value)
                row += 1
                if text.peek() != ",":
                    break
                text.take(",", "")
            text.take("]", "expected a comma or the end of the array")
        if text.peek():
            raise text.broken("there is more after the end of the array; write one row per line, and name it .jsonl")


def is_json_array(file: str) -> bool:
    """Returns whether a json file holds an array; else it holds a row per line. Reads its beginning.

    Raises:
      BadRow: the file cannot be read.
    """
    with explained(file, lambda: 0), open_stored(file) as stored, decompressed(file, stored) as f:
        while start := f.read(1 << 10):
            if start := start.removeprefix(codecs.BOM_UTF8).lstrip():
                return start.startswith(b"[")
    return False


class _Text:
    """The text of a file from a mark on, of which a part is in memory."""

    def __init__(self, f: Any, file: str, mark: Mark):
        self.f, self.file = f, file
        self.line, self.byte = mark.line, mark.byte  # of the position in ``held``
        self.held, self.at = "", 0
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._ended = False
        if mark.byte:
            f.seek(mark.byte)
        else:
            self._more(CHUNK)
            if self.held.startswith("\ufeff"):
                self._advance(1)

    def peek(self) -> str:
        """Returns the next character that is not white space; "" at the end of the file."""
        while True:
            end = _SPACE.match(self.held, self.at).end()  # type: ignore[union-attr]
            self._advance(end - self.at)
            if self.at < len(self.held):
                return self.held[self.at]
            if not self._more(CHUNK):
                return ""

    def take(self, character: str, otherwise: str) -> None:
        if self.peek() != character:
            found = self.peek()
            raise self.broken(f"{otherwise}, found {found!r}" if found else "the file ends before its array does")
        self._advance(1)

    def element(self, row: int) -> tuple[Mark, Any]:
        """Returns the next element, and where it starts."""
        if not self.peek():
            raise self.broken("the file ends before its array does")
        start = Mark(row, self.line, self.byte)
        size = CHUNK
        while True:
            try:
                value, end = ROW_JSON.raw_decode(self.held, self.at)
                if end < len(self.held) or not self._more(size):  # a number may go on
                    break
                continue
            except ValueError as error:
                at = getattr(error, "pos", len(self.held))
                is_cut = str(error).startswith("Unterminated string") or at >= len(self.held) - _NEAR_END
                if len(self.held) - self.at > max_row_bytes():
                    raise too_large(f"{self.file}:{start.line + 1}") from None
                if not (is_cut and isinstance(error, json.JSONDecodeError) and self._more(size)):
                    raise self.broken(str(error)) from error
                size *= 2  # so that a long element is parsed a few times only
            except RecursionError:
                raise self.broken("nested too deep") from None
        if end - self.at > max_row_bytes():
            raise too_large(f"{self.file}:{start.line + 1}")
        self._advance(end - self.at)
        return start, value

    def broken(self, why: str) -> BadRow:
        return BadRow(f"{self.file}:{self.line + 1}: broken JSON ({why})")

    def _advance(self, characters: int) -> None:
        passed = self.held[self.at : self.at + characters]
        self.line += passed.count("\n")
        self.byte += len(passed) if passed.isascii() else len(passed.encode())
        self.at += characters

    def _more(self, size: int) -> bool:
        """Reads further bytes; returns whether there were any."""
        data = b"" if self._ended else self.f.read(size)
        try:
            text = self._decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            raise BadRow(
                f"{self.file}:{self.line + 1}: not valid UTF-8 in the row that begins here ({error})"
            ) from error
        self._ended = not data
        self.held, self.at = self.held[self.at :] + text, 0
        return bool(data)

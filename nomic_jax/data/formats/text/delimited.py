"""Reads csv and tsv files (RFC 4180): the first line names the columns, and a quoted value may hold line breaks."""

import csv
import json
from collections.abc import Iterator
from typing import Any

from nomic_jax.data.formats.file_format import Mark, max_row_bytes, too_large
from nomic_jax.data.formats.row_checks import BadRow, UnusableRow, listed
from nomic_jax.data.formats.text.streamed import Parsed, StreamedRows
from nomic_jax.data.formats.text.zip_members import name_inside

_BOM = b"\xef\xbb\xbf"
_NAMES = {",": "comma", "\t": "tab", ";": "semicolon", "|": "bar"}


class DelimitedRows(StreamedRows):
    """The rows of a csv or tsv file; see ``FileRows``. All values are texts.

    A column of lists holds JSON lists, or texts, which are lists of one. A row with another number of values than the
    header is a row that cannot be used. A quote that is not closed breaks the file.
    """

    @property
    def delimiter(self) -> str:
        return "\t" if ".tsv" in name_inside(self.file).rsplit("/", 1)[-1] else ","

    def parse(self, f: Any, mark: Mark) -> Iterator[Parsed]:
        csv.field_size_limit(max_row_bytes())  # of the process; by default 128 KiB
        lines = _Lines(f, self.file)
        reader = csv.reader(lines, delimiter=self.delimiter, strict=True)
        header = self._header(reader, lines)
        if mark.byte:
            f.seek(mark.byte)
            lines.line, lines.byte = mark.line, mark.byte
        row = mark.row
        while True:
            lines.begin_row()
            start = Mark(row, lines.line, lines.byte)
            try:
                values = next(reader, None)
            except csv.Error as error:
                raise self._broken(start.line + 1, error) from error
            if values is None:
                return
            if not values:  # a blank line
                continue
            yield Parsed(start, start.line + 1, self._row(header, values, lines))
            row += 1

    def _header(self, reader: Any, lines: "_Lines") -> list[str]:
        lines.begin_row()
        try:
            header = next((values for values in reader if values), None)
        except csv.Error as error:
            raise self._broken(1, error) from error
        if header is None:
            raise BadRow(f"{self.file}: the file is empty; expected a line with the names of the columns, then rows")
        header = [_text(name) if isinstance(_text(name), str) else repr(name) for name in header]
        if twice := sorted({name for name in header if header.count(name) > 1}):
            raise BadRow(f"{self.file}:1: two columns are named {twice[0][:80]!r}; the first line must name each once")
        for column in (*self.columns, *(self.others or ())):
            if column not in header:
                other = next((d for d in _NAMES if d != self.delimiter and any(d in name for name in header)), None)
                hint = "the first line must name the columns"
                if other and len(header) == 1:
                    hint = f"the values are separated by a {_NAMES[other]}: write a {_NAMES[self.delimiter]}"
                raise BadRow(f"{self.file}:1: no column {column!r}; the first line has {listed(header)}: {hint}")
        return header

    def _row(self, header: list[str], values: list[str], lines: "_Lines") -> dict[str, Any] | UnusableRow:
        if len(values) != len(header):
            return UnusableRow(
                f"has {len(values)} values, the first line names {len(header)} columns; put quotes around a value that "
                f"holds a {_NAMES[self.delimiter]} or a line break",
                lines.row_bytes(),
            )
        row: dict[str, Any] = dict(zip(header, map(_text, values)))
        for column, kind in self.columns.items():
            if kind is list:
                row[column] = _as_list(row[column])
        if self.others is None:
            return row
        return {name: row[name] for name in (*self.columns, *self.others)}

    def _broken(self, line: int, error: csv.Error) -> BadRow:
        return BadRow(
            f"{self.file}:{line}: broken {'tsv' if self.delimiter != ',' else 'csv'} in the row that begins here "
            f"({error}); a value with a quote is quoted, and the quote in it doubled"
        )


class _Lines:
    """The lines of a file as texts, with the position, and a bound on the bytes of a row."""

    def __init__(self, f: Any, file: str):
        self.f, self.file = f, file
        self.line = self.byte = self.row_start = 0
        self._of_row: list[bytes] = []

    def begin_row(self) -> None:
        self._of_row = []
        self.row_start = self.byte

    def row_bytes(self) -> bytes:
        return b"".join(self._of_row)

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        limit = max_row_bytes()
        raw = self.f.readline(limit + 1)
        if not raw:
            raise StopIteration
        self.byte += len(raw)
        if self.byte - self.row_start > limit:
            raise too_large(f"{self.file}:{self.line + 1}")
        if self.line == 0 and raw.startswith(_BOM):
            raw = raw[len(_BOM) :]
        self.line += 1
        self._of_row.append(raw)
        return raw.decode("utf-8", "surrogateescape")


def _text(value: str) -> str | bytes:
    """Returns the value; the bytes of one that is not UTF-8, which the checks of rows name."""
    if value.isascii():
        return value
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return value.encode("utf-8", "surrogateescape")
    return value


def _as_list(value: Any) -> Any:
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            values = json.loads(value)
        except (ValueError, RecursionError):
            return [value]
        if isinstance(values, list) and all(isinstance(text, str) for text in values):
            return values
    return [value]

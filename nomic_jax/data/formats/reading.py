"""Reads rows of files in every format, with errors that name file and line."""

import bisect
import itertools
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from nomic_jax.data.formats.array_record import ArrayRecordRows, is_array_record
from nomic_jax.data.formats.arrow import ArrowRows
from nomic_jax.data.formats.file_format import FileRows, Mark, Scan, sha256_of_file
from nomic_jax.data.formats.jsonl import JsonlRows
from nomic_jax.data.formats.parquet import ParquetRows
from nomic_jax.data.formats.paths import expand_files
from nomic_jax.data.formats.row_checks import (
    BadRow,
    Quarantined,
    RawRow,
    RejectedRows,
    check_finite,
    check_row,
    parse_row,
    stored_bytes,
    with_lists,
)
from nomic_jax.data.formats.text.beir import BeirRows, is_beir
from nomic_jax.data.formats.text.compression import compression_of
from nomic_jax.data.formats.text.delimited import DelimitedRows
from nomic_jax.data.formats.text.json_array import JsonArrayRows, is_json_array
from nomic_jax.data.formats.text.passages import PassageRows, is_text
from nomic_jax.data.formats.text.zip_members import is_member, name_inside

_SHEETS = (".xlsx", ".xls", ".xlsm", ".ods", ".numbers")
RowCheck = Callable[[Mapping[str, Any], str], None]


def open_file(
    file: str,
    columns: Mapping[str, type],
    others: Collection[str] | None = None,
    marks: Collection[Mark] = (),
) -> FileRows:
    """Opens one file from ``expand_files``. The file name decides the format; the default is jsonl.

    Args:
      columns, others: see ``read_rows``.
      marks: known positions where rows of a file of text start.

    Raises:
      BadRow: the format is not read, or the beginning of a json file cannot be read.
    """
    name = name_inside(file)
    if name.endswith(_SHEETS):
        raise BadRow(f"{file}: spreadsheets are not read; save the sheet as csv")
    if is_member(file) and (name.endswith((".parquet", ".arrow")) or is_array_record(name)):
        raise BadRow(f"{file}: only files of text are read inside a zip archive; unpack it")
    plain = name.removesuffix(os.path.splitext(name)[1]) if compression_of(file) else name
    if plain.endswith(".tsv") and is_beir(file):
        return BeirRows(file, columns, others)
    if plain.endswith((".csv", ".tsv")):
        return DelimitedRows(file, columns, others, marks)
    if plain.endswith(".json") and is_json_array(file):
        return JsonArrayRows(file, columns, others, marks)
    if file.endswith(".parquet"):
        return ParquetRows(file, columns, others)
    if file.endswith(".arrow"):
        return ArrowRows(file, columns, others)
    if is_array_record(file):
        return ArrayRecordRows(file, columns, others)
    if is_text(file):
        return PassageRows(file, columns, others, marks)
    return JsonlRows(file, columns, others, marks)


class Rows:
    """The rows of all files that match a pattern, with random access: ``len(rows)``, ``rows[i]``.

    The arguments are those of ``read_rows``. A row is checked when it is accessed. A jsonl file is first read once to
    find its lines. Access to a compressed jsonl file decompresses it up to the row.
    """

    def __init__(
        self,
        pattern: str | os.PathLike,
        columns: Mapping[str, type],
        *,
        others: Collection[str] | None = None,
        allow_empty: bool = False,
    ):
        self.columns, self.others, self.allow_empty = columns, others, allow_empty
        self.files = [open_file(file, columns, others) for file in expand_files(pattern)]
        self.ends = list(itertools.accumulate(len(rows) for rows in self.files))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, i: int) -> dict[str, Any]:
        """Returns row ``i``. Raises BadRow if the row cannot be used."""
        if not 0 <= i < len(self):
            raise IndexError(f"row {i} of {len(self)}")
        file = bisect.bisect_right(self.ends, i)
        row = i - (self.ends[file - 1] if file else 0)
        where, raw = next(self.files[file].numbered(row, row + 1))
        values = with_lists(parse_row(raw, where), self.columns)
        check_row(values, self.columns, self.allow_empty, where)
        return _chosen(values, self.columns, self.others)


def read_rows(
    pattern: str | os.PathLike | list[str],
    columns: Mapping[str, type],
    *,
    others: Collection[str] | None = None,
    allow_empty: bool = False,
    on_bad_row: str = "raise",
    rejected: RejectedRows | None = None,
    further_check: RowCheck = lambda row, where: None,
) -> Iterator[dict[str, Any]]:
    """Yields the rows of the files that match a pattern, in order, with columns checked. Files are read lazily.

    Args:
      pattern: see ``expand_files``.
      columns: name -> ``str`` (a non-empty text) or ``list`` (a list of non-empty texts; a text becomes a list of one).
      others: further columns to return, unchecked; None for all. A jsonl row may lack them. In other formats they must
        exist, and only the named columns are decoded.
      allow_empty: accept empty texts too.
      on_bad_row: "raise", or "skip" to pass bad rows to ``rejected`` and continue.
      rejected: required for "skip".
      further_check: (row, location for messages) -> None; raises BadRow.

    Raises:
      BadRow: invalid JSON or UTF-8, a missing column, a wrong type, an empty text, NaN or an infinite number in jsonl
        (in another format if ``others`` is None); a truncated gzip file, a broken or empty file, a parquet file without
        the columns. With "skip", each file is first read to its end. A file that cannot be read to its end becomes one
        entry in ``rejected``, and none of its rows is returned.
    """
    check_policy(on_bad_row)
    if on_bad_row == "skip" and rejected is None:
        raise ValueError('on_bad_row="skip" needs `rejected`, so that skipped rows are recorded')
    for file in expand_files(pattern):
        if rejected is None or is_readable(file, columns, others, on_bad_row, rejected):
            rows = open_file(file, columns, others)
            yield from usable_rows(rows.numbered(), columns, others, allow_empty, on_bad_row, rejected, further_check)


def is_readable(
    file: str, columns: Mapping[str, type], others: Collection[str] | None, on_bad_row: str, rejected: RejectedRows
) -> bool:
    """Under "skip", returns False and quarantines the file if it cannot be read to its end; otherwise returns True."""
    if on_bad_row == "raise":
        return True
    scan = scan_file(file, columns, others, 1 << 62)
    if scan.broken:
        rejected.quarantine(Quarantined(file, scan.broken, scan.rows))
    return not scan.broken


def scan_file(file: str, columns: Mapping[str, type], others: Collection[str] | None, span_bytes: int) -> Scan:
    """Scans a file; see ``FileRows.scan``. A fault of the file is returned in ``broken``, not raised."""
    try:
        return open_file(file, columns, others).scan(span_bytes)
    except BadRow as error:
        broken = str(error)
    try:
        return Scan(sha256_of_file(file), 0, (), broken=broken)
    except BadRow:
        return Scan("", 0, (), broken=broken)


def check_policy(on_bad_row: str) -> None:
    if on_bad_row not in ("raise", "skip"):
        raise ValueError(f'on_bad_row is {on_bad_row!r}; write "raise" or "skip"')


def usable_rows(
    numbered: Iterator[tuple[str, RawRow]],
    columns: Mapping[str, type],
    others: Collection[str] | None,
    allow_empty: bool,
    on_bad_row: str,
    rejected: RejectedRows | None,
    further_check: RowCheck = lambda row, where: None,
) -> Iterator[dict[str, Any]]:
    """Yields the valid rows of ``FileRows.numbered``; see ``read_rows``. Raises BadRow for a truncated file."""
    for where, raw in numbered:
        try:
            row = with_lists(parse_row(raw, where), columns)
            check_row(row, columns, allow_empty, where)
            if others is None and not isinstance(raw, bytes):  # all columns: they may be written as JSON
                check_finite(row, where)
            further_check(row, where)
        except BadRow as error:
            if on_bad_row == "raise":
                raise
            assert rejected is not None
            rejected.add(error, stored_bytes(raw))
            continue
        yield _chosen(row, columns, others)


def _chosen(row: dict[str, Any], columns: Mapping[str, type], others: Collection[str] | None) -> dict[str, Any]:
    return row if others is None else {name: row[name] for name in row if name in columns or name in others}

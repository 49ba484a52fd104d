"""Rows in files: jsonl (optionally compressed) and parquet, read with errors that name file and line; jsonl written."""

import contextlib
import gzip
import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec

if TYPE_CHECKING:  # imported where it is used: most commands read jsonl only
    import pyarrow as pa
    import pyarrow.parquet as pq

PARQUET_ROWS = 1024  # decoded at once


class BadRow(ValueError):
    """A row or a file that cannot be used; the message names file, line or row, and what is wrong with it."""


class RejectedRows:
    """Counts rows that were skipped and keeps them, with the reason, in a side file next to the output."""

    def __init__(self, side_file: str | os.PathLike):
        self.side_file = Path(side_file)
        self.count = 0
        # Left by a run that was killed: this run meets the same rows again.
        self.side_file.unlink(missing_ok=True)

    def add(self, error: BadRow, raw: bytes) -> None:
        self.count += 1
        self.side_file.parent.mkdir(parents=True, exist_ok=True)
        with self.side_file.open("a", encoding="utf-8") as f:
            f.write(json.dumps({"reason": str(error), "row": raw.decode("utf-8", "replace")}) + "\n")


def expand_files(pattern: str | os.PathLike) -> list[str]:
    """Files of a path, a folder (its .jsonl, .jsonl.gz and .parquet), a glob or a brace range, in a fixed order.

    ``shard-{00000..00538}.jsonl.gz`` names every file of the range, so a missing one is an error; a glob takes what is
    there. Any fsspec URL will do (local, s3://, gs://).

    Raises:
      FileNotFoundError: nothing matches, or a file of a brace range is missing.
    """
    pattern = os.fspath(pattern)
    fs, path = fsspec.core.url_to_fs(pattern)
    brace = re.search(r"\{(\d+)\.\.(\d+)\}", path)
    if brace:
        first, last = brace.groups()
        numbers = range(int(first), int(last) + 1)
        files = [f"{path[: brace.start()]}{i:0{len(first)}d}{path[brace.end() :]}" for i in numbers]
        missing = [file for file in files if not fs.exists(file)]
        if missing or not files:
            raise FileNotFoundError(f"{pattern}: {len(missing)} of {len(files)} files are missing, first {missing[:1]}")
    elif fs.isdir(path):
        files = sorted(f for f in fs.ls(path, detail=False) if f.endswith((".jsonl", ".jsonl.gz", ".parquet")))
    else:
        files = sorted(fs.glob(path)) if any(c in path for c in "*?[") else [path] if fs.exists(path) else []
    if not files:
        raise FileNotFoundError(f"no file matches {pattern}")
    return [fs.unstrip_protocol(f) if "://" in pattern else f for f in files]


def read_rows(
    pattern: str | os.PathLike,
    columns: Mapping[str, type],
    *,
    others: Collection[str] | None = None,
    allow_empty: bool = False,
    on_bad_row: str = "raise",
    rejected: RejectedRows | None = None,
) -> Iterator[dict[str, Any]]:
    """Rows of the files that match, in order, each checked to hold the columns. Files are read as the rows are taken.

    What ends in .parquet is read as parquet, all else as jsonl; blank lines are no rows.

    Args:
      pattern: see ``expand_files``.
      columns: name -> ``str`` (a text, not empty) or ``list`` (a list of such texts).
      others: further columns to pass on, unchecked; None for all there are. A jsonl row may lack them, a parquet file
        may not, and only what is named is decoded of it.
      allow_empty: take empty texts too.
      on_bad_row: "raise", or "skip" to hand bad rows to ``rejected`` and go on.
      rejected: required for "skip".

    Raises:
      BadRow: broken JSON or UTF-8, a missing column, a wrong type, an empty text; and, under either policy because rows
        would be lost uncounted: a cut gzip, a broken parquet file, one without the columns or with other types.
    """
    if on_bad_row not in ("raise", "skip"):
        raise ValueError(f'on_bad_row is {on_bad_row!r}; write "raise" or "skip"')
    if on_bad_row == "skip" and rejected is None:
        raise ValueError('on_bad_row="skip" needs `rejected`, so that no row is lost unseen')
    for file in expand_files(pattern):
        numbered = _parquet_rows(file, columns, others) if file.endswith(".parquet") else _numbered_lines(file, columns)
        for where, raw in numbered:
            try:
                row = _parse(raw, where) if isinstance(raw, bytes) else raw
                _check(row, columns, allow_empty, where)
            except BadRow as error:
                if on_bad_row == "raise":
                    raise
                assert rejected is not None
                rejected.add(error, raw if isinstance(raw, bytes) else json.dumps(raw, default=str).encode())
                continue
            yield row if others is None else {name: row[name] for name in row if name in columns or name in others}


@contextlib.contextmanager
def open_parquet(file: str) -> Iterator["pq.ParquetFile"]:
    """The open file; whatever pyarrow finds wrong with it, now or when it is read, becomes a BadRow that names it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with fsspec.open(file, "rb") as f:
        try:
            # Bytes come in as they are decoded: by default a column's of a whole row group, often all, are read ahead.
            yield pq.ParquetFile(f, buffer_size=1 << 20, pre_buffer=False)
        except (pa.ArrowException, OSError) as error:
            raise BadRow(f"{file}: not a readable parquet file ({error}); write or fetch it again") from error


def read_parquet_footer(
    file: str, columns: Mapping[str, type], others: Collection[str] = ()
) -> tuple[int, "pa.Schema"]:
    """Number of rows and the schema, checked to hold the columns as ``read_rows`` would.

    Raises:
      BadRow: a broken file, one without the columns or with other types.
    """
    with open_parquet(file) as parquet:
        _check_schema(parquet.schema_arrow, columns, others, file)
        return parquet.metadata.num_rows, parquet.schema_arrow


def _numbered_lines(file: str, columns: Mapping[str, type]) -> Iterator[tuple[str, bytes]]:
    number = 0
    try:
        with fsspec.open(file, "rb", compression="infer") as f:
            for number, raw in enumerate(f, 1):
                if raw.strip():
                    yield f"{file}:{number}", raw
    except (EOFError, gzip.BadGzipFile) as error:
        # Skipping would hide that the rest of the file is lost, so this is raised under either policy.
        raise BadRow(f"{file}: the compressed file breaks off after line {number} ({error}); fetch it again") from error
    if number == 0:
        raise BadRow(f"{file}: the file is empty; expected jsonl rows with the columns {', '.join(columns)}")


def _parquet_rows(
    file: str, columns: Mapping[str, type], others: Collection[str] | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    with open_parquet(file) as parquet:
        _check_schema(parquet.schema_arrow, columns, others or (), file)
        wanted = None if others is None else list(dict.fromkeys([*columns, *others]))
        first = 0
        for batch in parquet.iter_batches(PARQUET_ROWS, columns=wanted):
            for number, row in enumerate(_python_rows(batch), first):
                yield f"{file}: row {number} (counted from 0)", row
            first += len(batch)


def _check_schema(schema: "pa.Schema", columns: Mapping[str, type], others: Collection[str], file: str) -> None:
    for column in (*columns, *others):
        if column not in schema.names:
            raise BadRow(f"{file}: no column {column!r}; the file has {', '.join(map(repr, schema.names))}")
    for column, kind in columns.items():
        found = schema.field(column).type
        if not _holds_texts(found, kind):
            wanted = "lists of texts" if kind is list else "text"
            raise BadRow(f"{file}: column {column!r} should hold {wanted}, found the type {found}")


def _holds_texts(found: "pa.DataType", kind: type) -> bool:
    from pyarrow import types

    if types.is_null(found):  # what stands in each row says it better
        return True
    if kind is list:
        lists = (types.is_list, types.is_large_list, types.is_fixed_size_list, types.is_list_view)
        return any(is_list(found) for is_list in lists) and _holds_texts(found.value_type, str)
    if types.is_dictionary(found):
        found = found.value_type
    return types.is_string(found) or types.is_large_string(found) or types.is_string_view(found)


def _python_rows(batch: "pa.RecordBatch") -> list[dict[str, Any]]:
    """The rows with Python values; a text that is not UTF-8 stays bytes."""

    def value(scalar):
        try:
            return scalar.as_py()
        except UnicodeDecodeError as error:
            return error.object

    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        return [dict(zip(batch.schema.names, map(value, scalars))) for scalars in zip(*batch.columns)]


def _parse(raw: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRow(f"{where}: not valid UTF-8 ({error})") from error
    except json.JSONDecodeError as error:
        raise BadRow(f"{where}: broken JSON ({error})") from error
    if not isinstance(row, dict):
        raise BadRow(f"{where}: expected an object with named columns, found {type(row).__name__}")
    return row


def _check(row: Mapping[str, Any], columns: Mapping[str, type], allow_empty: bool, where: str) -> None:
    for column, kind in columns.items():
        if column not in row:
            raise BadRow(f"{where}: no column {column!r}; the row has {', '.join(map(repr, row)) or 'none'}")
        if isinstance(row[column], bytes):
            raise BadRow(f"{where}: column {column!r} is not valid UTF-8")
        texts = row[column] if kind is list else [row[column]]
        if not isinstance(texts, list):
            raise BadRow(f"{where}: column {column!r} should be a list of texts, found {type(texts).__name__}")
        for text in texts:
            if not isinstance(text, str):
                raise BadRow(f"{where}: column {column!r} should hold text, found {type(text).__name__}")
            if not allow_empty and not text.strip():
                raise BadRow(f"{where}: column {column!r} holds an empty text")
            if not text.isascii() and re.search(r"[\ud800-\udfff]", text):
                # JSON can spell it, but neither UTF-8 files nor the tokenizer can hold it.
                raise BadRow(f"{where}: column {column!r} holds half of a surrogate pair, which is no text")


def write_rows(path: str | os.PathLike, rows: Iterable[Mapping[str, Any]]) -> int:
    """Writes rows as jsonl and returns their number; the file appears complete or not at all."""
    count = 0
    with atomic_file(path) as part, open(part, "w", encoding="utf-8") as f:
        for row in rows:
            f.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place on success, so that a kill leaves no half file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    yield part
    with part.open("rb") as f:
        os.fsync(f.fileno())
    part.replace(path)


def write_json(path: str | os.PathLike, value: Any) -> None:
    with atomic_file(path) as part:
        part.write_text(json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")

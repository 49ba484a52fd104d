"""Rows in files: jsonl (optionally compressed) read with errors that name file and line, written atomically."""

import contextlib
import gzip
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import fsspec


class BadRow(ValueError):
    """A row that cannot be used; the message names file, line and what is wrong with it."""


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
    """Files of a path, a folder (its .jsonl and .jsonl.gz), a glob or a brace range, in a fixed order.

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
        files = sorted(f for f in fs.ls(path, detail=False) if f.endswith((".jsonl", ".jsonl.gz")))
    else:
        files = sorted(fs.glob(path)) if any(c in path for c in "*?[") else [path] if fs.exists(path) else []
    if not files:
        raise FileNotFoundError(f"no file matches {pattern}")
    return [fs.unstrip_protocol(f) if "://" in pattern else f for f in files]


def read_rows(
    pattern: str | os.PathLike,
    columns: Mapping[str, type],
    *,
    on_bad_row: str = "raise",
    rejected: RejectedRows | None = None,
) -> Iterator[dict[str, Any]]:
    """Rows of the jsonl files that match, in order, each checked to hold the columns.

    Args:
      pattern: see ``expand_files``.
      columns: name -> ``str`` (a text, not empty) or ``list`` (a list of such texts). Other columns are passed on.
      on_bad_row: "raise", or "skip" to hand bad rows to ``rejected`` and go on.
      rejected: required for "skip".

    Raises:
      BadRow: broken JSON or UTF-8, a missing column, a wrong type, an empty text, a cut gzip.
    """
    if on_bad_row not in ("raise", "skip"):
        raise ValueError(f'on_bad_row is {on_bad_row!r}; write "raise" or "skip"')
    if on_bad_row == "skip" and rejected is None:
        raise ValueError('on_bad_row="skip" needs `rejected`, so that no row is lost unseen')
    for file in expand_files(pattern):
        for number, raw in _numbered_lines(file, columns):
            try:
                row = _parse(raw, columns, where=f"{file}:{number}")
            except BadRow as error:
                if on_bad_row == "raise":
                    raise
                assert rejected is not None
                rejected.add(error, raw)
                continue
            yield row


def _numbered_lines(file: str, columns: Mapping[str, type]) -> Iterator[tuple[int, bytes]]:
    number = 0
    try:
        with fsspec.open(file, "rb", compression="infer") as f:
            for number, raw in enumerate(f, 1):
                if raw.strip():
                    yield number, raw
    except (EOFError, gzip.BadGzipFile) as error:
        # Skipping would hide that the rest of the file is lost, so this is raised under either policy.
        raise BadRow(f"{file}: the compressed file breaks off after line {number} ({error}); fetch it again") from error
    if number == 0:
        raise BadRow(f"{file}: the file is empty; expected jsonl rows with the columns {', '.join(columns)}")


def _parse(raw: bytes, columns: Mapping[str, type], where: str) -> dict[str, Any]:
    try:
        row = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRow(f"{where}: not valid UTF-8 ({error})") from error
    except json.JSONDecodeError as error:
        raise BadRow(f"{where}: broken JSON ({error})") from error
    if not isinstance(row, dict):
        raise BadRow(f"{where}: expected an object with named columns, found {type(row).__name__}")
    for column, kind in columns.items():
        if column not in row:
            raise BadRow(f"{where}: no column {column!r}; the row has {', '.join(map(repr, row)) or 'none'}")
        texts = row[column] if kind is list else [row[column]]
        if not isinstance(texts, list):
            raise BadRow(f"{where}: column {column!r} should be a list of texts, found {type(texts).__name__}")
        for text in texts:
            if not isinstance(text, str):
                raise BadRow(f"{where}: column {column!r} should hold text, found {type(text).__name__}")
            if not text.strip():
                raise BadRow(f"{where}: column {column!r} holds an empty text")
            if re.search(r"[\ud800-\udfff]", text):
                # JSON can spell it, but neither UTF-8 files nor the tokenizer can hold it.
                raise BadRow(f"{where}: column {column!r} holds half of a surrogate pair, which is no text")
    return row


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

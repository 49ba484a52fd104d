"""Writes files that appear complete or not at all: jsonl rows, JSON and, through ``atomic_file``, any other file."""

import base64
import contextlib
import datetime
import errno
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any


def write_rows(path: str | os.PathLike, rows: Iterable[Mapping[str, Any]]) -> int:
    """Writes rows as jsonl and returns the number of rows. The file appears complete or not at all."""
    count = 0
    with atomic_file(path) as part, open(part, "wb") as f:
        for row in rows:
            f.write(json_line(row))
            count += 1
    return count


def json_line(row: Mapping[str, Any]) -> bytes:
    """Returns a row as a line of jsonl. Times become ISO 8601, bytes base64, other types that JSON lacks text."""
    try:
        line = json.dumps(row, ensure_ascii=False, default=_json_value).encode()
    except UnicodeEncodeError:  # an unpaired surrogate in an unchecked column; JSON must escape it
        line = json.dumps(row, default=_json_value).encode()
    return line + b"\n"


def _json_value(value: Any) -> str:
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path, and renames it to ``path`` on success, so that a kill leaves no partial file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        yield part
        with part.open("rb") as f:
            os.fsync(f.fileno())
    except OSError as error:
        # Python's error does not name the file; numpy's ("8 requested and 0 written") does not even give the reason.
        if error.errno == errno.ENOSPC or (error.errno is None and "requested and" in str(error)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise
    part.replace(path)


def write_json(path: str | os.PathLike, value: Any) -> None:
    with atomic_file(path) as part:
        part.write_text(json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")

"""Writes rows as jsonl."""

import base64
import datetime
import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

from nomic_jax.files.writing import atomic_file


def write_rows(path: str | os.PathLike, rows: Iterable[Mapping[str, Any]]) -> int:
    """Writes rows as jsonl and returns the number of rows. The file appears complete or not at all."""
    count = 0
    with atomic_file(path) as part, open(part, "wb") as f:
        for row in rows:
            f.write(json_line(row))
            count += 1
    return count


def json_line(row: Mapping[str, Any]) -> bytes:
    """Returns a row as a line of jsonl. Times become ISO 8601, bytes base64, other types that JSON lacks text.

    Raises:
      ValueError: a number is NaN or infinite.
    """
    try:
        line = json.dumps(row, ensure_ascii=False, default=_json_value, allow_nan=False).encode()
    except UnicodeEncodeError:  # an unpaired surrogate in an unchecked column; JSON must escape it
        line = json.dumps(row, default=_json_value, allow_nan=False).encode()
    return line + b"\n"


def _json_value(value: Any) -> str:
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)

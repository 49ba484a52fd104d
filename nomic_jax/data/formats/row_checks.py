"""Checks rows, and records the rows and files that cannot be used."""

import json
import math
import os
import re
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from nomic_jax.files.reading import each_key_once
from nomic_jax.files.writing import append, named_errors

MAX_NAMES = 20  # of columns listed in a message


class BadRow(ValueError):
    """A row or file cannot be used. The message names the file, the line or row, and the fault."""


class UnusableRow(NamedTuple):
    """A row that its format cannot read, in a file whose other rows can be read: the reason, and what is stored."""

    reason: str
    stored: bytes


# A row as it is stored: the line for jsonl, the values for other formats.
RawRow = bytes | dict[str, Any] | UnusableRow


class Quarantined(NamedTuple):
    """A file that cannot be read to its end. No row of it is used, because rows before the break may be damaged too.

    Attributes:
      reason: the fault, starting with the file's name.
      rows_at_least: number of rows found; the file may have more.
    """

    file: str
    reason: str
    rows_at_least: int

    def __str__(self) -> str:
        lost = f"{self.rows_at_least:,} or more" if self.rows_at_least else "their number is unknown"
        return f"set aside: {self.reason}; none of its rows ({lost}) is used"


class RejectedRows:
    """Counts skipped rows, and stores them with the reason in a side file next to the output.

    Attributes:
      count: number of entries in the side file: one per row and one per quarantined file.
      quarantined: files that cannot be read to their end.
    """

    def __init__(self, side_file: str | os.PathLike):
        self.side_file = Path(side_file)
        self.count = 0
        self.quarantined: list[Quarantined] = []
        # Left by a killed run: this run finds the same rows again.
        self.side_file.unlink(missing_ok=True)

    def add(self, error: BadRow, raw: bytes) -> None:
        self.count += 1
        self.side_file.parent.mkdir(parents=True, exist_ok=True)
        with named_errors(self.side_file), append(self.side_file) as f:
            f.write(json.dumps({"reason": str(error), "row": raw.decode("utf-8", "replace")}) + "\n")

    def quarantine(self, file: Quarantined) -> None:
        self.quarantined.append(file)
        self.add(BadRow(str(file)), b"")
        tqdm.write(str(file), file=sys.stderr)


class AlreadyRejected(RejectedRows):
    """Counts bad rows when files are read again, without writing them: the side file already has them."""

    def __init__(self):
        self.count = 0

    def add(self, error: BadRow, raw: bytes) -> None:
        self.count += 1


def parse_row(raw: RawRow, where: str) -> dict[str, Any]:
    """Returns the row's values.

    Raises:
      BadRow: the row is not valid UTF-8 or JSON, its JSON is not an object, or a number in it is not finite.
    """
    if isinstance(raw, UnusableRow):
        raise BadRow(f"{where}: {raw.reason}")
    if not isinstance(raw, bytes):
        return raw
    try:
        text = raw.decode("utf-8")
        if text.startswith("\ufeff"):
            raise BadRow(f"{where}: begins with a byte order mark; save the file as UTF-8 without one")
        if text.lstrip().startswith("["):  # may be the whole file in one line, which takes minutes to parse
            raise BadRow(f"{where}: expected an object with named columns, found a list; write one row per line")
        row = ROW_JSON.decode(text)
    except UnicodeDecodeError as error:
        raise BadRow(f"{where}: not valid UTF-8 ({error})") from error
    except BadRow:
        raise
    except ValueError as error:  # also raised for a number with too many digits
        raise BadRow(f"{where}: broken JSON ({error})") from error
    except RecursionError:
        raise BadRow(f"{where}: broken JSON (nested too deep)") from None
    if not isinstance(row, dict):
        raise BadRow(f"{where}: expected an object with named columns, found {type(row).__name__}")
    return row


def stored_bytes(raw: RawRow) -> bytes:
    """Returns a row as a side file of rejected rows shows it."""
    if isinstance(raw, UnusableRow):
        return raw.stored
    return raw if isinstance(raw, bytes) else json.dumps(raw, default=str).encode()


def with_lists(row: dict[str, Any], columns: Mapping[str, type]) -> dict[str, Any]:
    """Returns the row with a list of one text where a column of lists holds a text."""
    single = [name for name, kind in columns.items() if kind is list and isinstance(row.get(name), str)]
    return row | {name: [row[name]] for name in single} if single else row


def number_of(value: Any) -> Any:
    """Returns the number that a text of csv or tsv stands for; any other value as it is."""
    for kind in (int, float) if isinstance(value, str) else ():
        try:
            return kind(value)
        except ValueError:
            pass
    return value


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"the number {digits[:80]} is out of range; write it as a text")
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON; write null, or leave the field out")


ROW_JSON = json.JSONDecoder(object_pairs_hook=each_key_once, parse_float=_finite, parse_constant=_no_constant)


def check_finite(row: Mapping[str, Any], where: str) -> None:
    """Raises BadRow if a value, also in a list or record, is NaN or infinite, which JSON cannot hold."""
    for column, value in row.items():
        if not _is_finite(value):
            raise BadRow(f"{where}: column {column!r} holds NaN or an infinite number, which JSON cannot hold")


def _is_finite(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, dict):
        return all(map(_is_finite, value.values()))
    return not isinstance(value, list) or all(map(_is_finite, value))


def check_row(row: Mapping[str, Any], columns: Mapping[str, type], allow_empty: bool, where: str) -> None:
    """Raises BadRow unless the row has the columns and they hold texts (or lists of texts)."""
    for column, kind in columns.items():
        if column not in row:
            raise BadRow(f"{where}: no column {column!r}; the row has {listed(row) or 'none'}")
        if isinstance(row[column], bytes):
            raise BadRow(f"{where}: column {column!r} is not valid UTF-8")
        texts = row[column] if kind is list else [row[column]]
        if not isinstance(texts, list):
            raise BadRow(f"{where}: column {column!r} should be a list of texts, found {type(texts).__name__}")
        for text in texts:
            if isinstance(text, bytes):
                raise BadRow(f"{where}: column {column!r} is not valid UTF-8")
            if not isinstance(text, str):
                raise BadRow(f"{where}: column {column!r} should hold text, found {type(text).__name__}")
            if not allow_empty and not text.strip():
                raise BadRow(f"{where}: column {column!r} holds an empty text")
            if not text.isascii() and re.search(r"[\ud800-\udfff]", text):
                # JSON can escape it, but UTF-8 files and the tokenizer cannot represent it.
                raise BadRow(f"{where}: column {column!r} holds half of a surrogate pair, which is not valid text")


def listed(names: Collection[str]) -> str:
    """Returns the names as text for a message, at most MAX_NAMES of them."""
    some = ", ".join(repr(name[:80]) for name in list(names)[:MAX_NAMES])
    return some if len(names) <= MAX_NAMES else f"{some} and {len(names) - MAX_NAMES:,} more"

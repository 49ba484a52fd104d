"""What a row must hold, and what becomes of rows and files that cannot be used."""

import json
import os
import re
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

# A row as the file has it: of jsonl the line, of the other formats the values.
RawRow = bytes | dict[str, Any]
MOST_NAMES = 20  # of columns, in a message


class BadRow(ValueError):
    """A row or a file that cannot be used; the message names file, line or row, and what is wrong with it."""


class Quarantined(NamedTuple):
    """A file that cannot be read to its end: none of its rows is used, as those before the break may be damaged too.

    Attributes:
      reason: what is wrong, beginning with the file's name.
      rows_at_least: so many are known of.
    """

    file: str
    reason: str
    rows_at_least: int

    def __str__(self) -> str:
        lost = f"{self.rows_at_least:,} or more" if self.rows_at_least else "nobody knows how many"
        return f"set aside: {self.reason}; none of its rows ({lost}) is used"


class RejectedRows:
    """Counts rows that were skipped and keeps them, with the reason, in a side file next to the output.

    Attributes:
      count: entries of the side file: rows, and one for each quarantined file.
      quarantined: files that were set aside.
    """

    def __init__(self, side_file: str | os.PathLike):
        self.side_file = Path(side_file)
        self.count = 0
        self.quarantined: list[Quarantined] = []
        # Left by a run that was killed: this run meets the same rows again.
        self.side_file.unlink(missing_ok=True)

    def add(self, error: BadRow, raw: bytes) -> None:
        self.count += 1
        self.side_file.parent.mkdir(parents=True, exist_ok=True)
        with self.side_file.open("a", encoding="utf-8") as f:
            f.write(json.dumps({"reason": str(error), "row": raw.decode("utf-8", "replace")}) + "\n")

    def quarantine(self, one: Quarantined) -> None:
        self.quarantined.append(one)
        self.add(BadRow(str(one)), b"")
        tqdm.write(str(one), file=sys.stderr)


def parse_row(raw: RawRow, where: str) -> dict[str, Any]:
    """The row's values.

    Raises:
      BadRow: broken UTF-8 or JSON, or JSON that is no object.
    """
    if not isinstance(raw, bytes):
        return raw
    try:
        text = raw.decode("utf-8")
        if text.startswith("\ufeff"):
            raise BadRow(f"{where}: begins with a byte order mark; save the file as UTF-8 without one")
        if text.lstrip().startswith("["):  # perhaps the whole file in one line: to parse it would take minutes
            raise BadRow(f"{where}: expected an object with named columns, found a list; write one row a line")
        row = _JSON.decode(text)
    except UnicodeDecodeError as error:
        raise BadRow(f"{where}: not valid UTF-8 ({error})") from error
    except BadRow:
        raise
    except ValueError as error:  # also of a number with too many digits
        raise BadRow(f"{where}: broken JSON ({error})") from error
    except RecursionError:
        raise BadRow(f"{where}: broken JSON (nested too deep)") from None
    if not isinstance(row, dict):
        raise BadRow(f"{where}: expected an object with named columns, found {type(row).__name__}")
    return row


def each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object's keys and values, as ``json`` hands them over, as a dictionary; Python drops the first of two.

    Raises:
      ValueError: a key is given twice.
    """
    row = dict(pairs)
    if len(row) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:80]!r} is given twice")
    return row


_JSON = json.JSONDecoder(object_pairs_hook=each_key_once)


def check_row(row: Mapping[str, Any], columns: Mapping[str, type], allow_empty: bool, where: str) -> None:
    """Raises BadRow unless the row has the columns, with texts (or lists of texts) in them."""
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
                # JSON can spell it, but neither UTF-8 files nor the tokenizer can hold it.
                raise BadRow(f"{where}: column {column!r} holds half of a surrogate pair, which is no text")


def listed(names: Collection[str]) -> str:
    """In a message."""
    some = ", ".join(repr(name[:80]) for name in list(names)[:MOST_NAMES])
    return some if len(names) <= MOST_NAMES else f"{some} and {len(names) - MOST_NAMES:,} more"

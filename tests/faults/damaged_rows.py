"""Damage to one row of a data file: the place is random, the expected error is known."""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path

from tests.faults.shards import (
    COLUMNS,
    SHARDS,
    Damaged,
    Kind,
    Rows,
    divided,
    pattern_of,
    write_lines,
    write_shards,
    write_table,
)

JSONL, TABLES = ("jsonl", "jsonl.gz"), ("parquet", "arrow")
BIG = 6_000_000  # bytes of a giant line; more than is read at once


def _row(rng: random.Random, folder: Path, rows: Rows, reader: str, *, change: Callable, forms: tuple) -> Damaged:
    """Replaces one row. ``change`` returns a raw line (bytes) or other values (dict), and the expected error."""
    form, shards = rng.choice(forms), divided(rows)
    shard = rng.randrange(SHARDS)
    place = 0 if change is _byte_order_mark else rng.randrange(len(shards[shard]))
    column = "document" if reader == "embed" else rng.choice(COLUMNS)
    changed, reason = change(rng, dict(shards[shard][place]), column)
    files, raw = write_shards(folder / "data", form, shards), None
    file = files[shard]
    if form.startswith("jsonl"):
        raw = changed if isinstance(changed, bytes) else json.dumps(changed).encode()
        lines = [json.dumps(row).encode() for row in shards[shard]]
        lines[place] = raw
        blanks = 0 if change is _byte_order_mark else rng.randint(0, 2)
        write_lines(file, [b""] * blanks + lines)
        where = f"{file}:{blanks + place + 1}: "
    else:
        write_table(file, [changed if number == place else row for number, row in enumerate(shards[shard])])
        where = f"{file}: row {place} (counted from 0): "
    good = [row["id"] for row in rows if row["id"] != shards[shard][place]["id"]]
    what = f"row {place} of {file.name}, {reason}"
    return Damaged(what, pattern_of(rng, folder / "data", form), (where, reason), good, raw)


def _broken_json(rng: random.Random, row: dict, column: str) -> tuple[bytes, str]:
    line = json.dumps(row).encode()
    return line[: rng.randrange(1, len(line))], "broken JSON"


def _nul_bytes(rng: random.Random, row: dict, column: str) -> tuple[bytes, str]:
    line = bytearray(json.dumps(row).encode())
    start = rng.randrange(len(line))
    stop = min(len(line), start + rng.randint(1, 64))
    line[start:stop] = bytes(stop - start)
    return bytes(line), "broken JSON"


def _missing_column(rng: random.Random, row: dict, column: str) -> tuple[dict, str]:
    del row[column]
    return row, f"no column {column!r}"


def _wrong_type(rng: random.Random, row: dict, column: str) -> tuple[dict, str]:
    row[column] = rng.choice([7, 1.5, float("nan"), True, {"a": 1}])
    return row, "broken JSON (NaN" if row[column] != row[column] else f"column {column!r} should hold text"


def _null(rng: random.Random, row: dict, column: str) -> tuple[dict, str]:
    row[column] = None
    return row, f"column {column!r} should hold text"


def _empty_text(rng: random.Random, row: dict, column: str) -> tuple[dict, str]:
    row[column] = rng.choice(["", " ", "\t\n", "\u2003"])
    return row, f"column {column!r} holds an empty text"


def _broken_utf8(rng: random.Random, row: dict, column: str) -> tuple[bytes, str]:
    text = row[column].encode()
    place = rng.randrange(len(text))
    broken = text[:place] + rng.choice([b"\xff", b"\xc3(", b"\xed\xa0\x80", b"\x80", b"\xf8\x88"]) + text[place:]
    return json.dumps(row, ensure_ascii=False).encode().replace(text, broken, 1), "not valid UTF-8"


def _broken_utf8_in_table(rng: random.Random, row: dict, column: str) -> tuple[dict, str]:
    row[column] = row[column].encode() + rng.choice([b"\xff", b"\xc3(", b"\xed\xa0\x80"])
    return row, f"column {column!r} is not valid UTF-8"


def _byte_order_mark(rng: random.Random, row: dict, column: str) -> tuple[bytes, str]:
    return b"\xef\xbb\xbf" + json.dumps(row).encode(), "byte order mark"


def _giant_line(rng: random.Random, row: dict, column: str) -> tuple[bytes, str]:
    """Returns one giant line: a JSON list of rows, rows without line feeds, or a text without a closing quote."""
    line = json.dumps(row).encode()
    count = rng.randint(BIG, 2 * BIG) // len(line)
    return rng.choice(
        [
            (b"[" + b", ".join([line] * count) + b"]", "found a list; write one row per line"),
            (line * count, "broken JSON (Extra data"),
            (line[:-2] + b"x" * len(line) * count, "broken JSON (Invalid control character"),
        ]
    )


def _key_twice(rng: random.Random, row: dict, column: str) -> tuple[bytes, str]:
    line = json.dumps(row).encode()
    again = json.dumps({column: rng.choice([row[column], "another", None])}).encode()
    return line[:-1] + b", " + again[1:], f"the key {column!r} is given twice"


def _half_surrogate(rng: random.Random, row: dict, column: str) -> tuple[dict, str]:
    place = rng.randrange(len(row[column]))
    row[column] = row[column][:place] + chr(rng.randrange(0xD800, 0xE000)) + row[column][place:]
    return row, f"column {column!r} holds half of a surrogate pair"


def _label(rng: random.Random, folder: Path, rows: Rows, reader: str) -> Damaged:
    labelled = [{"sentence": row["query"], "label": row["id"] % 2} for row in rows]
    shard, value = rng.randrange(SHARDS), rng.choice([float("nan"), float("inf"), None, "1", -1, 7, True, 0.5])
    shards = divided(labelled)
    place = rng.randrange(len(shards[shard]))
    shards[shard][place]["label"] = value
    files = write_shards(folder / "data", "jsonl", shards)
    is_json = not isinstance(value, float) or math.isfinite(value)
    words = (f"{files[shard]}:{place + 1}: ", f"the label is {value!r}" if is_json else "broken JSON")
    return Damaged(f"{value!r} in row {place} of {files[shard].name}", f"{folder}/data/shard-*.jsonl", words)


def _in_row(change: Callable, *tables: Callable) -> Callable[..., Damaged]:
    """Makes the damage in JSON lines, or in columns if ``tables`` has changes that column types allow."""
    changes = [(change, JSONL), *((in_table, TABLES) for in_table in tables)]

    def make(rng: random.Random, folder: Path, rows: Rows, reader: str) -> Damaged:
        chosen, forms = rng.choice(changes)
        return _row(rng, folder, rows, reader, change=chosen, forms=forms)

    return make


# The keys are part of each fault's seed: renaming a kind changes its faults.
BAD_ROWS = {
    "broken JSON": Kind(_in_row(_broken_json)),
    "missing column": Kind(_in_row(_missing_column)),
    "wrong type": Kind(_in_row(_wrong_type, _null)),
    # launch.clean removes rows with an empty text, and launch.embed embeds them: neither reports an error.
    "empty text": Kind(_in_row(_empty_text, _empty_text), ("pretokenize", "mine", "filter", "train")),
    "broken UTF-8": Kind(_in_row(_broken_utf8, _broken_utf8_in_table)),
    "NUL bytes": Kind(_in_row(_nul_bytes)),
    "byte order mark": Kind(_in_row(_byte_order_mark)),
    "giant line": Kind(_in_row(_giant_line)),
    "key given twice": Kind(_in_row(_key_twice)),
    "half a surrogate pair": Kind(_in_row(_half_surrogate)),
    "bad label": Kind(_label, ("classify",), can_be_skipped=False),
}

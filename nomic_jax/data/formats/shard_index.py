"""Compares shards with the index files that the original stores beside them: counts.json and offsets.json.gz.

    counts.json       {file: rows} or {"count_per_file": {file: rows}, "total_count": n}
    offsets.json.gz   {file: {"i": [start, end]}}: byte range of row i in the uncompressed file

Reading does not need the index files. A difference shows that a shard or its index was changed or truncated.
"""

import hashlib
import io
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from nomic_jax.data.formats.file_format import Scan
from nomic_jax.data.formats.file_systems import file_system, open_stored
from nomic_jax.data.formats.row_checks import BadRow
from nomic_jax.data.formats.text.compression import decompressed
from nomic_jax.data.formats.text.zip_members import is_member
from nomic_jax.files.reading import LARGEST_JSON

COUNTS, OFFSETS = "counts.json", "offsets.json.gz"
LARGEST_ENTRY = 1 << 28  # characters of one shard's offsets: some 8 million rows
CHARACTERS = 1 << 22  # read at once: the offsets of a source may be gigabytes
_ENTRY = re.compile(r'[\s,]*("(?:[^"\\]|\\.)*")\s*:\s*(\{[^{}]*\})')


def check_shards(files: Sequence[str], scans: Sequence[Scan]) -> None:
    """Compares jsonl files with the counts and offsets in their folder, if there are any.

    Raises:
      BadRow: they differ, or cannot be read. The message names the file and, for offsets, the first row that differs.
    """
    folders: dict[str, dict[str, tuple[str, Scan]]] = {}
    for file, scan in zip(files, scans):
        if scan.ends_sha256 and not scan.broken and not is_member(file):  # a broken file is reported elsewhere
            folder, _, name = file.rpartition("/")
            folders.setdefault(folder, {})[name] = (file, scan)
    for folder, shards in folders.items():
        prefix = f"{folder}/" if folder else ""
        if _exists(prefix + COUNTS):
            _check_counts(prefix + COUNTS, shards)
        if _exists(prefix + OFFSETS):
            _check_offsets(prefix + OFFSETS, shards)


def _exists(file: str) -> bool:
    fs, path = file_system(file)
    return fs.exists(path)


def _check_counts(file: str, shards: dict[str, tuple[str, Scan]]) -> None:
    try:
        with open_stored(file) as stored:
            text = stored.read(LARGEST_JSON + 1)
            if len(text) > LARGEST_JSON:
                raise ValueError(f"more than {LARGEST_JSON:,} bytes")
            content = json.loads(text)
        counts = {name.rsplit("/", 1)[-1]: n for name, n in content.get("count_per_file", content).items()}
        if wrong := [n for name, n in counts.items() if type(n) is not int and name in shards]:
            raise ValueError(f"{wrong[0]!r} is not a number of rows")
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise BadRow(f'{file}: not of the form {{"file": rows}} ({error}); write it again, or delete it') from error
    for name, (shard, scan) in shards.items():
        if name not in counts:
            raise BadRow(f"{file}: has no count for {shard}; write it again, or delete it")
        if counts[name] != scan.rows:
            raise BadRow(
                f"{file}: counts {counts[name]} rows in {shard}, which has {scan.rows}; fetch the shard again, "
                f"or, if it was changed on purpose, delete {COUNTS}"
            )


def _check_offsets(file: str, shards: dict[str, tuple[str, Scan]]) -> None:
    missing = set(shards)
    for name, offsets in _read_offsets(file):
        name = name.rsplit("/", 1)[-1]
        if name not in missing:
            continue
        missing.remove(name)
        shard, scan = shards[name]
        starts, ends = offsets[:, 0], offsets[:, 1]
        follows = len(offsets) > 0 and starts[0] == 0 and bool((starts[1:] == ends[:-1]).all())
        if not follows or hashlib.sha256(ends.astype("<i8").tobytes()).hexdigest() != scan.ends_sha256:
            raise BadRow(f"{file}: {_first_difference(shard, offsets)}; make the offsets again, or delete the file")
    if missing:
        raise BadRow(f"{file}: has no offsets for {shards[min(missing)][0]}; make them again, or delete the file")


def _read_offsets(file: str) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (name, int64 [rows, 2]) of each shard; only one shard's offsets are in memory at a time."""

    def broken(why: Any) -> BadRow:
        return BadRow(f'{file}: not of the form {{"file": {{"0": [start, end]}}}} ({why}); make it again, or delete it')

    try:
        with open_stored(file) as stored, decompressed(file, stored) as raw:
            f = io.TextIOWrapper(raw, encoding="utf-8")
            text = f.read(CHARACTERS).lstrip()
            if not text.startswith("{"):
                raise broken("not an object")
            position = 1
            while True:
                entry = _ENTRY.match(text, position)
                if entry is None:
                    more = f.read(CHARACTERS)
                    text, position = text[position:] + more, 0
                    if len(text) > LARGEST_ENTRY:
                        raise broken(f"an entry of more than {LARGEST_ENTRY:,} characters")
                    if more:
                        continue
                    if text.strip() != "}":
                        raise broken("the file is truncated")
                    return
                name, rows = json.loads(entry[1]), json.loads(entry[2])
                pairs = [rows[str(i)] for i in range(len(rows))]
                yield name, np.array(pairs, np.int64).reshape(len(pairs), 2)
                position = entry.end()
    except (KeyError, ValueError, TypeError, OverflowError, RecursionError, EOFError, OSError, zlib.error) as error:
        if isinstance(error, BadRow | FileNotFoundError):
            raise
        raise broken(error) from error


def _first_difference(shard: str, offsets: np.ndarray) -> str:
    at = row = 0
    with open_stored(shard) as stored, decompressed(shard, stored) as f:
        for line in f:
            start, at = at, at + len(line)
            if not line.strip():
                continue
            if row == len(offsets):
                return f"has offsets of {len(offsets)} rows of {shard}, which has more"
            if (start, at) != tuple(offsets[row]):
                hint = ""
                if offsets[row][1] - offsets[row][0] == len(line.decode("utf-8", "replace")):
                    hint = " (the offsets seem to count characters, not bytes)"
                return (
                    f"places row {row} of {shard} at the bytes {offsets[row][0]} to {offsets[row][1]}, "
                    f"but the row is at {start} to {at}{hint}"
                )
            row += 1
    return f"has offsets of {len(offsets)} rows of {shard}, which has {row}"

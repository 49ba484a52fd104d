"""Writes shards of a few rows in every format, and describes a damaged one."""

import dataclasses
import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

SHARDS = 3
COLUMNS = ("query", "document")
Rows = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Damaged:
    """Damaged data and the expected reaction.

    Attributes:
      what: a description of the damage.
      pattern: the input argument of the command.
      words: words that the error message and the entry in the side file must contain.
      good: ids of the rows that remain with on_bad_row=skip.
      raw: the bad row as it is in the file, if it is a line.
      set_aside: the file that on_bad_row=skip sets aside; "" if none.
      cache: the cache folder, if the token store is damaged.
    """

    what: str
    pattern: str
    words: tuple[str, ...]
    good: list[int] = dataclasses.field(default_factory=list)
    raw: bytes | None = None
    set_aside: str = ""
    cache: Path | None = None


class Kind(NamedTuple):
    """A kind of damage.

    Attributes:
      make: (random, an empty folder, rows of all shards, the command that will read them) -> the damaged data.
      readers: the commands that report this damage.
      can_be_skipped: whether on_bad_row=skip applies to it.
    """

    make: Callable[[random.Random, Path, Rows, str], Damaged]
    readers: tuple[str, ...] = ("clean", "pretokenize", "mine", "filter", "train", "embed")
    can_be_skipped: bool = True


def name_of(form: str, shard: int) -> str:
    """The file name of a shard; Arrow shards are named as ``datasets`` names them."""
    return f"data-{shard:05d}-of-{SHARDS:05d}.arrow" if form == "arrow" else f"shard-{shard}.{form}"


def pattern_of(rng: random.Random, folder: Path, form: str) -> str:
    """Draws one of the ways to name all shards: the folder, a wildcard, or a range."""
    if form == "arrow":
        return str(folder)
    return rng.choice([str(folder), f"{folder}/shard-*.{form}", f"{folder}/shard-{{0..{SHARDS - 1}}}.{form}"])


def write_lines(file: Path, lines: list[bytes]) -> None:
    content = b"".join(line + b"\n" for line in lines)
    file.write_bytes(gzip.compress(content, 1, mtime=0) if file.suffix == ".gz" else content)


def write_table(file: Path, rows: Rows) -> None:
    """Writes parquet or Arrow. A text may be bytes, which are written as a string without checking that it is UTF-8."""
    columns = {"id": pa.array([row["id"] for row in rows])}
    for name in COLUMNS:
        texts = [row[name].encode() if isinstance(row[name], str) else row[name] for row in rows]
        raw = pa.array(texts, pa.binary())
        columns[name] = pa.Array.from_buffers(pa.string(), len(raw), raw.buffers(), raw.null_count)
    write_columns(file, pa.table(columns))


def write_columns(file: Path, table: pa.Table) -> None:
    if file.suffix == ".parquet":
        pq.write_table(table, file, row_group_size=5)
    else:
        with pa.ipc.new_stream(str(file), table.schema) as f:
            f.write_table(table, max_chunksize=5)


def write_shards(folder: Path, form: str, shards: list[Rows]) -> list[Path]:
    folder.mkdir()
    files = [folder / name_of(form, shard) for shard in range(len(shards))]
    for file, rows in zip(files, shards):
        if form.startswith("jsonl"):
            write_lines(file, [json.dumps(row).encode() for row in rows])
        else:
            write_table(file, rows)
    if form == "arrow":
        listed = {"_data_files": [{"filename": file.name} for file in files]}
        (folder / "state.json").write_text(json.dumps(listed), encoding="utf-8")
    return files


def divided(rows: Rows) -> list[Rows]:
    size = len(rows) // SHARDS
    return [rows[shard * size : (shard + 1) * size] for shard in range(SHARDS)]

"""Shards of a few rows in every format, and what is known of one that was damaged."""

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
    """Attributes:
    what: where.
    pattern: what the command is given.
    words: that the message, and the entry in the side file, must have.
    good: ids of the rows that are left when it is skipped.
    raw: the bad row, where that is a line.
    set_aside: the file that is, when it is skipped.
    cache: of tokens, where that is what is damaged.
    """

    what: str
    pattern: str
    words: tuple[str, ...]
    good: list[int] = dataclasses.field(default_factory=list)
    raw: bytes | None = None
    set_aside: str = ""
    cache: Path | None = None


class Kind(NamedTuple):
    """Attributes:
    make: (random, an empty folder, rows of all shards, the command that will read them).
    readers: the commands that it can be met by.
    """

    make: Callable[[random.Random, Path, Rows, str], Damaged]
    readers: tuple[str, ...] = ("clean", "pretokenize", "mine", "filter", "train", "embed")
    can_be_skipped: bool = True


def name_of(form: str, shard: int) -> str:
    """As ``datasets`` names the shards of a folder, or as anyone does."""
    return f"data-{shard:05d}-of-{SHARDS:05d}.arrow" if form == "arrow" else f"shard-{shard}.{form}"


def pattern_of(rng: random.Random, folder: Path, form: str) -> str:
    if form == "arrow":
        return str(folder)
    return rng.choice([str(folder), f"{folder}/shard-*.{form}", f"{folder}/shard-{{0..{SHARDS - 1}}}.{form}"])


def write_lines(file: Path, lines: list[bytes]) -> None:
    content = b"".join(line + b"\n" for line in lines)
    file.write_bytes(gzip.compress(content, 1, mtime=0) if file.suffix == ".gz" else content)


def write_table(file: Path, rows: Rows) -> None:
    """Texts may be bytes: nobody checks them to be UTF-8."""
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

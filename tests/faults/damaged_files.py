"""Damage to data files, to their metadata, to token stores and to mixtures; KINDS also has the damage to rows."""

import functools
import gzip
import io
import json
import random
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from tests.corpus import find_minilm
from tests.faults import processes
from tests.faults.damaged_rows import BAD_ROWS
from tests.faults.shards import (
    COLUMNS,
    SHARDS,
    Damaged,
    Kind,
    Rows,
    divided,
    pattern_of,
    write_columns,
    write_shards,
)


def _file(rng: random.Random, folder: Path, rows: Rows, reader: str, *, change: Callable, forms: tuple) -> Damaged:
    """Damages one shard with ``change``, which returns a description and a word of the expected error."""
    form, shards, shard = rng.choice(forms), divided(rows), rng.randrange(SHARDS)
    files = write_shards(folder / "data", form, shards)
    how, reason = change(rng, files[shard])
    good = [row["id"] for number, own in enumerate(shards) if number != shard for row in own]
    pattern = pattern_of(rng, folder / "data", form)
    return Damaged(
        f"{how} {files[shard].name}", pattern, (str(files[shard]), reason), good, set_aside=str(files[shard])
    )


def _cut(rng: random.Random, file: Path, *, reason: str, is_valid: Callable[[bytes], object]) -> tuple[str, str]:
    """Cuts a file at a random place where the rest is not by chance a valid file of fewer rows."""
    content = file.read_bytes()
    while True:
        left = content[: rng.randrange(1, len(content))]
        try:
            is_valid(left)
        except (pa.ArrowException, OSError, EOFError, zlib.error):
            file.write_bytes(left)
            return f"{len(left)} of {len(content)} bytes left of", reason


def cut_gzip(rng: random.Random, file: Path) -> tuple[str, str]:
    return _cut(rng, file, reason="the compressed file breaks off after line", is_valid=gzip.decompress)


def cut_parquet(rng: random.Random, file: Path) -> tuple[str, str]:
    return _cut(rng, file, reason="not a readable parquet file", is_valid=lambda left: pq.ParquetFile(io.BytesIO(left)))


def _cut_arrow(rng: random.Random, file: Path) -> tuple[str, str]:
    """Cuts anywhere, or between two batches, where pyarrow would read a valid file of fewer rows."""
    content = file.read_bytes()
    between = [length for length in range(8, len(content), 8) if _is_stream(content[:length])]
    left = rng.choice([rng.randrange(1, len(content)), rng.choice(between)])
    file.write_bytes(content[:left])
    return f"{left} of {len(content)} bytes left of", "not a readable Arrow file"


def _is_stream(content: bytes) -> bool:
    try:
        pa.ipc.open_stream(content).read_all()
    except (pa.ArrowException, OSError):
        return False
    return True


def flip_gzip(rng: random.Random, file: Path) -> tuple[str, str]:
    """Flips a bit that breaks the file; some bits of the header do not. The error depends on the place of the bit."""
    content = file.read_bytes()
    while True:
        place, bit = rng.randrange(len(content)), rng.randrange(8)
        changed = bytearray(content)
        changed[place] ^= 1 << bit
        try:
            gzip.decompress(bytes(changed))
        except (OSError, EOFError, zlib.error):
            file.write_bytes(bytes(changed))
            return f"bit {bit} of byte {place} flipped of", ""


def _other_schema(rng: random.Random, file: Path) -> tuple[str, str]:
    table = pq.read_table(file, use_threads=False) if file.suffix == ".parquet" else pa.ipc.open_stream(file).read_all()
    if rng.random() < 0.5:
        write_columns(file, table.rename_columns(["id", "query", "body"]))
        return "document renamed in", "no column 'document'; the file has 'id', 'query', 'body'"
    write_columns(file, table.set_column(2, "document", pa.array(range(len(table)))))
    return "document of numbers in", "column 'document' should hold text, found the type int64"


def _empty(rng: random.Random, file: Path) -> tuple[str, str]:
    content = gzip.compress(b"", mtime=0) if file.suffix == ".gz" and rng.random() < 0.5 else b""
    file.write_bytes(content)
    return (
        f"{len(content)} bytes in",
        "not a readable parquet file" if file.suffix == ".parquet" else "the file is empty",
    )


def folder_in_place(rng: random.Random, file: Path) -> tuple[str, str]:
    file.unlink()
    file.mkdir()
    return "a folder named", "s a directory"


def _missing_shard(rng: random.Random, folder: Path, rows: Rows, reader: str) -> Damaged:
    form, shard = rng.choice(["jsonl", "jsonl.gz", "parquet", "arrow"]), rng.randrange(SHARDS)
    files = write_shards(folder / "data", form, divided(rows))
    files[shard].unlink()
    pattern = f"{folder}/data" if form == "arrow" else f"{folder}/data/shard-{{0..{SHARDS - 1}}}.{form}"
    return Damaged(files[shard].name, pattern, (f"1 of {SHARDS} files are missing", files[shard].name))


def _beside(rng: random.Random, folder: Path, rows: Rows, reader: str, *, change: Callable) -> Damaged:
    form, shards, shard = rng.choice(["jsonl", "jsonl.gz"]), divided(rows), rng.randrange(SHARDS)
    files = write_shards(folder / "data", form, shards)
    what, words = change(rng, files, shards, shard)
    return Damaged(what, pattern_of(rng, folder / "data", form), words)


def _counts(rng: random.Random, files: list[Path], shards: list[Rows], shard: int) -> tuple[str, tuple[str, ...]]:
    counts: dict[str, Any] = {file.name: len(own) for file, own in zip(files, shards)}
    name, found = files[shard].name, counts[files[shard].name]
    wrong = rng.choice([found + 1, found - 1, 0, -found, found / 2, str(found), None])
    if wrong is None:
        del counts[name]
    else:
        counts[name] = wrong
    file = files[0].with_name("counts.json")
    file.write_text(json.dumps(rng.choice([counts, {"count_per_file": counts}])), encoding="utf-8")
    if wrong is None:
        reason = f"has no count for {files[shard]}"
    elif type(wrong) is int:
        reason = f"counts {wrong} rows in {files[shard]}, which has {found}"
    else:
        reason = f'not of the form {{"file": rows}} ({wrong!r} is not a number of rows)'
    return f"{wrong} for the {found} rows of {name}", (f"{file}: ", reason)


def _offsets(rng: random.Random, files: list[Path], shards: list[Rows], shard: int) -> tuple[str, tuple[str, ...]]:
    offsets: dict[str, dict[str, list[int]]] = {}
    for path, own in zip(files, shards):
        ends = [0]
        for row in own:
            ends.append(ends[-1] + len(json.dumps(row).encode()) + 1)
        offsets[path.name] = {str(i): [ends[i], ends[i + 1]] for i in range(len(own))}
    place, file = rng.randrange(len(shards[shard])), files[0].with_name("offsets.json.gz")
    change, cut = rng.choice([1, -1, 1000]), 0
    how = rng.choice(["moved", "left out", "cut"])
    if how == "moved":
        offsets[files[shard].name][str(place)][1] += change
        reason = f"places row {place} of {files[shard]} at the bytes"
    elif how == "left out":
        del offsets[files[shard].name]
        reason = f"has no offsets for {files[shard]}"
    else:
        cut = rng.randrange(1, 50)
        reason = "not of the form"
    content = gzip.compress(json.dumps(offsets).encode(), mtime=0)
    file.write_bytes(content[: len(content) - cut])
    return f"{how}: row {place} of {files[shard].name}", (f"{file}: ", reason)


def _token_store(rng: random.Random, folder: Path, rows: Rows, reader: str) -> Damaged:
    """Pretokenizes valid files, then cuts, deletes or exchanges one file of the token store."""
    write_shards(folder / "data", "jsonl", divided(rows))
    cache = folder / "cache"
    arguments = [f"--mixture={folder}/data", f"--tokenizer={find_minilm()}", f"--cache_dir={cache}", "--workers=1"]
    process = processes.command("launch.pretokenize", ["--stage=contrastive", *arguments], folder / "tokens.txt")
    assert process.wait() == 0, process.text()
    (store,) = (path.parent for path in cache.glob("*/manifest.json"))
    name = rng.choice(["manifest.json", *(f"{column}.{part}.npy" for column in COLUMNS for part in ("ids", "offsets"))])
    file = store / name
    content = file.read_bytes()
    if name != "manifest.json" and rng.random() < 0.25:
        file.unlink()  # without its manifest, the store would be written again
        how = "deleted"
    elif name.endswith("offsets.npy") and rng.random() < 0.5:
        file.write_bytes((store / name.replace("offsets", "ids")).read_bytes())
        how = "content of another file in"
    else:
        left = rng.randrange(len(content))
        file.write_bytes(content[:left])
        how = f"{left} of {len(content)} bytes left of"
    words = (f"{store} cannot be used (", "delete that folder")
    return Damaged(f"{how} {name}", f"{folder}/data", words, cache=cache)


def _mixture(rng: random.Random, folder: Path, rows: Rows, reader: str) -> Damaged:
    write_shards(folder / "data", "jsonl", divided(rows))
    sources: list[dict[str, Any]] = [
        {"name": f"s{shard}", "bucket": f"data/shard-{shard}.jsonl", "objective": {"type": "paired"}, "rows": 1}
        for shard in range(SHARDS)
    ]
    number = rng.randrange(SHARDS)
    one = sources[number]
    how = rng.choice(["field", "no bucket", "columns", "rows", "name", "twice", "cut", "UTF-8", "nowhere"])
    reason = f": source {number + 1}: "
    match how:
        case "field":
            one["quary_prefix"] = "clustering"
            reason += "unknown field 'quary_prefix'"
        case "no bucket":
            del one["bucket"]
            reason += "needs the fields name, bucket and objective"
        case "columns":
            one["objective"]["columns"] = "query"
            reason += "objective must be {type"
        case "rows":
            one["rows"] = "many"
            reason += "rows must be a number, found 'many'"
        case "name":
            one["name"] = "../s"
            reason += "the source name '../s' cannot be a folder name"
        case "twice":
            one["name"] = sources[number - 1]["name"]
            reason = "source names must differ"
        case "nowhere":
            one["bucket"] = "data/nowhere.jsonl"
            reason = f"no file matches {folder}/data/nowhere.jsonl"
        case _:
            reason = "is not UTF-8" if how == "UTF-8" else "broken YAML"
    file = folder / "mixture.yaml"
    content = yaml.safe_dump({"datasets": sources}).encode()
    if how == "cut":
        content = content[: content.rindex(b"type:") + 4] + b"\n  - ["
    elif how == "UTF-8":
        content = content.replace(b"data/shard", b"data/sh\xff", 1)
    file.write_bytes(content)
    return Damaged(f"{how}, source {number}", str(file), (reason,) if how == "nowhere" else (str(file), reason))


ALL_FORMATS = ("jsonl", "jsonl.gz", "parquet", "arrow")
TOKEN_READERS = ("pretokenize", "train")


def _in_file(change: Callable, forms: tuple[str, ...]) -> Callable[..., Damaged]:
    return functools.partial(_file, change=change, forms=forms)


# The keys are part of each fault's seed: renaming a kind changes its faults.
KINDS = BAD_ROWS | {
    "cut gzip": Kind(_in_file(cut_gzip, ("jsonl.gz",))),
    "flipped bit in gzip": Kind(_in_file(flip_gzip, ("jsonl.gz",))),
    "cut parquet": Kind(_in_file(cut_parquet, ("parquet",))),
    "cut Arrow": Kind(_in_file(_cut_arrow, ("arrow",))),
    "other schema in a shard": Kind(_in_file(_other_schema, ("parquet", "arrow"))),
    "empty file": Kind(_in_file(_empty, ALL_FORMATS)),
    "folder in place of a file": Kind(_in_file(folder_in_place, ALL_FORMATS)),
    "missing shard": Kind(_missing_shard, can_be_skipped=False),
    "wrong counts": Kind(functools.partial(_beside, change=_counts), TOKEN_READERS, can_be_skipped=False),
    "wrong offsets": Kind(functools.partial(_beside, change=_offsets), TOKEN_READERS, can_be_skipped=False),
    "damaged token cache": Kind(_token_store, TOKEN_READERS, can_be_skipped=False),
    "broken mixture": Kind(_mixture, ("pretokenize", "mine", "filter", "train"), can_be_skipped=False),
}

"""The kinds of damage that R9 does to files: where it is done is random, what has to be said of it is known."""

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
from tests.faults.shards import (
    COLUMNS,
    SHARDS,
    Damaged,
    Kind,
    Rows,
    divided,
    pattern_of,
    write_columns,
    write_lines,
    write_shards,
    write_table,
)

BIG = 6_000_000  # bytes of a giant line: more than are read at once


# Rows


def _row(rng: random.Random, folder: Path, rows: Rows, reader: str, *, change: Callable, forms: tuple) -> Damaged:
    """``change`` makes of a row its line (bytes) or other values (dict), and says what the message must have."""
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
    return row, f"column {column!r} should hold text"


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


def _broken_utf8_of_table(rng: random.Random, row: dict, column: str) -> tuple[dict, str]:
    row[column] = row[column].encode() + rng.choice([b"\xff", b"\xc3(", b"\xed\xa0\x80"])
    return row, f"column {column!r} is not valid UTF-8"


def _byte_order_mark(rng: random.Random, row: dict, column: str) -> tuple[bytes, str]:
    return b"\xef\xbb\xbf" + json.dumps(row).encode(), "byte order mark"


def _giant_line(rng: random.Random, row: dict, column: str) -> tuple[bytes, str]:
    """A file that is one list, rows without line feeds between them, a text that does not end in its line."""
    line = json.dumps(row).encode()
    count = rng.randint(BIG, 2 * BIG) // len(line)
    return rng.choice(
        [
            (b"[" + b", ".join([line] * count) + b"]", "found a list; write one row a line"),
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
    words = (f"{files[shard]}:{place + 1}: ", f"the label is {value!r}")
    return Damaged(f"{value!r} in row {place} of {files[shard].name}", f"{folder}/data/shard-*.jsonl", words)


# Files


def _file(rng: random.Random, folder: Path, rows: Rows, reader: str, *, change: Callable, forms: tuple) -> Damaged:
    """``change`` damages a shard, and says how, and what the message must have."""
    form, shards, shard = rng.choice(forms), divided(rows), rng.randrange(SHARDS)
    files = write_shards(folder / "data", form, shards)
    how, reason = change(rng, files[shard])
    good = [row["id"] for number, own in enumerate(shards) if number != shard for row in own]
    pattern = pattern_of(rng, folder / "data", form)
    return Damaged(
        f"{how} {files[shard].name}", pattern, (str(files[shard]), reason), good, set_aside=str(files[shard])
    )


def _cut(rng: random.Random, file: Path, *, reason: str, is_sound: Callable[[bytes], object]) -> tuple[str, str]:
    """Where what is left does not happen to be a sound file of fewer rows."""
    content = file.read_bytes()
    while True:
        left = content[: rng.randrange(1, len(content))]
        try:
            is_sound(left)
        except (pa.ArrowException, OSError, EOFError, zlib.error):
            file.write_bytes(left)
            return f"{len(left)} of {len(content)} bytes left of", reason


def cut_gzip(rng: random.Random, file: Path) -> tuple[str, str]:
    return _cut(rng, file, reason="the compressed file breaks off after line", is_sound=gzip.decompress)


def cut_parquet(rng: random.Random, file: Path) -> tuple[str, str]:
    return _cut(rng, file, reason="not a readable parquet file", is_sound=lambda left: pq.ParquetFile(io.BytesIO(left)))


def _cut_arrow(rng: random.Random, file: Path) -> tuple[str, str]:
    """Anywhere, or between two batches, where pyarrow finds a sound file of fewer rows."""
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
    """A bit that matters: some in the header do not. What it is taken for depends on where it is."""
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


# What lies beside the rows, and before them


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
        reason = f'not of the form {{"file": rows}} ({wrong!r} is no number of rows)'
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
    """Tokens of sound files; one of theirs is cut, deleted or of another text."""
    write_shards(folder / "data", "jsonl", divided(rows))
    cache = folder / "cache"
    made = [f"--mixture={folder}/data", f"--tokenizer={find_minilm()}", f"--cache_dir={cache}", "--workers=1"]
    process = processes.command("launch.pretokenize", ["--stage=contrastive", *made], folder / "tokens.txt")
    assert process.wait() == 0, process.text()
    (store,) = (path.parent for path in cache.glob("*/manifest.json"))
    name = rng.choice(["manifest.json", *(f"{column}.{part}.npy" for column in COLUMNS for part in ("ids", "offsets"))])
    file = store / name
    content = file.read_bytes()
    if name != "manifest.json" and rng.random() < 0.25:
        file.unlink()  # without a manifest it would be no store, and made again
        how = "deleted"
    elif name.endswith("offsets.npy") and rng.random() < 0.5:
        file.write_bytes((store / name.replace("offsets", "ids")).read_bytes())
        how = "another's content in"
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
    how = rng.choice(["field", "no bucket", "columns", "rows", "prefix", "name", "twice", "cut", "UTF-8", "nowhere"])
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
            reason += "objective is {type"
        case "rows":
            one["rows"] = "many"
            reason += "rows is a number, found 'many'"
        case "prefix":
            one["query_prefix"] = "serch_query"
            reason += f"{one['name']}: unknown prefix 'serch_query'"
        case "name":
            one["name"] = "../s"
            reason += "the source name '../s' cannot be that of a folder"
        case "twice":
            one["name"] = sources[number - 1]["name"]
            reason = "source names must differ"
        case "nowhere":
            one["bucket"] = "data/nowhere.jsonl"
            reason = f"no file matches {folder}/data/nowhere.jsonl"
        case _:
            reason = "broken YAML"
    file = folder / "mixture.yaml"
    content = yaml.safe_dump({"datasets": sources}).encode()
    if how == "cut":
        content = content[: content.rindex(b"type:") + 4] + b"\n  - ["
    elif how == "UTF-8":
        content = content.replace(b"data/shard", b"data/sh\xff", 1)
    file.write_bytes(content)
    return Damaged(f"{how}, source {number}", str(file), (reason,) if how == "nowhere" else (str(file), reason))


JSONL = ("jsonl", "jsonl.gz")
ANY = (*JSONL, "parquet", "arrow")
OF_TOKENS = ("pretokenize", "train")


def _in_row(change: Callable, *tables: Callable) -> Callable[..., Damaged]:
    """In lines, and where types allow it (``tables``) in columns."""
    changes = [(change, JSONL), *((of_table, ("parquet", "arrow")) for of_table in tables)]

    def make(rng: random.Random, folder: Path, rows: Rows, reader: str) -> Damaged:
        chosen, forms = rng.choice(changes)
        return _row(rng, folder, rows, reader, change=chosen, forms=forms)

    return make


def _in_file(change: Callable, forms: tuple[str, ...]) -> Callable[..., Damaged]:
    return functools.partial(_file, change=change, forms=forms)


KINDS = {
    "broken JSON": Kind(_in_row(_broken_json)),
    "missing column": Kind(_in_row(_missing_column)),
    "wrong type": Kind(_in_row(_wrong_type, _null)),
    # To launch.clean an empty text is a reason to remove a row, to launch.embed a text.
    "empty text": Kind(_in_row(_empty_text, _empty_text), ("pretokenize", "mine", "filter", "train")),
    "broken UTF-8": Kind(_in_row(_broken_utf8, _broken_utf8_of_table)),
    "NUL bytes": Kind(_in_row(_nul_bytes)),
    "byte order mark": Kind(_in_row(_byte_order_mark)),
    "giant line": Kind(_in_row(_giant_line)),
    "key given twice": Kind(_in_row(_key_twice)),
    "half a surrogate pair": Kind(_in_row(_half_surrogate)),
    "bad label": Kind(_label, ("classify",), can_be_skipped=False),
    "cut gzip": Kind(_in_file(cut_gzip, ("jsonl.gz",))),
    "flipped bit in gzip": Kind(_in_file(flip_gzip, ("jsonl.gz",))),
    "cut parquet": Kind(_in_file(cut_parquet, ("parquet",))),
    "cut Arrow": Kind(_in_file(_cut_arrow, ("arrow",))),
    "other schema in a shard": Kind(_in_file(_other_schema, ("parquet", "arrow"))),
    "empty file": Kind(_in_file(_empty, ANY)),
    "folder in place of a file": Kind(_in_file(folder_in_place, ANY)),
    "missing shard": Kind(_missing_shard, can_be_skipped=False),
    "wrong counts": Kind(functools.partial(_beside, change=_counts), OF_TOKENS, can_be_skipped=False),
    "wrong offsets": Kind(functools.partial(_beside, change=_offsets), OF_TOKENS, can_be_skipped=False),
    "damaged token cache": Kind(_token_store, OF_TOKENS, can_be_skipped=False),
    "broken mixture": Kind(_mixture, ("pretokenize", "mine", "filter", "train"), can_be_skipped=False),
}

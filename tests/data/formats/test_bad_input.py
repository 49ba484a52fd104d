"""Faults in training data of every format: an error names file and row, or the row is counted and saved.

The tests call ``pretokenize``, as a training run does. ``tests/data/formats/test_sources.py`` has more tests of rows.
"""

import bz2
import dataclasses
import gzip
import json
import random
import struct

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nomic_jax.data.formats.row_checks import BadRow
from nomic_jax.data.mixture import Source
from nomic_jax.data.tokens.pretokenize import pretokenize, worker_pool
from tests.data.formats.test_formats import write_tfds

GOOD = [{"query": f"query {i}", "document": f"document {i}"} for i in range(9)]
AT = 4  # number of good rows before the bad row

ROW_FAULTS = {
    "null": ({"query": "q", "document": None}, "'document' should hold text, found NoneType"),
    "empty text": ({"query": "q", "document": " \n"}, "'document' holds an empty text"),
    "invalid UTF-8": ({"query": "q", "document": b"\xff\xfe"}, "not valid UTF-8"),
    "wrong type": ({"query": "q", "document": 7}, "'document' should hold text, found int"),
    "missing column": ({"query": "q"}, "no column 'document'; the row has 'query'"),
    "broken JSON": (b'{"query": "q", "docu', "broken JSON"),
    "not an object": (b'"q"', "expected an object"),
}
# Typed formats cannot hold these rows; FILE_FAULTS has the faults of whole files.
ONLY_JSONL = {"wrong type", "missing column", "broken JSON", "not an object"}


def line(row) -> bytes:
    if isinstance(row, bytes):
        return row + b"\n"
    # Bytes are written unescaped between quotes.
    texts = {name: value if isinstance(value, bytes) else json.dumps(value).encode() for name, value in row.items()}
    quoted = {name: b'"' + text + b'"' if isinstance(row[name], bytes) else text for name, text in texts.items()}
    return b"{" + b", ".join(json.dumps(name).encode() + b": " + text for name, text in quoted.items()) + b"}\n"


def column(values) -> pa.Array:
    """Returns a string array without checking that the values are valid UTF-8."""
    raw = [value.encode() if isinstance(value, str) else value for value in values]
    array = pa.array(raw, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(raw), array.buffers(), array.null_count)


def table(rows) -> pa.Table:
    return pa.table({name: column([row[name] for row in rows]) for name in ("query", "document")})


def write(form, folder, rows) -> tuple[str, str]:
    """Writes the rows; returns (name to read them by, location of row AT in a message)."""
    file = folder / f"rows.{form}"
    if form in ("jsonl", "jsonl.gz", "jsonl.bz2"):
        content = b"".join(map(line, rows))
        compress = {"jsonl": bytes, "jsonl.gz": gzip.compress, "jsonl.bz2": bz2.compress}[form]
        file.write_bytes(compress(content))
        return str(file), f"{file}:{AT + 1}: "
    where = f"{file}: row {AT} (counted from 0): "
    if form == "parquet":
        pq.write_table(table(rows), file, row_group_size=3)
    elif form == "arrow":
        with pa.ipc.new_stream(str(file), table(rows).schema) as f:
            f.write_table(table(rows), max_chunksize=2)
    else:
        name = write_tfds(folder, rows, negatives=False)
        shard = folder / "toy/pairs/1.0.0/toy-train.array_record-00000-of-00002"
        return name, f"{shard}: row {AT} (counted from 0): "
    return str(file), where


FORMS = ["jsonl", "jsonl.gz", "jsonl.bz2", "parquet", "arrow", "tfds"]
CASES = [
    (form, fault)
    for form in FORMS
    for fault in ROW_FAULTS
    if form.startswith("jsonl") or fault not in ONLY_JSONL | ({"null"} if form == "tfds" else set())
]


def source(files, **changes):
    return dataclasses.replace(Source("pairs", str(files), "pair", ("query", "document")), **changes)


@pytest.mark.parametrize(("form", "fault"), CASES)
def test_a_bad_row(tmp_path, tokenizer, form, fault):
    row, message = ROW_FAULTS[fault]
    name, where = write(form, tmp_path, [*GOOD[:AT], row, *GOOD[AT:]])
    with pytest.raises(BadRow) as error:
        pretokenize(source(name), tokenizer, tmp_path / "cache", progress=False)
    assert where in str(error.value) and message in str(error.value)
    store = pretokenize(source(name), tokenizer, tmp_path / "cache", on_bad_row="skip", progress=False)
    assert store.rows == len(GOOD) and store.manifest["rejected"] == 1
    (kept,) = (store.directory / "rejected.jsonl").read_text().splitlines()
    assert where in json.loads(kept)["reason"] and json.loads(kept)["row"]
    texts = [store.columns["query"][i].tolist() for i in range(store.rows)]
    assert texts == [ids.tolist() for ids in tokenizer.encode([good["query"] for good in GOOD])]


def cut(name, keep=0.5):
    def damage(folder):
        file = folder / name
        content = file.read_bytes()
        file.write_bytes(content[: int(len(content) * keep)])

    return damage


def overwrite(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def other_table(name, columns):
    def damage(folder):
        content = pa.table(columns)
        if name.endswith(".parquet"):
            pq.write_table(content, folder / name)
        else:
            with pa.ipc.new_stream(str(folder / name), content.schema) as f:
                f.write_table(content)

    return damage


def flip(name, share):
    def damage(folder):
        content = bytearray((folder / name).read_bytes())
        content[int(len(content) * share)] ^= 0xFF
        (folder / name).write_bytes(content)

    return damage


MANY = [{"query": f"{random.Random(i).random()} {i}", "document": f"document {i}"} for i in range(3000)]
TFDS_SHARD = "toy/pairs/1.0.0/toy-train.array_record-00000-of-00002"
FILE_FAULTS = {
    "cut gzip": ("jsonl.gz", cut("rows.jsonl.gz"), "rows.jsonl.gz: the compressed file breaks off after line"),
    "cut bzip2": ("jsonl.bz2", cut("rows.jsonl.bz2"), "rows.jsonl.bz2: the compressed file breaks off after line"),
    "damaged gzip": ("jsonl.gz", flip("rows.jsonl.gz", 0.5), "rows.jsonl.gz: the compressed file breaks off after"),
    "no gzip": ("jsonl.gz", overwrite("rows.jsonl.gz", b"plain\n"), "rows.jsonl.gz: the compressed file breaks off"),
    "empty jsonl": ("jsonl", overwrite("rows.jsonl", b""), "rows.jsonl: the file is empty"),
    "empty gzip": ("jsonl.gz", overwrite("rows.jsonl.gz", gzip.compress(b"")), "rows.jsonl.gz: the file is empty"),
    "gzip of no bytes": ("jsonl.gz", overwrite("rows.jsonl.gz", b""), "rows.jsonl.gz: the file is empty"),
    "cut parquet": ("parquet", cut("rows.parquet"), "rows.parquet: not a readable parquet file"),
    "empty parquet": ("parquet", overwrite("rows.parquet", b""), "rows.parquet: not a readable parquet file"),
    "cut arrow": ("arrow", cut("rows.arrow"), "rows.arrow: not a readable Arrow file"),
    "empty arrow": ("arrow", overwrite("rows.arrow", b""), "rows.arrow: the file is empty"),
    "parquet without the column": (
        "parquet",
        other_table("rows.parquet", {"query": ["q"]}),
        "rows.parquet: no column 'document'; the file has 'query'",
    ),
    "arrow of numbers": (
        "arrow",
        other_table("rows.arrow", {"query": ["q"], "document": [1]}),
        "rows.arrow: column 'document' should hold text, found the type int64",
    ),
    "cut array_record": ("tfds", cut(TFDS_SHARD), TFDS_SHARD),
    "no features": ("tfds", overwrite("toy/pairs/1.0.0/features.json", b""), "features.json or dataset_info.json"),
    "features of another package": (
        "tfds",
        overwrite("toy/pairs/1.0.0/features.json", b'{"pythonClassName": "this.s"}'),
        "features.json names the class 'this.s'",
    ),
}


@pytest.mark.parametrize("fault", FILE_FAULTS)
def test_a_bad_file(tmp_path, tokenizer, fault):
    """The file raises an error or is set aside: one entry, none of its rows, all rows of the other files."""
    form, damage, message = FILE_FAULTS[fault]
    name, _ = write(form, tmp_path, MANY)
    damage(tmp_path)
    with pytest.raises(BadRow) as error:
        pretokenize(source(name), tokenizer, tmp_path / "cache", progress=False)
    assert str(tmp_path) in str(error.value) and message in str(error.value)
    assert not list((tmp_path / "cache").glob("pairs-*"))
    if form == "tfds":  # tfds is one data set: a fault in a shard is found before rows are read
        return
    (tmp_path / "whole.jsonl").write_bytes(b"".join(map(line, GOOD)))
    both = f"{tmp_path}/{{rows.{form},whole.jsonl}}"
    store = pretokenize(source(both), tokenizer, tmp_path / "cache", on_bad_row="skip", progress=False)
    entries = (store.directory / "rejected.jsonl").read_text().splitlines()
    assert message in json.loads(entries[-1])["reason"] and store.manifest["rejected"] == len(entries)
    assert len(entries) == 1 and store.file_rows == [0, len(GOOD)]
    (quarantined,) = store.quarantined
    assert quarantined.file == f"{tmp_path}/rows.{form}" and message in quarantined.reason
    assert quarantined.rows_at_least > 500 or fault not in ("cut gzip", "damaged gzip")
    expected = tokenizer.encode([row["query"] for row in GOOD])
    assert [store.columns["query"][i].tolist() for i in range(store.rows)] == [ids.tolist() for ids in expected]


def test_sets_of_files(tmp_path, tokenizer):
    def make(pattern):
        return pretokenize(source(f"{tmp_path}/{pattern}"), tokenizer, tmp_path / "cache", progress=False)

    for i in (0, 1, 3):
        (tmp_path / f"shard-{i}.jsonl").write_bytes(b"".join(map(line, GOOD[i : i + 3])))
    with pytest.raises(FileNotFoundError, match=r"1 of 4 files are missing, first \['.*shard-2\.jsonl'\]"):
        make("shard-{0..3}.jsonl")
    assert make("shard-{0..1}.jsonl").rows == 6
    with pytest.raises(ValueError, match=r"shard-1\.jsonl is named twice"):
        make("{shard-1,shard-0,shard-1}.jsonl")
    (tmp_path / "shard-2.jsonl").write_bytes((tmp_path / "shard-1.jsonl").read_bytes())
    with pytest.raises(ValueError, match=r"shard-1\.jsonl and .*shard-2\.jsonl are the same, byte for byte"):
        make("shard-{0..3}.jsonl")
    with pytest.raises(FileNotFoundError, match=r"no file matches .*nothing"):
        make("nothing*.jsonl")
    (tmp_path / "shard-2.jsonl").write_bytes(b"\n\n")
    with pytest.raises(ValueError, match="no usable row"):
        make("shard-2.jsonl")


def test_every_cut_of_a_gzip_is_noticed(tmp_path, tokenizer):
    """Cuts the file at ten positions, the last ones within the checksum, and reads it with two workers."""
    whole = gzip.compress(b"".join(map(line, MANY)))
    folder = tmp_path / "shards"
    folder.mkdir()
    (folder / "0.jsonl").write_bytes(b"".join(map(line, GOOD)))
    with worker_pool(tokenizer, 2) as pool:
        for length in (
            1,
            5,
            10,
            11,
            500,
            len(whole) // 2,
            len(whole) - 9,
            len(whole) - 8,
            len(whole) - 4,
            len(whole) - 1,
        ):
            (folder / "1.jsonl.gz").write_bytes(whole[:length])
            with pytest.raises(BadRow, match=r"1\.jsonl\.gz: the compressed file breaks off"):
                pretokenize(source(folder), tokenizer, tmp_path / "cache", progress=False, pool=pool)
        (folder / "1.jsonl.gz").write_bytes(whole[:-4] + struct.pack("<I", 7))
        with pytest.raises(BadRow, match=r"1\.jsonl\.gz: the compressed file breaks off"):
            pretokenize(source(folder), tokenizer, tmp_path / "cache", progress=False, pool=pool)

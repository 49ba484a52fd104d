"""Every format gives the same rows, in order and by index, and its errors name file and row."""

import gzip
import json
import subprocess
import sys

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter

from nomic_jax.data.formats import file_systems
from nomic_jax.data.formats.file_format import Mark
from nomic_jax.data.formats.paths import expand_braces, expand_files
from nomic_jax.data.formats.reading import Rows, open_file, read_rows
from nomic_jax.data.formats.row_checks import BadRow, RejectedRows

ROWS = [
    {"query": f"què {i}", "document": "書 " * (i % 7) + f"d{i}", "negatives": [f"n{j}" for j in range(i % 3)]}
    for i in range(500)
]
COLUMNS = {"query": str, "document": str, "negatives": list}


def jsonl(rows, blank_lines=False) -> bytes:
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    return "".join(f"{line}\n" + " \n\n" * (blank_lines and i % 5 == 0) for i, line in enumerate(lines)).encode()


def write_tfds(directory, rows, negatives=True):
    """Writes a data set in two shards as TensorFlow Datasets does with file_format="array_record"; returns its name."""
    texts = {"query": tfds.features.Text(), "document": tfds.features.Text()}
    features = tfds.features.FeaturesDict(
        texts | ({"negatives": tfds.features.Sequence(tfds.features.Text())} if negatives else {})
    )
    path = directory / "toy" / "pairs" / "1.0.0"
    path.mkdir(parents=True)
    shards = np.array_split(np.arange(len(rows)), 2)
    for i, shard in enumerate(shards):
        writer = ArrayRecordWriter(str(path / f"toy-train.array_record-{i:05d}-of-00002"), "group_size:1")
        for row in shard:
            writer.write(features.serialize_example(rows[row]))
        writer.close()
    features.save_config(path)
    split = {
        "name": "train",
        "shardLengths": [str(len(shard)) for shard in shards],
        "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
    }
    info = {"name": "toy", "version": "1.0.0", "configName": "pairs", "fileFormat": "array_record", "splits": [split]}
    (path / "dataset_info.json").write_text(json.dumps(info))
    return f"tfds:toy/pairs:1.0.0?data_dir={directory}"


def write(form, directory, rows) -> str:
    """Writes the rows in a storage format; returns the name to read them by."""
    directory.mkdir(parents=True, exist_ok=True)
    thirds = [rows[: len(rows) // 3], rows[len(rows) // 3 :]]
    if form == "jsonl":
        (directory / "rows.jsonl").write_bytes(jsonl(rows, blank_lines=True))
        return str(directory / "rows.jsonl")
    if form == "jsonl.gz":
        for i, part in enumerate(thirds):
            (directory / f"shard-{i:05d}.jsonl.gz").write_bytes(gzip.compress(jsonl(part)))
        return str(directory / "shard-{00000..1}.jsonl.gz")
    if form == "jsonl.bz2":
        with fsspec.open(directory / "rows.jsonl.bz2", "wb", compression="infer") as f:
            f.write(jsonl(rows))
        return str(directory / "rows.jsonl.bz2")
    if form == "parquet":
        for i, part in enumerate(thirds):
            pq.write_table(pa.Table.from_pylist(part), directory / f"{i}.parquet", row_group_size=100)
        return str(directory)
    if form == "arrow":
        datasets.Dataset.from_list(rows).save_to_disk(directory / "saved", num_shards=2)
        return str(directory / "saved")
    if form == "arrow file":
        table = pa.Table.from_pylist(rows)
        with pa.ipc.new_file(str(directory / "rows.arrow"), table.schema) as f:
            f.write_table(table, max_chunksize=64)
        return str(directory / "rows.arrow")
    if form == "hub":
        (directory / "hub").mkdir()
        (directory / "hub" / "train.jsonl").write_bytes(jsonl(rows))
        return f"hf:{directory / 'hub'}?split=train"
    if form == "tfds":
        return write_tfds(directory, rows)
    assert form == "remote"
    for i, part in enumerate(thirds):
        fsspec.filesystem("memory").pipe(f"/{directory.name}/shard-{i}.jsonl.gz", gzip.compress(jsonl(part)))
    return f"memory://{directory.name}/shard-{{0..1}}.jsonl.gz"


FORMS = ["jsonl", "jsonl.gz", "jsonl.bz2", "parquet", "arrow", "arrow file", "hub", "tfds", "remote"]


@pytest.fixture(scope="module", autouse=True)
def hub_cache(tmp_path_factory):
    """Moves the cache of `datasets` out of the user's home directory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        yield


@pytest.mark.parametrize("form", FORMS)
def test_rows_in_order_and_at_random(tmp_path, form):
    name = write(form, tmp_path, ROWS)
    assert list(read_rows(name, COLUMNS, others=())) == ROWS
    assert [row["query"] for row in read_rows(name, {"query": str}, others=())] == [row["query"] for row in ROWS]
    rows = Rows(name, COLUMNS, others=())
    assert len(rows) == len(ROWS)
    for i in (0, 499, 7, 166, 167, 250, 8):
        assert rows[i] == ROWS[i]
    with pytest.raises(IndexError):
        rows[500]


@pytest.mark.parametrize("form", FORMS)
def test_a_scan_cuts_a_file_into_pieces_that_make_up_the_whole(tmp_path, form):
    name = write(form, tmp_path, ROWS)
    for span_bytes in (1, 3000, 1 << 30):
        found, pieces = [], 0
        for file in expand_files(name):
            scan = open_file(file, COLUMNS, ()).scan(span_bytes)
            starts = [mark.row for mark in scan.marks]
            assert starts[0] == 0 and starts == sorted(set(starts))
            for mark, stop in zip(scan.marks, [*starts[1:], scan.rows]):
                piece = list(open_file(file, COLUMNS, (), [mark]).numbered(mark.row, stop))
                assert len(piece) == stop - mark.row
                found += [json.loads(raw) if isinstance(raw, bytes) else raw for _, raw in piece]
                pieces += 1
        assert found == ROWS
    assert pieces == len(expand_files(name))


def test_lines_are_numbered_from_wherever_reading_starts(tmp_path):
    lines = [b'{"text": "a"}', b"", b'{"text": "b"}', b" \t", b"\r", b'{"text": "c"}', b'{"text": "d"}']
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(lines))  # no line feed at the end
    file = open_file(str(tmp_path / "rows.jsonl"), {"text": str})
    scan = file.scan(1)
    assert scan.rows == len(file) == 4
    assert scan.marks == (Mark(0, 0, 0), Mark(1, 2, 15), Mark(2, 5, 34), Mark(3, 6, 48))
    expected = [f"{tmp_path}/rows.jsonl:{line}" for line in (1, 3, 6, 7)]
    assert [where for where, _ in file.numbered()] == expected
    for mark in scan.marks:
        again = open_file(str(tmp_path / "rows.jsonl"), {"text": str}, marks=[mark])
        assert [where for where, _ in again.numbered(mark.row)] == expected[mark.row :]


def test_a_scan_finds_lines_in_chunks_as_in_one(tmp_path, monkeypatch):
    content = jsonl(ROWS, blank_lines=True)
    (tmp_path / "rows.jsonl").write_bytes(content)
    file = str(tmp_path / "rows.jsonl")
    whole = open_file(file, {}).scan(500)
    for chunk in (1, 7, 64, 4096):
        if chunk < 64:
            (tmp_path / "rows.jsonl").write_bytes(content[:2000].rsplit(b"\n", 1)[0])
            whole_short = open_file(file, {}).scan(500)
        monkeypatch.setattr("nomic_jax.data.formats.jsonl.CHUNK", chunk)
        assert open_file(file, {}).scan(500) == (whole_short if chunk < 64 else whole)
        monkeypatch.undo()
        (tmp_path / "rows.jsonl").write_bytes(content)


TABLE_FAULTS = {
    "null": (None, "should hold text, found NoneType"),
    "empty": (" ", "empty text"),
}


@pytest.mark.parametrize("fault", TABLE_FAULTS)
@pytest.mark.parametrize("form", ["parquet", "arrow", "arrow file"])
def test_a_fault_in_a_table_names_file_and_row(tmp_path, form, fault):
    value, message = TABLE_FAULTS[fault]
    rows = [ROWS[1], ROWS[2], ROWS[4] | {"document": value}, ROWS[5]]
    name = write(form, tmp_path, rows)
    with pytest.raises(BadRow, match=message) as error:
        list(read_rows(name, COLUMNS))
    file = expand_files(name)[-1]
    row = 1 if len(expand_files(name)) == 2 and form == "parquet" else 2 - 2 * (form == "arrow")
    assert f"{file}: row {row} (counted from 0): " in str(error.value)
    rejected = RejectedRows(tmp_path / "rejected.jsonl")
    kept = list(read_rows(name, COLUMNS, on_bad_row="skip", rejected=rejected))
    assert kept == [rows[0], rows[1], rows[3]] and rejected.count == 1


def test_a_text_of_tfds_that_is_not_utf8_or_empty(tmp_path):
    rows = [ROWS[1], ROWS[2] | {"document": b"\xff"}, ROWS[4] | {"negatives": [b"\xff"]}, ROWS[5] | {"query": ""}]
    name = write_tfds(tmp_path, rows)
    rejected = RejectedRows(tmp_path / "rejected.jsonl")
    assert list(read_rows(name, COLUMNS, on_bad_row="skip", rejected=rejected)) == [ROWS[1]]
    reasons = [json.loads(line)["reason"] for line in rejected.side_file.read_text().splitlines()]
    assert [reason.split(": ", 2)[1:] for reason in reasons] == [
        ["row 1 (counted from 0)", "column 'document' is not valid UTF-8"],
        ["row 0 (counted from 0)", "column 'negatives' is not valid UTF-8"],
        ["row 1 (counted from 0)", "column 'query' holds an empty text"],
    ]
    with pytest.raises(BadRow, match="no column 'title'; the data set has 'document', 'negatives', 'query'"):
        next(read_rows(name, {"title": str}))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("x.arrow", b"", "the file is empty"),
        ("x.arrow", b"no arrow at all", "not a readable Arrow file"),
        ("toy/pairs/1.0.0/toy-train.array_record-00000-of-00002", b"nothing", "ArrayRecord file|broken between"),
        ("toy/pairs/1.0.0/features.json", b"{", "features.json: cannot be read"),
    ],
)
def test_a_broken_file_is_named(tmp_path, file, content, message):
    write_tfds(tmp_path, ROWS[:4])
    (tmp_path / file).write_bytes(content)
    name = tmp_path / (file if file.endswith(".arrow") else "toy/pairs/1.0.0/toy-train.array_record-00000-of-00002")
    with pytest.raises(BadRow, match=message) as error:
        list(read_rows(name, {"query": str}))
    assert str(tmp_path / file) in str(error.value)


def test_names_that_lead_nowhere(tmp_path):
    write_tfds(tmp_path, ROWS[:4])
    folder = tmp_path / "folder"
    write("jsonl", folder, ROWS[:4])
    (tmp_path / "scripted").mkdir()
    (tmp_path / "scripted" / "scripted.py").write_text("raise SystemExit('nobody runs this')")
    for name, message in {
        f"hf:{tmp_path}/scripted": "scripts are no longer supported",
        f"tfds:toy/pairs:1.0.0?data_dir={tmp_path}&split=test": "Unknown split 'test'",
        f"tfds:nothing:1.0.0?data_dir={tmp_path}": "Dataset nothing not found",
        "tfds:somebody:toy": "not the name of a prepared data set",
        "tfds:toy?splits=train": "unknown option 'splits'",
        "hf:?split=train": "no data set is named",
        f"hf:{folder}?split=train[:10]": "parts of a split",
        f"hf:{folder}?split=tset": 'Unknown split "tset"',
        f"hf:{folder}?config=pair": "'pair' not found",
        "sentence-transformers/all-nli": "write hf:sentence-transformers/all-nli",
    }.items():
        with pytest.raises((FileNotFoundError, ValueError), match="(?s)" + message.replace("[", r"\[")) as error:
            expand_files(name)
        assert name in str(error.value)


def test_a_data_set_that_cannot_be_reached_is_named_at_once(monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", unreachable)
    with pytest.raises(FileNotFoundError, match=r"hf:nobody/nothing: there is no folder .*OSError: no network"):
        expand_files("hf:nobody/nothing")


def test_a_remote_file_system_that_is_not_there(monkeypatch):
    monkeypatch.setattr(file_systems, "_allowed", set(file_systems.PROTOCOLS))
    file_systems.allow_protocols(["missing", "unreachable"])

    class Unreachable(fsspec.AbstractFileSystem):
        protocol = "unreachable"

        def _fail(self, *_, **__):
            raise RuntimeError("connection refused")

        exists = ls = info = glob = _fail

    message = "Install no_such_package to access it"
    fsspec.register_implementation("missing", "no_such_package.FileSystem", clobber=True, errtxt=message)
    with pytest.raises(ModuleNotFoundError, match=r"missing://x\.jsonl: Install no_such_package"):
        expand_files("missing://x.jsonl")
    fsspec.register_implementation("unreachable", Unreachable, clobber=True)
    with pytest.raises(OSError, match=r"unreachable://b/x-\{0\.\.9\}\.jsonl: cannot be reached .*connection refused"):
        expand_files("unreachable://b/x-{0..9}.jsonl")


def test_a_tfds_shard_of_another_size(tmp_path):
    name = write_tfds(tmp_path, ROWS[:4])
    info = tmp_path / "toy/pairs/1.0.0/dataset_info.json"
    info.write_text(info.read_text().replace('["2", "2"]', '["2", "3"]'))
    with pytest.raises(BadRow, match=r"00001-of-00002: has 2 rows, but dataset_info\.json says 3"):
        expand_files(name)


def test_splits_of_a_saved_dataset_dict(tmp_path):
    whole = datasets.Dataset.from_list(ROWS[:10])
    datasets.DatasetDict(train=whole, test=whole).save_to_disk(tmp_path / "saved")
    with pytest.raises(FileNotFoundError, match=r"holds the splits train, test; name one: .*saved/train"):
        expand_files(tmp_path / "saved")
    assert list(read_rows(tmp_path / "saved" / "test", COLUMNS)) == ROWS[:10]
    next((tmp_path / "saved" / "test").glob("*.arrow")).unlink()
    with pytest.raises(FileNotFoundError, match="1 of 1 files are missing"):
        expand_files(tmp_path / "saved" / "test")


def test_braces():
    assert expand_braces("x") == ["x"]
    assert expand_braces("{8..11}") == ["8", "9", "10", "11"]
    assert expand_braces("s-{00008..10}.gz") == ["s-00008.gz", "s-00009.gz", "s-00010.gz"]
    assert expand_braces("{a,b}/{1..2}") == ["a/1", "a/2", "b/1", "b/2"]
    assert expand_braces("{a}") == ["{a}"]


def test_files_missing_or_named_twice(tmp_path):
    fs = fsspec.filesystem("memory")
    for i in (0, 1, 2, 4):
        fs.pipe(f"/holes/shard-{i}.jsonl", b'{"text": "a"}\n')
    with pytest.raises(FileNotFoundError, match=r"1 of 5 files are missing, first \['/holes/shard-3.jsonl'\]"):
        expand_files("memory://holes/shard-{0..4}.jsonl")
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl is named twice"):
        expand_files(f"{tmp_path}/{{a,a}}.jsonl")


def test_reading_needs_neither_jax_nor_tensorflow(tmp_path):
    name = write_tfds(tmp_path, ROWS[:4])
    code = (
        "import sys; from nomic_jax.data.formats.reading import read_rows\n"
        f"assert len(list(read_rows({name!r}, {{'query': str}}))) == 4\n"
        "assert 'tensorflow' not in sys.modules and 'jax' not in sys.modules, sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

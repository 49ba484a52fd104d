"""Files from an untrusted source: no code runs, nothing outside is read, and work is bounded."""

import bz2
import gzip
import itertools
import json
import lzma
import os
import shutil
import time
import tracemalloc

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nomic_jax.curate.clean.cleaning import CleaningOptions, clean_rows
from nomic_jax.data.formats import file_systems, parquet, paths, sizes
from nomic_jax.data.formats.array_record import _features
from nomic_jax.data.formats.paths import expand_files
from nomic_jax.data.formats.reading import read_rows, scan_file
from nomic_jax.data.formats.row_checks import BadRow, RejectedRows
from nomic_jax.data.formats.writing import json_line
from nomic_jax.data.mixture import MixtureError, read_mixture
from tests.data.formats.test_formats import write_tfds


def clean(file, output, **options):
    return clean_rows(str(file), output, ["text"], CleaningOptions(), progress=False, **options)


@pytest.mark.parametrize("number", ["1e400", "-1e400", "NaN", "Infinity", "-Infinity"])
def test_numbers_that_json_cannot_hold_are_refused_by_line(tmp_path, number):
    file = tmp_path / "rows.jsonl"
    file.write_text(
        '{"text": "a", "score": 1e300}\n{"text": "b", "more": [{"score": NUMBER}]}\n'.replace("NUMBER", number)
    )
    with pytest.raises(BadRow, match=r"rows\.jsonl:2: broken JSON \("):
        clean(file, tmp_path / "out")
    summary = clean(file, tmp_path / "out", on_bad_row="skip")
    assert (summary["kept"], summary["rejected"]) == (1, 1)
    assert json.loads((tmp_path / "out" / "kept.jsonl").read_text()) == {"text": "a", "score": 1e300}


def test_numbers_that_json_cannot_hold_are_refused_by_row_in_other_formats(tmp_path):
    file = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": ["a", "b"], "scores": [[1.0], [2.0, float("inf")]]}), file)
    with pytest.raises(BadRow, match=r"row 1 \(counted from 0\): column 'scores' holds NaN or an infinite number"):
        clean(file, tmp_path / "out")
    assert clean(file, tmp_path / "out", on_bad_row="skip")["rejected"] == 1
    assert len(list(read_rows(file, {"text": str}, others=()))) == 2  # the column is not needed


def test_rows_are_written_as_strict_json():
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="JSON compliant"):
            json_line({"text": "a", "half": "\ud83d", "score": value})


def varint(number: int) -> bytes:
    """Returns a count as parquet's footer stores it (Thrift's compact protocol)."""
    number, out = 2 * number, b""
    while number > 127:
        out += bytes([number & 127 | 128])
        number >>= 7
    return out + bytes([number])


def test_a_parquet_footer_with_wrong_counts(tmp_path):
    """Every choice of the footer's row counts is changed from 5,000 to 8,072."""
    good, bad = tmp_path / "good.parquet", tmp_path / "bad.parquet"
    pq.write_table(pa.table({"text": [f"t{i}" for i in range(5000)]}), good, use_dictionary=False)
    content = good.read_bytes()
    footer = content[-8 - int.from_bytes(content[-8:-4], "little") :]
    places = [i for i in range(len(footer)) if footer.startswith(varint(5000), i)]
    changed = 0
    for count in range(1, len(places) + 1):
        for chosen in itertools.combinations(places, count):
            edited = bytearray(footer)
            for place in chosen:
                edited[place : place + 2] = varint(8072)
            bad.write_bytes(content[: -len(footer)] + edited)
            try:
                rows = list(read_rows(bad, {"text": str}))
            except BadRow as error:
                assert "write it again" in str(error) and str(bad) in str(error)
                assert scan_file(str(bad), {"text": str}, (), 1 << 20).broken
                changed += 1
            else:
                assert len(rows) == pq.read_metadata(bad).num_rows == 5000  # not a count of rows
    assert changed >= 3 and len(places) >= 3


def mixture(tmp_path, content):
    file = tmp_path / "pairs.yaml"
    file.write_text(content)
    return str(file)


SOURCE = "datasets:\n- {name: a, bucket: a.jsonl, objective: {type: paired, columns: [q, d]}, %s}\n"


@pytest.mark.parametrize("field", ["rows", "weight", "name2", "query_prefix"])
@pytest.mark.parametrize("number", ["0x" + "f" * 5000, "9" * 5000, "0b" + "1" * 5000, "1" + ":59" * 50, "9" * 30])
def test_a_number_in_yaml_that_python_cannot_print(tmp_path, field, number):
    with pytest.raises(MixtureError, match=r"pairs\.yaml: .* is out of range in .* line 2, column"):
        read_mixture(mixture(tmp_path, SOURCE % f"{field}: {number}"), "pair")


def test_a_mixture_is_a_regular_file_of_bounded_size(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "zero.yaml").symlink_to("/dev/zero")
    (tmp_path / "large.yaml").write_bytes(b" " * (1 << 23))
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe9")
    (tmp_path / "folder.yaml").mkdir()
    messages = {
        "pipe": "named pipe",
        "zero": "device",
        "large": "exceed the limit",
        "latin": "UTF-8",
        "folder": "folder",
    }
    for name, message in messages.items():
        with pytest.raises(MixtureError, match=rf"{name}\.yaml: .*{message}.*; a mixture is a YAML file"):
            read_mixture(str(tmp_path / f"{name}.yaml"), "pair")


def test_yaml_takes_linear_time_and_bounded_memory(tmp_path):
    fields = "\n".join(f"k{i}: 1" for i in range(8000))
    started = time.process_time()
    with pytest.raises(MixtureError, match="expected a list of sources"):
        read_mixture(mixture(tmp_path, fields), "pair")
    assert time.process_time() - started < 2
    with pytest.raises(MixtureError, match="the field 'k7' is given twice"):
        read_mixture(mixture(tmp_path, f"{fields}\nk7: 2"), "pair")
    merges = "".join(f"a{i + 1}: &a{i + 1} {{<<: [{', '.join([f'*a{i}'] * 10)}]}}\n" for i in range(12))
    with pytest.raises(MixtureError, match="merge keys expand to more than"):
        read_mixture(mixture(tmp_path, "a0: &a0 {k: 1}\n" + merges), "pair")


URLS = [
    "reference://x.jsonl",
    "reference::x.json",
    "simplecache::reference://x.jsonl",
    "zip://a.jsonl::sftp://host/x.zip",
    "sftp://host/x.jsonl",
    "github://x:y@main/x.jsonl",
]


@pytest.mark.parametrize("url", URLS)
def test_only_known_file_systems_are_opened(tmp_path, url, monkeypatch):
    opened = []
    monkeypatch.setattr(file_systems.fsspec.core, "url_to_fs", lambda name: opened.append(name))
    (source,) = read_mixture(mixture(tmp_path, SOURCE.replace("a.jsonl", f'"{url}"') % "rows: 1"), "pair")
    for name in (url, source.files):
        if "://" in url or name == url:
            with pytest.raises(ValueError, match=r"is not allowed, .* add --allow_protocols="):
                expand_files(name)
        else:  # relative to the YAML, so a path
            with pytest.raises(FileNotFoundError):
                expand_files(name)
    assert not opened


def test_a_flag_allows_further_file_systems(monkeypatch):
    monkeypatch.setattr(file_systems, "_allowed", set(file_systems.PROTOCOLS))
    fs = fsspec.filesystem("memory")
    fs.pipe("/chained/x.jsonl", b'{"text": "a"}\n')
    assert list(read_rows("memory://chained/x.jsonl", {"text": str})) == [{"text": "a"}]
    with pytest.raises(ValueError, match="'simplecache' is not allowed"):
        expand_files("simplecache::memory://chained/x.jsonl")
    file_systems.allow_protocols(["simplecache"])
    assert expand_files("simplecache::memory://chained/x.jsonl")


def write(file, text):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"text": text}) + "\n", encoding="utf-8")


NAMES = ["q[1]", "a {b,c}", "{1..3}", "wh?t", "st*r", "a::b", "reference::x", "s3:", "hf:x", "~", "ü €"]


@pytest.mark.parametrize("name", NAMES)
def test_a_path_that_exists_is_that_path(tmp_path, name, monkeypatch):
    """``q[1]`` as a pattern is ``q1``; each of these names is that of a file, of its folder, and of both."""
    for other in ("q1", "a b", "a c", "1", "2", "what", "star", "a", "b", "x"):
        write(tmp_path / other / "p.jsonl", "another folder")
        write(tmp_path / f"{other}.jsonl", "another file")
    write(tmp_path / name / "p.jsonl", "right")
    write(tmp_path / f"{name}.jsonl", "right")
    write(tmp_path / name / f"{name}.jsonl", "right")

    def texts(pattern):
        return [row["text"] for row in read_rows(pattern, {"text": str})]

    assert texts(tmp_path / name / "p.jsonl") == texts(tmp_path / f"{name}.jsonl") == ["right"]
    assert texts(tmp_path / name / "*.jsonl") == texts(tmp_path / name) == ["right", "right"]
    # What the program puts together: the folder of the YAML, and a bucket in it.
    folder = tmp_path / name
    objective = "objective: {type: self, columns: [text]}"
    (folder / "texts.yaml").write_text(f"datasets:\n- {{name: a, bucket: '*.jsonl', {objective}}}\n")
    (source,) = read_mixture(str(folder / "texts.yaml"), "text")
    assert texts(source.files) == ["right", "right"]
    (folder / "texts.yaml").write_text(f"datasets:\n- {{name: a, bucket: '{name}.jsonl', {objective}}}\n")
    (source,) = read_mixture(str(folder / "texts.yaml"), "text")
    assert texts(source.files) == ["right"]
    monkeypatch.chdir(tmp_path)
    assert texts(f"{name}/p.jsonl") == texts(f"{name}.jsonl") == ["right"]


def test_a_pattern_is_still_a_pattern(tmp_path):
    for name in ("q1", "q2", "q3"):
        write(tmp_path / name / "p.jsonl", name)
    expected = {"q[12]": "12", "q?": "123", "q{1..2}": "12", "q{1,3}": "13", "*": "123", "**": "123"}
    for pattern, names in expected.items():
        found = expand_files(f"{tmp_path}/{pattern}/p.jsonl")
        assert found == [f"{tmp_path}/q{i}/p.jsonl" for i in names]
    # A folder of the pattern's own name holds no such file: nothing of another folder is read in its place.
    (tmp_path / "q[12]").mkdir()
    with pytest.raises(FileNotFoundError, match="no file matches"):
        expand_files(f"{tmp_path}/q[12]/p.jsonl")


def test_a_glob_does_not_search_a_whole_disk(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"/\*\*/\*\.jsonl would search the whole disk; name a folder"):
        expand_files("/**/*.jsonl")
    for i in range(30):
        write(tmp_path / f"{i % 3}" / f"{i}.jsonl", "a")
    assert len(expand_files(f"{tmp_path}/**/*.jsonl")) == 30
    monkeypatch.setattr(paths, "MAX_FILES", 20)
    with pytest.raises(ValueError, match="has more than 20 files and folders; name a deeper one"):
        expand_files(f"{tmp_path}/**/*.jsonl")


def test_naming_many_files_twice_takes_linear_time(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "_existing", lambda fs, names: set(names))
    monkeypatch.setattr(paths.LocalFileSystem, "isdir", lambda *_: False)
    started = time.process_time()
    with pytest.raises(ValueError, match="is named twice"):
        expand_files(f"{tmp_path}/{{0..30000}}.{{jsonl,jsonl}}")
    assert time.process_time() - started < 3


def special_files(folder):
    os.mkfifo(folder / "pipe.jsonl")
    os.mkfifo(folder / "pipe.parquet")
    os.mkfifo(folder / "pipe.arrow")
    (folder / "zero.jsonl").symlink_to("/dev/zero")
    (folder / "zero.arrow").symlink_to("/dev/zero")
    (folder / "null.parquet").symlink_to("/dev/null")
    return ["pipe.jsonl", "pipe.parquet", "pipe.arrow", "zero.jsonl", "zero.arrow", "null.parquet"]


def test_pipes_and_devices_are_not_read(tmp_path):
    for name in special_files(tmp_path):
        file = str(tmp_path / name)
        with pytest.raises(BadRow, match=r"is not a regular file but a (named pipe|device)"):
            list(read_rows(file, {"text": str}))
        assert "is not a regular file" in scan_file(file, {"text": str}, (), 1 << 20).broken
    write(tmp_path / "good.jsonl", "a")
    rejected = RejectedRows(tmp_path / "rejected")
    assert len(list(read_rows(tmp_path, {"text": str}, on_bad_row="skip", rejected=rejected))) == 1
    assert rejected.count == 6


def test_other_archives_and_pointers_are_named(tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 1234\n"
    for name in ("a.jsonl", "a.jsonl.gz", "a.parquet", "a.arrow"):
        (tmp_path / name).write_text(pointer)
        with pytest.raises(BadRow, match=rf"{name}: is a Git LFS pointer, not the file; run git lfs pull"):
            list(read_rows(tmp_path / name, {"text": str}))
    (tmp_path / "bad.zip").write_text("no archive")
    with pytest.raises(BadRow, match=r"bad\.zip: is not a readable zip archive \(.*; fetch or pack it again"):
        list(read_rows(tmp_path / "bad.zip", {"text": str}))
    (tmp_path / "x.xlsx").write_text("no archive")
    for read in (lambda file: list(read_rows(file, {"text": str})), lambda file: fail(scan_file(file, {}, (), 1))):
        with pytest.raises(BadRow, match=r"x\.xlsx: spreadsheets are not read; save the sheet as csv"):
            read(str(tmp_path / "x.xlsx"))


def fail(scan):
    if scan.broken:
        raise BadRow(scan.broken)


@pytest.mark.parametrize("suffix", ["", ".gz", ".bz2", ".xz"])
def test_a_line_without_end_is_refused_before_it_is_in_memory(tmp_path, suffix, monkeypatch):
    compress = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}[suffix]
    file = tmp_path / f"rows.jsonl{suffix}"
    file.write_bytes(compress(b'{"text": "a"}\n{"text": "' + b" " * (40 << 20) + b'b"}\n{"text": "c"}\n'))
    columns = {"text": str}
    assert len(list(read_rows(file, columns))) == 3
    monkeypatch.setenv("NOMIC_JAX_MAX_ROW_MIB", "2")
    tracemalloc.start()
    try:
        for read in (lambda: list(read_rows(file, columns)), lambda: fail(scan_file(str(file), columns, (), 1 << 20))):
            with pytest.raises(BadRow, match=r"rows\.jsonl.*:2: is larger than 2 MiB; set --max_row_mib"):
                read()
        assert tracemalloc.get_traced_memory()[1] < 30 << 20
    finally:
        tracemalloc.stop()


FOREIGN = json.dumps({"pythonClassName": "planted_module.Feature", "text": {}})


def versions(folder):
    """Returns the folder of a prepared data set's version, and a folder outside with hostile features."""
    name = write_tfds(folder / "data", [{"query": "a", "document": "b"}] * 4, negatives=False)
    version = folder / "data" / "toy" / "pairs" / "1.0.0"
    shutil.copytree(version, folder / "outside")
    (folder / "outside" / "features.json").write_text(FOREIGN)
    (folder / "planted_module.py").write_text("raise SystemExit('code ran')")
    return name, version, folder / "outside"


def link_version(version, outside):
    shutil.rmtree(version)
    version.symlink_to(outside)


def link_features(version, outside):
    (version / "features.json").unlink()
    (version / "features.json").symlink_to(outside / "features.json")


def name_class(version, outside):
    (version / "features.json").write_text(FOREIGN)


def pipe_features(version, outside):
    (version / "features.json").unlink()
    os.mkfifo(version / "features.json")


@pytest.mark.parametrize("plant", [link_version, link_features, name_class, pipe_features])
def test_a_tfds_folder_imports_no_class_of_another_package(tmp_path, plant, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    name, version, outside = versions(tmp_path)
    assert len(list(read_rows(name, {"query": str}, others=()))) == 4
    _features.cache_clear()
    plant(version, outside)
    with pytest.raises(BadRow, match=r"is a link|is a named pipe|names the class 'planted_module\.Feature'"):
        list(read_rows(name, {"query": str}, others=()))
    # A shard that is named directly reads the features.json beside it.
    shard = str(version / "toy-train.array_record-00000-of-00002")
    with pytest.raises(BadRow, match=r"is a link|not a regular file|names the class 'planted_module\.Feature'"):
        list(read_rows(shard, {"query": str}, others=()))


def test_a_tfds_folder_may_itself_be_a_link(tmp_path):
    """The user chooses where data lie."""
    name, _, _ = versions(tmp_path)
    (tmp_path / "data" / "toy").rename(tmp_path / "elsewhere")
    (tmp_path / "data" / "toy").symlink_to(tmp_path / "elsewhere")
    assert len(list(read_rows(name, {"query": str}, others=()))) == 4
    (tmp_path / "data" / "toy" / "pairs" / "1.0.0" / "toy-train.array_record-00000-of-00002").unlink()
    os.mkfifo(tmp_path / "elsewhere" / "pairs" / "1.0.0" / "toy-train.array_record-00000-of-00002")
    with pytest.raises(BadRow, match="is a named pipe"):
        list(read_rows(name, {"query": str}, others=()))


BIG = "x" * (1 << 20)


def repeated(offsets: list[int] | None, first_is_null: bool = False) -> pa.Array:
    """Returns 400 times one text of 1 MiB, in lists if ``offsets`` is given; on disk the text is there once."""
    indices = pa.array([None if i == 0 and first_is_null else 0 for i in range(400)], pa.int32())
    texts = pa.DictionaryArray.from_arrays(indices, pa.array([BIG]))
    return texts if offsets is None else pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), texts)


@pytest.mark.parametrize("form", ["parquet", "arrow"])
@pytest.mark.parametrize("column", ["text", "lists"])
def test_a_value_that_is_stored_once_is_not_unpacked_a_thousand_times(tmp_path, form, column, monkeypatch):
    offsets = None if column == "text" else list(range(0, 401, 4))
    table = pa.table({"text": repeated(offsets)})
    file = tmp_path / f"rows.{form}"
    if form == "parquet":
        pq.write_table(table, file, compression="zstd", store_schema=False)
        assert file.stat().st_size < 2000
    else:
        with pa.ipc.new_stream(str(file), table.schema) as f:
            f.write_table(table)
    for module in (parquet, sizes):
        monkeypatch.setattr(module, "BATCH_BYTES", 8 << 20)
    pool = pa.proxy_memory_pool(pa.default_memory_pool())
    before = pa.default_memory_pool()
    pa.set_memory_pool(pool)
    tracemalloc.start()
    try:
        count = 0
        for row in read_rows(file, {"text": str if offsets is None else list}):
            assert row["text"] == (BIG if offsets is None else [BIG] * 4)
            count += 1
        assert count == (400 if offsets is None else 100)
        assert not scan_file(str(file), {"text": str if offsets is None else list}, (), 1 << 20).broken
        assert tracemalloc.get_traced_memory()[1] < 40 << 20
        assert pool.max_memory() < 40 << 20
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(before)


@pytest.mark.parametrize("form", ["parquet", "arrow"])
@pytest.mark.parametrize(
    "array", [repeated([0] * 3 + [400] * 5), pa.array(["a", "b" * (3 << 20)]), repeated(None, True)]
)
def test_a_row_beyond_the_limit_is_named(tmp_path, form, array, monkeypatch):
    monkeypatch.setenv("NOMIC_JAX_MAX_ROW_MIB", "2" if len(array) == 2 else "300" if len(array) == 7 else "0")
    file = tmp_path / f"rows.{form}"
    table = pa.table({"text": array})
    if form == "parquet":
        pq.write_table(table, file, compression="zstd", store_schema=False)
    else:
        with pa.ipc.new_file(str(file), table.schema) as f:
            f.write_table(table)
    kind = list if len(array) == 7 else str
    with pytest.raises(BadRow, match=r"(row \d \(counted from 0\)|a value): is larger than \d+ MiB; set --max_row_mib"):
        list(read_rows(file, {"text": kind}, allow_empty=True))
    assert "is larger than" in scan_file(str(file), {"text": kind}, (), 1 << 20).broken


def test_a_column_that_is_compressed_as_no_text_is(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "SMALL", 1 << 20)
    file = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": [BIG] * 20}), file, compression="zstd", use_dictionary=False)
    with pytest.raises(BadRow, match=r"'text' of row group 0: [0-9,]+ bytes that unpack to 20,9[0-9,]+ are no texts"):
        list(read_rows(file, {"text": str}))
    assert parquet.read_parquet_footer(str(file), {"text": str})[0] == 20


@pytest.mark.parametrize("codec", ["lz4", "zstd", None])
@pytest.mark.parametrize("new", [pa.ipc.new_stream, pa.ipc.new_file])
def test_compressed_buffers_of_arrow_are_bounded(tmp_path, new, codec, monkeypatch):
    file = tmp_path / "rows.arrow"
    table = pa.table({"text": pa.DictionaryArray.from_arrays(pa.array([0, 1], pa.int32()), pa.array([BIG, "b"]))})
    with new(str(file), table.schema, options=pa.ipc.IpcWriteOptions(compression=codec)) as f:
        f.write_table(table)
    rows = [{"text": BIG}, {"text": "b"}]
    assert list(read_rows(file, {"text": str})) == rows
    monkeypatch.setattr(sizes, "LARGEST_BUFFERS", 1 << 20)
    if codec is None:
        assert list(read_rows(file, {"text": str})) == rows
    else:
        with pytest.raises(BadRow, match=r"rows\.arrow: a record batch unpacks to more than"):
            list(read_rows(file, {"text": str}))

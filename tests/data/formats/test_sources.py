"""Rows in files: every error names file and line, and every skipped row is counted and saved."""

import datetime
import decimal
import gzip
import json
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nomic_jax.data.formats import jsonl
from nomic_jax.data.formats.file_format import Mark
from nomic_jax.data.formats.parquet import read_parquet_footer
from nomic_jax.data.formats.paths import expand_files
from nomic_jax.data.formats.reading import open_file, read_rows
from nomic_jax.data.formats.row_checks import BadRow, RejectedRows
from nomic_jax.data.formats.writing import write_rows
from nomic_jax.data.mixture import MixtureError, read_mixture
from nomic_jax.data.prompts import prompt_text

GOOD = {"query": "q", "document": "d"}
FAULTS = {
    "broken JSON": (b'{"query": "q", "document": "d"', "broken JSON"),
    "not an object": (b'["q", "d"]', "expected an object"),
    "missing column": (b'{"query": "q", "text": "d"}', "no column 'document'"),
    "null": (b'{"query": "q", "document": null}', "should hold text, found NoneType"),
    "wrong type": (b'{"query": "q", "document": 7}', "should hold text, found int"),
    "empty": (b'{"query": "q", "document": "  "}', "empty text"),
    "broken UTF-8": (b'{"query": "q", "document": "\xff"}', "not valid UTF-8"),
    "half a surrogate pair": (b'{"query": "q", "document": "\\ud83d"}', "surrogate"),
}


def lines(path, *raw):
    path.write_bytes(b"\n".join(raw) + b"\n")
    return path


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_names_file_and_line(tmp_path, fault):
    raw, message = FAULTS[fault]
    good = json.dumps(GOOD).encode()
    path = lines(tmp_path / "rows.jsonl", good, b"", raw, good)
    with pytest.raises(BadRow, match=message) as error:
        list(read_rows(path, {"query": str, "document": str}))
    assert f"{path}:3: " in str(error.value)


def test_skipped_rows_are_counted_and_kept(tmp_path):
    path = lines(tmp_path / "rows.jsonl", *(raw for raw, _ in FAULTS.values()), json.dumps(GOOD).encode())
    rejected = RejectedRows(tmp_path / "rejected.jsonl")
    rows = list(read_rows(path, {"query": str, "document": str}, on_bad_row="skip", rejected=rejected))
    assert rows == [GOOD] and rejected.count == len(FAULTS)
    kept = [json.loads(line) for line in rejected.side_file.read_text(encoding="utf-8").splitlines()]
    assert len(kept) == len(FAULTS) and all(str(path) in row["reason"] for row in kept)


def test_files_that_cannot_be_read_to_their_end_are_set_aside(tmp_path, capfd):
    whole = gzip.compress((json.dumps(GOOD) + "\n").encode() * 50_000)
    (tmp_path / "0.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "1.jsonl").touch()
    lines(tmp_path / "2.jsonl", json.dumps(GOOD).encode())
    (tmp_path / "3.jsonl").mkdir()
    with pytest.raises(BadRow, match="breaks off after line"):
        list(read_rows(tmp_path, {"query": str}))
    rejected = RejectedRows(tmp_path / "rejected.json")
    rows = list(read_rows(tmp_path, {"query": str}, on_bad_row="skip", rejected=rejected))
    assert rows == [GOOD] and rejected.count == len(rejected.quarantined) == 3
    reasons = [json.loads(line)["reason"] for line in rejected.side_file.read_text(encoding="utf-8").splitlines()]
    known = rejected.quarantined[0].rows_at_least
    assert 20_000 < known < 30_000 and f"none of its rows ({known:,} or more) is used" in reasons[0]
    assert f"{tmp_path}/0.jsonl.gz: the compressed file breaks off after line {known} " in reasons[0]
    assert f"{tmp_path}/1.jsonl: the file is empty" in reasons[1] and "their number is unknown" in reasons[1]
    assert f"{tmp_path}/3.jsonl: cannot be read (Is a directory)" in reasons[2]
    assert all(reason in capfd.readouterr().err for reason in reasons[:1])


def test_a_line_of_many_chunks_is_read_in_linear_time(tmp_path, monkeypatch):
    """If the line were joined again after each chunk, its bytes would be copied 16,000 times."""
    monkeypatch.setattr(jsonl, "CHUNK", 1 << 10)
    row = json.dumps({"text": "x" * (1 << 24)}).encode()
    (tmp_path / "rows.jsonl").write_bytes(row + b"\n" + row)
    began = time.process_time()
    scan = open_file(str(tmp_path / "rows.jsonl"), {"text": str}).scan(1 << 25)
    assert scan.rows == 2 and scan.marks == (Mark(0),) and time.process_time() - began < 5


def test_a_key_that_is_given_twice_is_a_fault(tmp_path):
    path = lines(tmp_path / "rows.jsonl", b'{"query": "q", "m": {"a": 1}}', b'{"query": "q", "m": {"a": 1, "a": 2}}')
    rows = read_rows(path, {"query": str})
    next(rows)
    with pytest.raises(BadRow, match=r"rows\.jsonl:2: broken JSON \(the key 'a' is given twice\)"):
        next(rows)


def test_an_empty_file_is_an_error(tmp_path):
    (tmp_path / "rows.jsonl").touch()
    with pytest.raises(BadRow, match="empty"):
        list(read_rows(tmp_path / "rows.jsonl", {"query": str}))


def test_negatives_are_lists_of_texts(tmp_path):
    path = lines(tmp_path / "rows.jsonl", b'{"negatives": ["a", "b"]}', b'{"negatives": "a"}', b'{"negatives": 1}')
    rows = read_rows(path, {"negatives": list})
    assert next(rows) == {"negatives": ["a", "b"]}
    assert next(rows) == {"negatives": ["a"]}
    with pytest.raises(BadRow, match="should be a list of texts, found int"):
        next(rows)


def test_only_columns_asked_for_are_passed_on(tmp_path):
    write_rows(tmp_path / "rows.jsonl", [GOOD | {"id": 1, "x": 2}, GOOD])
    assert list(read_rows(tmp_path / "rows.jsonl", {"query": str}, others=["id"])) == [
        {"query": "q", "id": 1},
        {"query": "q"},
    ]
    pq.write_table(pa.table({"x": [1], "id": [2], "query": ["q"]}), tmp_path / "rows.parquet")
    assert list(read_rows(tmp_path / "rows.parquet", {"query": str}, others=["id"])) == [{"query": "q", "id": 2}]
    assert list(read_rows(tmp_path / "rows.parquet", {"query": str})) == [{"x": 1, "id": 2, "query": "q"}]
    with pytest.raises(BadRow, match="no column 'idd'; the file has 'x', 'id', 'query'"):
        next(read_rows(tmp_path / "rows.parquet", {"query": str}, others=["idd"]))


def test_empty_texts_are_taken_where_they_mean_something(tmp_path):
    path = lines(tmp_path / "rows.jsonl", b'{"text": ""}', b'{"text": " "}', b'{"text": null}')
    rows = read_rows(path, {"text": str}, allow_empty=True)
    assert [next(rows), next(rows)] == [{"text": ""}, {"text": " "}]
    with pytest.raises(BadRow, match="should hold text, found NoneType"):
        next(rows)


def string_array(*texts: bytes) -> pa.StringArray:
    """Returns a string array without checking that the bytes are valid UTF-8."""
    offsets = pa.array([sum(map(len, texts[:i])) for i in range(len(texts) + 1)], pa.int32())
    return pa.StringArray.from_buffers(len(texts), offsets.buffers()[1], pa.py_buffer(b"".join(texts)))


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["q", None], "should hold text, found NoneType"),
        (["q", " "], "empty text"),
        (string_array(b"q", b"\xff"), "is not valid UTF-8"),
        (pa.array(["q", None]).dictionary_encode(), "should hold text, found NoneType"),
        (pa.array(["q", ""], pa.large_string()), "empty text"),
    ],
)
def test_a_fault_in_parquet_names_file_and_row(tmp_path, texts, message):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": texts, "id": [7, 8]}), path)
    rows = read_rows(path, {"text": str})
    assert next(rows) == {"text": "q", "id": 7}
    with pytest.raises(BadRow, match=message) as error:
        next(rows)
    assert f"{path}: row 1 (counted from 0): " in str(error.value)
    rejected = RejectedRows(tmp_path / "rejected.jsonl")
    assert len(list(read_rows(path, {"text": str}, on_bad_row="skip", rejected=rejected))) == 1
    assert json.loads(json.loads(rejected.side_file.read_text(encoding="utf-8"))["row"])["id"] == 8


def test_negatives_in_parquet_are_lists_of_texts(tmp_path):
    pq.write_table(pa.table({"negatives": [["a", "b"], ["c", None]]}), tmp_path / "rows.parquet")
    rows = read_rows(tmp_path / "rows.parquet", {"negatives": list})
    assert next(rows) == {"negatives": ["a", "b"]}
    with pytest.raises(BadRow, match="should hold text, found NoneType"):
        next(rows)


FILE_FAULTS = {
    "no column": (pa.table({"body": ["x"]}), str, "no column 'text'; the file has 'body'"),
    "numbers": (pa.table({"text": [1]}), str, "should hold text, found the type int64"),
    "bytes": (pa.table({"text": [b"x"]}), str, "should hold text, found the type binary"),
    "lists for texts": (pa.table({"text": [["x"]]}), str, "should hold text, found the type list"),
    "numbers for lists": (pa.table({"text": [1]}), list, "should hold lists of texts, found the type int64"),
}


@pytest.mark.parametrize("fault", FILE_FAULTS)
def test_a_parquet_file_of_another_kind_is_named(tmp_path, fault):
    table, kind, message = FILE_FAULTS[fault]
    pq.write_table(table, tmp_path / "rows.parquet")
    for read in (
        lambda: next(read_rows(tmp_path / "rows.parquet", {"text": kind})),
        lambda: read_parquet_footer(str(tmp_path / "rows.parquet"), {"text": kind}),
    ):
        with pytest.raises(BadRow, match=message) as error:
            read()
        assert str(tmp_path / "rows.parquet") in str(error.value)


@pytest.mark.parametrize("content", [b"", b"no parquet at all", b"PAR1" + bytes(40) + b"PAR1"])
def test_a_broken_parquet_file_is_named(tmp_path, content):
    (tmp_path / "rows.parquet").write_bytes(content)
    with pytest.raises(BadRow, match=r"rows\.parquet: not a readable parquet file"):
        next(read_rows(tmp_path / "rows.parquet", {"text": str}))


def test_parquet_is_read_as_its_rows_are_taken(tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": [str(i) for i in range(5000)]}), path, row_group_size=2500, use_dictionary=False)
    assert read_parquet_footer(str(path), {"text": str})[0] == 5000
    content = bytearray(path.read_bytes())
    second_group = pq.read_metadata(path).row_group(1).column(0).data_page_offset
    content[second_group : second_group + 200] = bytes(200)
    path.write_bytes(content)
    rows = read_rows(path, {"text": str})
    assert [next(rows)["text"] for _ in range(2000)] == [str(i) for i in range(2000)]
    with pytest.raises(BadRow, match="not a readable parquet file"):
        list(rows)


def test_brace_ranges_globs_and_folders(tmp_path):
    for i in range(3):
        write_rows(tmp_path / f"shard-{i:05d}.jsonl", [GOOD])
    names = [str(tmp_path / f"shard-{i:05d}.jsonl") for i in range(3)]
    assert expand_files(tmp_path) == expand_files(tmp_path / "*.jsonl") == names
    assert expand_files(tmp_path / "shard-{00000..00002}.jsonl") == names
    for name in ("shard-00003.parquet", "shard-00004.jsonl.gz", "notes.txt"):
        (tmp_path / name).touch()
    assert [file.rsplit("-")[-1] for file in expand_files(tmp_path)[3:]] == ["00003.parquet", "00004.jsonl.gz"]
    (tmp_path / "shard-00003.parquet").unlink()
    with pytest.raises(FileNotFoundError, match="1 of 4 files are missing"):
        expand_files(tmp_path / "shard-{00000..00003}.jsonl")
    with pytest.raises(FileNotFoundError, match="no file matches"):
        expand_files(tmp_path / "*.parquet")


def test_rows_that_json_cannot_hold_are_written(tmp_path):
    day = datetime.datetime(2026, 11, 21, 11, 0, tzinfo=datetime.UTC)
    table = {"text": ["x"], "at": [day], "price": [decimal.Decimal("1.50")], "image": [b"\xff\x00"]}
    pq.write_table(pa.table(table), tmp_path / "rows.parquet")
    (row,) = read_rows(tmp_path / "rows.parquet", {"text": str})
    write_rows(tmp_path / "rows.jsonl", [row, {"text": "日本", "other": "\ud800"}])
    written, half = read_rows(tmp_path / "rows.jsonl", {"text": str})
    assert written == {"text": "x", "at": "2026-11-21T11:00:00+00:00", "price": "1.50", "image": "/wA="}
    assert half == {"text": "日本", "other": "\ud800"}


def test_a_failed_write_leaves_the_old_file(tmp_path):
    write_rows(tmp_path / "rows.jsonl", [GOOD])

    def broken():
        yield {"query": "new"}
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_rows(tmp_path / "rows.jsonl", broken())
    assert list(read_rows(tmp_path / "rows.jsonl", {})) == [GOOD]


MIXTURES = {
    "unknown field": ("{name: a, bucket: a, objective: {type: paired}, prefix: x}", "unknown field 'prefix'"),
    "no bucket": ("{name: a, objective: {type: paired}}", "needs the fields"),
    "unknown objective": ("{name: a, bucket: a, objective: {type: pairs}}", "objective must be"),
    "columns": ("{name: a, bucket: a, objective: {type: paired, columns: [a]}}", "take the columns"),
    "kind": ("{name: a, bucket: a, objective: {type: self}}", "holds text rows; this stage needs pair rows"),
}


@pytest.mark.parametrize("fault", MIXTURES)
def test_a_faulty_mixture_is_explained(tmp_path, fault):
    entry, message = MIXTURES[fault]
    path = tmp_path / "mixture.yaml"
    path.write_text(f"datasets:\n  - {entry}\n")
    with pytest.raises(MixtureError, match=message) as error:
        read_mixture(str(path), "pair")
    assert str(path) in str(error.value)


def test_prefixes_of_a_mixture(tmp_path):
    path = tmp_path / "mixture.yaml"
    common = "objective: {type: triplet}"
    path.write_text(
        f"- {{name: a, bucket: a.jsonl, {common}, query_prefix: search_query, document_prefix: search_document}}\n"
        f"- {{name: b, bucket: /b.jsonl, {common}, query_prefix: 'clustering: '}}\n"
        f"- {{name: c, bucket: 's3://c/x.jsonl', {common}, query_prefix: classification, query_only: true}}\n"
    )
    a, b, c = read_mixture(str(path), "triplet")
    assert (a.query_prefix, a.document_prefix, a.files) == (
        "search_query",
        "search_document",
        str(tmp_path / "a.jsonl"),
    )
    assert (b.query_prefix, b.document_prefix, b.files) == ("clustering", "clustering", "/b.jsonl")
    assert (c.query_prefix, c.document_prefix, c.files) == ("classification", "", "s3://c/x.jsonl")
    assert prompt_text(b.query_prefix) == "clustering: "
    assert [source.columns for source in read_mixture(str(path), "pair")] == [("query", "document")] * 3


def test_a_stream_of_arrow_that_was_cut_between_two_batches_is_broken(tmp_path):
    """pyarrow reads such a file as a shorter stream without an error."""
    table = pa.table({"text": ["a", "b", "c", "d"]})
    with pa.ipc.new_stream(str(tmp_path / "whole.arrow"), table.schema) as f:
        f.write_table(table, max_chunksize=1)
    content = (tmp_path / "whole.arrow").read_bytes()
    assert len(list(read_rows(tmp_path / "whole.arrow", {"text": str}))) == 4
    cuts = [length for length in range(8, len(content), 8) if rows_by_pyarrow(content[:length]) is not None]
    assert {rows_by_pyarrow(content[:length]) for length in cuts} == {0, 1, 2, 3, 4}
    for length in cuts:
        (tmp_path / "cut.arrow").write_bytes(content[:length])
        with pytest.raises(BadRow, match=r"cut\.arrow: not a readable Arrow file \(the file is truncated"):
            list(read_rows(tmp_path / "cut.arrow", {"text": str}))


def rows_by_pyarrow(content: bytes) -> int | None:
    try:
        return pa.ipc.open_stream(content).read_all().num_rows
    except (pa.ArrowInvalid, OSError):
        return None

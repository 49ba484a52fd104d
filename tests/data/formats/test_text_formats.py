"""csv, tsv, json arrays, zip members and BEIR data sets: the rows of an independent reader, and bounded work."""

import bz2
import csv
import gzip
import io
import itertools
import json
import lzma
import zipfile

import pandas as pd
import pytest

from nomic_jax.data.formats.file_format import Mark
from nomic_jax.data.formats.paths import expand_files, input_files
from nomic_jax.data.formats.reading import Rows, open_file, read_rows, scan_file
from nomic_jax.data.formats.row_checks import BadRow, RejectedRows
from nomic_jax.data.formats.text import compression, zip_members
from nomic_jax.data.mixture import MixtureError, read_mixture
from nomic_jax.data.tokens.pretokenize import pretokenize
from nomic_jax.data.tokens.tokenizer import Tokenizer

try:
    import zstandard
except ImportError:  # only some environments of the tests have it
    zstandard = None

COLUMNS = {"question": str, "answer": str}
ROWS = [
    {"question": f"què {i}?", "answer": 'a "quoted", answer\r\nof two lines\n' * (i % 3) + f"書 {i}\t"}
    for i in range(300)
]
PACK = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
if zstandard:
    PACK[".zst"] = zstandard.compress
FORMS = ["csv", "tsv", "json", "csv.gz", "tsv.zst", "json.bz2", "csv.xz", "json.zst"]


def delimited(rows, delimiter=",", **options) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter, **options)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def write(path, form, rows=ROWS):
    """Writes rows in a format, with as many odd features as the format allows."""
    content = {
        "csv": lambda: b"\xef\xbb\xbf" + delimited(rows),
        "tsv": lambda: delimited(rows, "\t", lineterminator="\n").replace(b"\n\xc2", b"\n\n\xc2"),
        "json": lambda: b"\xef\xbb\xbf\n" + json.dumps(rows, ensure_ascii=False, indent=1).encode() + b"\n ",
    }[form.split(".")[0]]()
    packed = "." + form.partition(".")[2] if "." in form else ""
    path.write_bytes(PACK[packed](content))
    return str(path)


@pytest.mark.parametrize("form", [form for form in FORMS if zstandard or not form.endswith("zst")])
def test_rows_in_order_at_random_and_from_marks(tmp_path, form):
    file = write(tmp_path / f"rows.{form}", form)
    assert list(read_rows(file, COLUMNS, others=())) == ROWS
    if form.startswith(("csv", "tsv")):
        frame = pd.read_csv(file, sep="\t" if form.startswith("tsv") else ",")
        assert frame.to_dict("records") == ROWS
    rows = Rows(file, COLUMNS, others=())
    assert len(rows) == len(ROWS) and [rows[i] for i in (299, 0, 150, 7)] == [ROWS[i] for i in (299, 0, 150, 7)]
    scan = scan_file(file, COLUMNS, (), 1000)
    assert scan.rows == len(ROWS) and len(scan.marks) > 10 and not scan.broken
    bounds = [*(mark.row for mark in scan.marks), scan.rows]
    parts = [
        [row for _, row in open_file(file, COLUMNS, (), [mark]).numbered(mark.row, stop)]
        for mark, stop in zip(scan.marks, bounds[1:])
    ]
    assert list(itertools.chain(*parts)) == ROWS
    for mark in scan.marks[1:3]:  # a mark's line is that of the message
        (where, _), *_ = open_file(file, COLUMNS, (), [mark]).numbered(mark.row, mark.row + 1)
        (again, _), *_ = open_file(file, COLUMNS, (), [Mark(0)]).numbered(mark.row, mark.row + 1)
        assert where == again


def test_a_row_with_another_number_of_values_is_named_by_its_line(tmp_path):
    file = tmp_path / "faq.csv"
    file.write_text('question,answer\nq1,"one\nand two"\n\nq2,a,b\nq3,a3\nq4\n')
    with pytest.raises(BadRow, match=r"faq\.csv:5: has 3 values, the first line names 2 columns; put quotes around"):
        list(read_rows(file, COLUMNS))
    rejected = RejectedRows(tmp_path / "rejected.jsonl")
    rows = list(read_rows(file, COLUMNS, on_bad_row="skip", rejected=rejected))
    assert [row["question"] for row in rows] == ["q1", "q3"]
    lines = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == ["q2,a,b\n", "q4\n"]
    assert "faq.csv:7: has 1 values" in lines[1]["reason"]


FAULTS = {
    "no header": (b"what?,that\n", r":1: no column 'question'; the first line has 'what\?', 'that'"),
    "semicolons": (b"question;answer\na;b\n", r"are separated by a semicolon: write a comma"),
    "named twice": (b"question,answer,answer\na,b,c\n", r":1: two columns are named 'answer'"),
    "empty": (b"", r"the file is empty; expected a line with the names"),
    "open quote": (b'question,answer\na,b\nc,"d\ne,f\n', r":3: broken csv in the row that begins here \("),
    "stray quote": (b'question,answer\na,b\nc,"d"e\n', r":3: broken csv in the row that begins here \("),
    "not UTF-8": ("question,answer\na,b\nc,é\n".encode("latin-1"), r":3: column 'answer' is not valid UTF-8"),
    "empty text": (b"question,answer\na,b\n,d\n", r":3: column 'question' holds an empty text"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_csv(tmp_path, fault):
    content, message = FAULTS[fault]
    (tmp_path / "faq.csv").write_bytes(content)
    with pytest.raises(BadRow, match=r"faq\.csv.*" + message):
        list(read_rows(tmp_path / "faq.csv", COLUMNS))


JSON_FAULTS = {
    '[{"question": "a", "answer": "b"},\n 7]': r":2: expected an object with named columns, found int",
    '[{"question": "a", "answer": "b"},\n {"question": ]': r":2: broken JSON \(Expecting value",
    '[{"question": "a", "answer": "b"}\n': r":2: broken JSON \(the file ends before its array does",
    '[{"question": "a", "answer": "b"},\n{"question": "abc': r":2: broken JSON \(Unterminated string",
    '[{"question": "a", "answer": "b"}] []': r":1: broken JSON \(there is more after the end of the array",
    '[{"question": "a", "question": "b"}]': r":1: broken JSON \(the key 'question' is given twice",
    '[{"question": "a", "answer": NaN}]': r":1: broken JSON \(NaN is not JSON",
}


@pytest.mark.parametrize("content", JSON_FAULTS)
def test_faults_of_json_arrays(tmp_path, content):
    (tmp_path / "faq.json").write_text(content)
    with pytest.raises(BadRow, match=r"faq\.json" + JSON_FAULTS[content]):
        list(read_rows(tmp_path / "faq.json", COLUMNS))


def test_a_json_array_is_parsed_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("nomic_jax.data.formats.text.json_array.CHUNK", 7)  # every place is once the end of a piece
    file = write(tmp_path / "rows.json", "json")
    assert list(read_rows(file, COLUMNS)) == ROWS
    (tmp_path / "lines.json").write_text('{"question": "a", "answer": "b"}\n')  # a row per line, whatever its name
    assert list(read_rows(tmp_path / "lines.json", COLUMNS)) == [{"question": "a", "answer": "b"}]
    (tmp_path / "none.json").write_text(" []")
    assert list(read_rows(tmp_path / "none.json", COLUMNS)) == []


@pytest.mark.parametrize("ending", PACK)
def test_truncated_and_damaged_files_are_noticed(tmp_path, ending):
    content = PACK[ending](delimited(ROWS) * 20)
    file = tmp_path / f"faq.csv{ending}"
    file.write_bytes(content[: len(content) // 2])
    if ending:
        with pytest.raises(BadRow, match=r"the compressed file breaks off after line"):
            list(read_rows(file, COLUMNS))
        assert "breaks off" in scan_file(str(file), COLUMNS, (), 1000).broken
    file = tmp_path / f"faq.jsonl{ending}"
    file.write_bytes(PACK[ending](b'{"text": "a"}\n' * 5000)[:-4])
    with pytest.raises(BadRow, match="breaks off after line" if ending else "broken JSON"):
        list(read_rows(file, {"text": str}))


@pytest.mark.parametrize("ending", [ending for ending in PACK if ending])
def test_a_file_that_unpacks_without_end_is_refused(tmp_path, monkeypatch, ending):
    monkeypatch.setattr(compression, "FREE_BYTES", 1 << 16)
    monkeypatch.setattr(compression, "LARGEST_RATIO", 100)
    line = b'{"text": "a"}\n'
    file = tmp_path / f"rows.jsonl{ending}"
    file.write_bytes(PACK[ending](line * 300_000))
    assert next(read_rows(file, {"text": str})) == {"text": "a"}  # rows before the bound are read
    with pytest.raises(BadRow, match=r"rows\.jsonl.*: its first [\d,]+ bytes unpack to more than [\d,]+, which"):
        list(read_rows(file, {"text": str}))
    assert "unpack to more than" in scan_file(str(file), {"text": str}, (), 1 << 20).broken


def write_zip(path, members, **options):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as f:
        for name, content in members.items():
            f.writestr(name, content, **options)
    return str(path)


def test_members_of_zip_archives(tmp_path):
    members = {
        "data/b.csv": delimited(ROWS[:100]),
        "data/a.jsonl.gz": gzip.compress(b"".join(json.dumps(row).encode() + b"\n" for row in ROWS[100:200])),
        "c.json": json.dumps(ROWS[200:]),
        "README.md": "no rows",
        "__MACOSX/data/._b.csv": "no rows",
    }
    archive = write_zip(tmp_path / "faq.zip", members)
    names = ["zip://c.json::", "zip://data/a.jsonl.gz::", "zip://data/b.csv::"]
    assert expand_files(archive) == expand_files(tmp_path) == [name + archive for name in names]
    assert input_files(archive, tmp_path / "out") == [name + archive for name in names]
    assert list(read_rows(archive, COLUMNS)) == ROWS[200:] + ROWS[100:200] + ROWS[:100]
    assert list(read_rows(f"zip://data/*.csv::{archive}", COLUMNS)) == ROWS[:100]
    assert Rows(f"zip://c.json::{archive}", COLUMNS)[7] == ROWS[207]
    (tmp_path / "m.yaml").write_text(
        "datasets: [{name: a, bucket: 'zip://c.json::faq.zip', objective: {type: paired, columns: [question, answer]}}]"
    )
    (source,) = read_mixture(str(tmp_path / "m.yaml"), "pair")
    assert list(read_rows(source.files, COLUMNS)) == ROWS[200:]
    with pytest.raises(FileNotFoundError, match=r"faq\.zip: no file in it matches 'x\.csv'; it has 'data/b\.csv'"):
        expand_files(f"zip://x.csv::{archive}")
    with pytest.raises(FileNotFoundError, match=r"no file in it ends in \.jsonl"):
        expand_files(write_zip(tmp_path / "none.zip", {"a.txt": "x"}))


@pytest.mark.parametrize("name", ["../a.csv", "/etc/a.csv", "x/../../a.csv", "C:/a.csv", "a::b.csv"])
def test_members_outside_of_the_archive_are_refused(tmp_path, name):
    with pytest.raises(BadRow, match="is named as a place outside of the archive"):
        expand_files(write_zip(tmp_path / "a.zip", {name: delimited(ROWS)}))


def test_archives_that_are_made_to_harm_are_refused(tmp_path, monkeypatch):
    bomb = write_zip(tmp_path / "bomb.zip", {"a.csv": b"question,answer\n" + b"a,b\n" * (1 << 25)})
    monkeypatch.setattr(zip_members, "LARGEST_RATIO", 100)
    with pytest.raises(BadRow, match=r"'a\.csv' unpacks from [\d,]+ to 134,217,744 bytes, which text does not"):
        expand_files(bomb)
    link = zipfile.ZipInfo("a.csv")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "link.zip", "w") as f:
        f.writestr(link, "/etc/passwd")
    with pytest.raises(BadRow, match=r"'a\.csv' is a link"):
        expand_files(tmp_path / "link.zip")
    content = bytearray((tmp_path / "link.zip").read_bytes())
    content[content.rindex(b"PK\x01\x02") + 8] |= 1  # says that it is encrypted
    (tmp_path / "secret.zip").write_bytes(content.replace((0o120777 << 16).to_bytes(4, "little"), bytes(4)))
    with pytest.raises(BadRow, match=r"'a\.csv' is encrypted"):
        expand_files(tmp_path / "secret.zip")
    # Two entries of the directory with the same bytes, as in a bomb of overlapping files.
    whole = write_zip(tmp_path / "one.zip", {"a.csv": delimited(ROWS)})
    data = bytearray((tmp_path / "one.zip").read_bytes())
    start, end = data.rindex(b"PK\x01\x02"), data.rindex(b"PK\x05\x06")
    entry = bytes(data[start:end])
    data[end:end] = entry.replace(b"a.csv", b"b.csv")
    at = data.rindex(b"PK\x05\x06")
    data[at + 8 : at + 16] = (2).to_bytes(2, "little") * 2 + (2 * len(entry)).to_bytes(4, "little")
    (tmp_path / "overlap.zip").write_bytes(data)
    with pytest.raises(BadRow, match="files in it overlap"):
        expand_files(tmp_path / "overlap.zip")
    damaged = bytearray((tmp_path / "one.zip").read_bytes())
    damaged[len(damaged) // 3] ^= 0xFF
    (tmp_path / "one.zip").write_bytes(damaged)
    with pytest.raises(BadRow, match="breaks off after line"):
        list(read_rows(whole, COLUMNS))


def write_beir(folder, splits=("train", "test")):
    """Writes a small BEIR data set, and returns the relevant pairs of its first split."""
    (folder / "qrels").mkdir(parents=True)
    documents = {f"d{i}": ({"title": f"t{i}"} if i % 2 else {}) | {"text": f"text {i}"} for i in range(9)}
    corpus = [{"_id": name, **row} for name, row in documents.items()]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in corpus))
    queries = [{"_id": f"q{i}", "text": f"query {i}"} for i in range(4)]
    (folder / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in queries))
    judged = [("q0", "d1", 1), ("q0", "d2", 2), ("q1", "d3", 0), ("q2", "d8", 1)]
    for split in splits:
        lines = "".join(f"{query}\t{document}\t{score}\n" for query, document, score in judged)
        (folder / "qrels" / f"{split}.tsv").write_text(f"query-id\tcorpus-id\tscore\n{lines}")
    return [("query 0", "t1 text 1"), ("query 0", "text 2"), ("query 2", "text 8")]


def test_beir_data_sets_are_pairs(tmp_path):
    pairs = write_beir(tmp_path / "set")
    columns = {"query": str, "document": str}
    assert expand_files(tmp_path / "set") == [str(tmp_path / "set" / "qrels" / "train.tsv")]
    rows = list(read_rows(tmp_path / "set", columns, others=()))
    assert [(row["query"], row["document"]) for row in rows] == pairs
    assert Rows(tmp_path / "set", columns)[1] == {
        "query": "query 0", "document": "text 2", "query_id": "q0", "document_id": "d2", "score": 2
    }  # fmt: skip
    before = scan_file(expand_files(tmp_path / "set")[0], columns, (), 1)
    assert before.rows == len(before.marks) == 3
    corpus = tmp_path / "set" / "corpus.jsonl"
    corpus.with_name("corpus.jsonl.gz").write_bytes(gzip.compress(corpus.read_bytes().replace(b"text 8", b"text 88")))
    corpus.unlink()
    assert [row["document"] for row in read_rows(tmp_path / "set", columns)][2] == "text 88"
    assert scan_file(expand_files(tmp_path / "set")[0], columns, (), 1).sha256 != before.sha256
    with pytest.raises(BadRow, match=r"no column 'negatives'; .* mine them \(launch\.mine\)"):
        list(read_rows(tmp_path / "set", columns | {"negatives": list}))
    train = tmp_path / "set" / "qrels" / "train.tsv"
    train.write_text(train.read_text() + "q3\td99\t1\n")
    with pytest.raises(BadRow, match=r"train\.tsv:6: .*corpus\.jsonl\.gz has no _id 'd99'"):
        list(read_rows(tmp_path / "set", columns))
    train.write_text("query-id\tcorpus-id\tscore\nq0\td1\tyes\n")
    with pytest.raises(BadRow, match=r"train\.tsv:2: score is 'yes'; write a whole number"):
        list(read_rows(tmp_path / "set", columns))
    train.unlink()
    with pytest.raises(FileNotFoundError, match=r"name the judgements to train on: .*/qrels/test\.tsv"):
        expand_files(tmp_path / "set")


def test_columns_of_files_that_are_named_directly():
    (source,) = read_mixture("faq.csv", "pair", ["question", "answer"])
    assert (source.files, source.columns, source.query_prefix) == ("faq.csv", ("question", "answer"), "search_query")
    (source,) = read_mixture("t.csv", "triplet", ["anchor", "positive", "n1", "n2"])
    assert source.columns == ("anchor", "positive", "n1", "n2")
    for columns, message in (
        (["question"], "take the columns query, document; found question"),
        (["a", "a"], "named twice"),
        (list("abc"), "take the columns"),
    ):
        with pytest.raises(MixtureError, match=message):
            read_mixture("faq.csv", "pair", columns)
    with pytest.raises(MixtureError, match="a mixture names the columns and the loss of each source"):
        read_mixture("pairs.yaml", "pair", ["a", "b"])


def test_triplets_of_csv_have_the_tokens_of_lists_in_jsonl(tmp_path, minilm, monkeypatch):
    rows = [{"a": f"query {i}", "p": f"document {i}", "n1": f"first {i}", "n2": f"second, {i}"} for i in range(40)]
    (tmp_path / "t.csv").write_bytes(delimited(rows))
    lists = [{"a": row["a"], "p": row["p"], "n": [row["n1"], row["n2"]]} for row in rows]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lists))
    (tmp_path / "cells.tsv").write_bytes(delimited([row | {"n": json.dumps(row["n"])} for row in lists], "\t"))
    monkeypatch.setattr("nomic_jax.data.tokens.scans.SPAN_BYTES", 500)  # several spans
    columns = {"t.csv": ["a", "p", "n1", "n2"], "t.jsonl": ["a", "p", "n"], "cells.tsv": ["a", "p", "n"]}
    tokenizer = Tokenizer.from_directory(minilm)
    stores = []
    for file, names in columns.items():
        (source,) = read_mixture(str(tmp_path / file), "triplet", names)
        stores.append(pretokenize(source, tokenizer, tmp_path / "cache", progress=False))
    for file in (
        "negatives.rows.npy",
        *(f"{name}.{part}.npy" for name in stores[0].columns for part in ("ids", "offsets")),
    ):
        first, *others = ((store.directory / file).read_bytes() for store in stores)
        assert all(first == other for other in others), file

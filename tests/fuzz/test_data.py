"""Rows, index files of shards, mixtures and settings with any content give a value or an error of nomic_jax."""

import gzip
import json
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from configs import contrastive, finetune, mlm
from nomic_jax.data.formats.paths import expand_files
from nomic_jax.data.formats.reading import open_file, read_rows
from nomic_jax.data.formats.row_checks import BadRow, RejectedRows
from nomic_jax.data.formats.shard_index import check_shards
from nomic_jax.data.mixture import COLUMNS, MixtureError, Source, read_mixture
from nomic_jax.train.config import ConfigurationError, TrainConfig
from tests.fuzz.conftest import TIMES
from tests.fuzz.strategies import ANYTHING, as_bytes, broken_json, changed, damaged

EXAMPLES = 60 * max(1, TIMES)
PAIR = {"query": str, "document": str}
ROWS = [{"query": f"q {i}", "document": "d", "metadata": {"objective": {"paired": [["query", "document"]]}}} for i in range(6)]  # fmt: skip  # noqa: E501
LINES = [as_bytes(row) + b"\n" for row in ROWS]


def check_rows(file: Path, content: bytes) -> None:
    """Checks that an error names the file and that, with ``skip``, every non-blank line is used or in the side file."""
    file.write_bytes(content)
    used, refused = 0, None
    try:
        used = sum(1 for _ in read_rows(file, PAIR))
    except BadRow as error:
        refused = str(error)
        assert str(file) in refused
    rejected = RejectedRows(file.with_name("rejected.jsonl"))
    kept = list(read_rows(file, PAIR, on_bad_row="skip", rejected=rejected))
    assert all(row["query"].strip() and row["document"].strip() for row in kept)
    assert (refused is None) == (rejected.count == 0) and (refused is not None or len(kept) == used)
    if file.suffix == ".jsonl" and content:
        lines = content.split(b"\n")
        assert len(kept) + rejected.count == sum(bool(line.strip()) for line in lines)
    side_file = file.with_name("rejected.jsonl")
    assert rejected.count == (len(side_file.read_text(encoding="utf-8").splitlines()) if side_file.exists() else 0)
    for row in kept:
        try:
            Source("a", str(file), "pair", ("query", "document")).check_row(row, str(file))
        except BadRow as error:
            assert str(file) in str(error)


@settings(max_examples=EXAMPLES)
@given(damaged(b"".join(LINES)) | broken_json(ROWS[0]).map(lambda row: LINES[0] + row + b"\n" + LINES[1]))
@example(LINES[0] + b'{"query": "q", "document": "d", "n": ' + b"9" * 5000 + b"}\n")
@example(b"\xef\xbb\xbf" + LINES[0])
@example("".join(line.decode() for line in LINES).encode("utf-16"))
@example(LINES[0].replace(b"\n", b"\r\n") + b"\r\n\x0b\n" + LINES[1])
@example(b'{"query": "q", "document": "d", "metadata": {"objective": {"paired": 5, "triplet": [7]}}}\n')
def test_jsonl(tmp_path, content):
    check_rows(tmp_path / "rows.jsonl", content)


@settings(max_examples=EXAMPLES)
@given(damaged(gzip.compress(b"".join(LINES), mtime=0)))
def test_compressed_jsonl(tmp_path, content):
    check_rows(tmp_path / "rows.jsonl.gz", content)


def beside(tmp_path: Path, name: str, content: bytes) -> None:
    """Checks an index file of a shard: it is refused by name, or its content is correct."""
    shard = tmp_path / "a.jsonl"
    shard.write_bytes(b"".join(LINES))
    (tmp_path / name).write_bytes(content)
    try:
        check_shards([str(shard)], [open_file(str(shard), PAIR).scan(1 << 20)])
    except BadRow as error:
        assert name in str(error)
    else:
        told = json.loads(gzip.decompress(content) if name.endswith(".gz") else content)
        told = told.get("count_per_file", told) if name == "counts.json" else told
        assert name != "counts.json" or told["a.jsonl"] == len(ROWS)


@settings(max_examples=EXAMPLES)
@given(broken_json({"a.jsonl": 6}) | broken_json({"count_per_file": {"a.jsonl": 6}, "total_count": 6}))
@example(b'{"a.jsonl": Infinity}')
@example(b'{"a.jsonl": 6.7}')
def test_counts(tmp_path, content):
    beside(tmp_path, "counts.json", content)


ENDS = [sum(map(len, LINES[: i + 1])) for i in range(len(LINES))]
OFFSETS = {"a.jsonl": {str(i): [end - len(line), end] for i, (line, end) in enumerate(zip(LINES, ENDS))}}


@settings(max_examples=EXAMPLES)
@given(broken_json(OFFSETS).map(gzip.compress) | damaged(gzip.compress(as_bytes(OFFSETS), mtime=0)))
@example(gzip.compress(as_bytes({"a.jsonl": {"0": [0, 10**30]}})))
def test_offsets(tmp_path, content):
    beside(tmp_path, "offsets.json.gz", content)


MIXTURE = {
    "datasets": [
        {
            "name": name,
            "bucket": "shards/{0..3}.jsonl",
            "objective": {"type": "paired", "columns": ["query", "document"]},
            "query_prefix": "search_query",
            "document_prefix": "search_document",
            "query_only": False,
            "in_batch_negatives": True,
            "rows": 100,
            "weight": 1.0,
        }
        for name in ("a", "b")
    ]
}
LAUGHS = "\n".join(["- &a0 [x, x]", *(f"- &a{i} [*a{i - 1}, *a{i - 1}, *a{i - 1}]" for i in range(1, 60))])


@settings(max_examples=EXAMPLES)
@given(
    broken_json(MIXTURE) | changed(MIXTURE).map(lambda x: yaml.safe_dump(x).encode())
    | damaged(yaml.safe_dump(MIXTURE).encode()),
    st.sampled_from(sorted(COLUMNS)),
)  # fmt: skip
@example(LAUGHS.encode(), "pair")
@example(f"{LAUGHS}\n- {{name: *a59, bucket: *a59, objective: {{type: paired}}}}".encode(), "pair")
@example(b"&a [*a]", "pair")
@example(b"[" * 20_000, "pair")
@example(b"- {name: a, bucket: x, objective: {type: paired}, rows: 2020-13-45}", "pair")
@example(b"- {name: a, bucket: x, bucket: y, objective: {type: paired}}", "pair")
@example(b"!!python/object/apply:os.system ['true']", "pair")
def test_mixture(tmp_path, content, kind):
    file = tmp_path / "mixture.yaml"
    file.write_bytes(content)
    try:
        sources = read_mixture(str(file), kind)
    except MixtureError as error:
        assert str(file) in str(error) and len(str(error)) < 20_000
        return
    for source in sources:
        assert source.kind == kind and all(isinstance(column, str) for column in source.columns)
        with pytest.raises((FileNotFoundError, ValueError)):
            expand_files(str(tmp_path / "nowhere") + source.files)


@settings(max_examples=EXAMPLES)
@given(st.text() | st.lists(st.sampled_from(["{", "}", "0", "9", "..", ",", "a", "*", "[", "]", "?"])).map("".join))
@example("{0..99999999999}")
@example("{0..9}" * 12)
@example("{a,b}" * 40)
def test_names_of_files(tmp_path, name):
    try:
        assert expand_files(f"{tmp_path}/none/{name}.jsonl")
    except (FileNotFoundError, ValueError) as error:
        assert str(error)


CONFIGS = {
    (name, variant): module.get_config(variant).to_dict()
    for name, module in (("mlm", mlm), ("contrastive", contrastive), ("finetune", finetune))
    for variant in ("paper", "debug")
}


@pytest.mark.parametrize("name", ["mlm", "contrastive", "finetune"])
@settings(max_examples=EXAMPLES)
@given(data=st.data())
def test_settings(name, data):
    values = data.draw(changed(CONFIGS[name, data.draw(st.sampled_from(("paper", "debug")))], most=2))
    if isinstance(values, dict):
        try:
            values = ConfigDict(values).to_dict()
        except Exception:  # ConfigDict refuses these values before nomic_jax reads them
            return
    check_settings(values)


@settings(max_examples=EXAMPLES)
@given(st.sampled_from(sorted(CONFIGS)), st.data())
def test_one_setting(name, data):
    """Replaces one field, at the top level or in a group, with any value."""
    values = json.loads(json.dumps(CONFIGS[name]))
    group = data.draw(st.sampled_from([values, *(value for value in values.values() if isinstance(value, dict))]))
    group[data.draw(st.sampled_from(sorted(group)))] = data.draw(ANYTHING)
    check_settings(values)


def check_settings(values) -> None:
    try:
        config = TrainConfig.from_mapping(values)
        config.check(8)
        config.check_lengths(config.model)
    except ConfigurationError as error:
        assert "config" in str(error)

"""Mixtures and shards of the original implementation are read unchanged."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from nomic_jax.data.formats.paths import expand_braces
from nomic_jax.data.formats.row_checks import BadRow
from nomic_jax.data.mixture import MixtureError, read_mixture
from nomic_jax.data.tokens.pretokenize import pretokenize

MIXTURES = Path(__file__).parent.parent.parent / "configs" / "data"


def test_published_mixtures():
    pairs = read_mixture(str(MIXTURES / "contrastive.yaml"), "pair")
    triplets = read_mixture(str(MIXTURES / "finetune.yaml"), "triplet")
    ablated = read_mixture(str(MIXTURES / "finetune_ablated.yaml"), "triplet")
    assert (len(pairs), len(triplets)) == (29, 10)
    # An epoch has 14,316 steps of 16,384 rows, and 6,612 steps of 256 rows.
    assert sum(source.rows for source in pairs) == 234_553_344 == 14_316 * 16_384
    assert all(source.rows % 16_384 == 0 for source in pairs)
    assert sum(source.rows for source in triplets) == 1_692_672 == 6_612 * 256
    assert set(ablated) == {source for source in triplets if source.name in ("msmarco", "nli", "reddit", "nq")}
    by_name = {source.name: source for source in pairs + triplets}
    assert by_name["reddit_title_body"].columns == ("title", "body")
    assert by_name["reddit_title_body"].rows == 64_978_944
    assert by_name["s2orc_citation_titles"].columns == ("query", "pos")
    assert by_name["paq"].document_prefix == "search_document" and by_name["quora"].document_prefix == "classification"
    assert by_name["medi_wiki"].columns == ("query", "pos", "neg")
    shards = [expand_braces(source.files) for source in pairs]
    assert sum(map(len, shards)) == 2412
    assert shards[1][-1] == "s3://contrastive-index-filtered/paq_full/shard-00538.jsonl.gz"
    # A shard has at most 100,000 rows. If a range of shards were too short, there would be more rows per file.
    for source, files in zip(pairs, shards):
        assert source.rows <= 100_000 * len(files)
    prefixes = {source.name: (source.query_prefix, source.document_prefix) for source in pairs}
    search = {name for name, both in prefixes.items() if both == ("search_query", "search_document")}
    assert search == set(
        ["paq", "gooaq", "yahoo_title_answer", "amazonqa", "yahoo_title_question", "yahoo_qa", "eli5", "squad"]
    )
    symmetric = [both for name, both in prefixes.items() if name not in search]
    assert all(first == second and first in ("clustering", "classification") for first, second in symmetric)


ORIGINAL = """\
datasets:
  - name: "pairs"
    bucket: "{bucket}/shard-{{00000..1}}.jsonl.gz"

    query_prefix: "search_query"
    document_prefix: "search_document"
    objective:
      type: "paired"
      columns: ["query", "pos"]
  # with every field that the original knows
  - name: "stories"
    bucket: "{bucket}/shard-{{00000..00001}}.jsonl.gz"
    query_only: true
    kd_loss: false
    weight: 2
    query_prefix: "Represent this sentence for searching relevant passages"
    objective:
      type: "paired"
      columns: ["query", "pos"]
"""


def write_shards(folder, spread=(70, 45), scheme="", length=len):
    """Writes gzip jsonl with counts and offsets as the original does; non-ASCII text is not escaped."""
    folder.mkdir(parents=True)
    counts, offsets, number = {}, {}, 0
    for i, rows in enumerate(spread):
        name = f"{scheme}bucket/{folder.name}/shard-{i:05d}.jsonl.gz"
        lines, at = [], 0
        offsets[name] = {}
        for row in range(rows):
            content = {
                "query": f"requête {number}",
                "pos": "文書 " * (row % 4) + str(number),
                "metadata": {"objective": {"self": [], "paired": [["query", "pos"]], "triplet": []}},
            }
            lines.append(json.dumps(content, ensure_ascii=False).encode() + b"\n")
            offsets[name][str(row)] = [at, at + length(lines[-1])]
            at += length(lines[-1])
            number += 1
        counts[name] = rows
        (folder / f"shard-{i:05d}.jsonl.gz").write_bytes(gzip.compress(b"".join(lines)))
    (folder / "counts.json").write_text(json.dumps(counts))
    with gzip.open(folder / "offsets.json.gz", "wt") as f:
        json.dump(offsets, f)
    return folder


def read_original(folder):
    path = folder.parent / "mixture.yaml"
    path.write_text(ORIGINAL.format(bucket=folder))
    return read_mixture(str(path), "pair")


@pytest.mark.parametrize("scheme", ["", "s3://"])
def test_the_originals_mixture_and_shards_are_read_unchanged(tmp_path, tokenizer, scheme):
    folder = write_shards(tmp_path / "filtered", scheme=scheme)
    first, second = read_original(folder)
    assert (second.query_prefix, second.document_prefix) == (
        "Represent this sentence for searching relevant passages",
        "",
    )
    store = pretokenize(first, tokenizer, tmp_path / "cache", progress=False)
    assert store.file_rows == [70, 45]
    expected = tokenizer.encode(["search_query: requête 114"])[0]
    np.testing.assert_array_equal(store.columns["query"][114], expected)
    expected = tokenizer.encode(["search_document: " + "文書 " * (44 % 4) + "114"])[0]
    np.testing.assert_array_equal(store.columns["document"][114], expected)


def rewrite(file, change):
    opener = gzip.open if file.suffix == ".gz" else open
    with opener(file, "rt") as f:
        content = json.load(f)
    change(content)
    with opener(file, "wt") as f:
        json.dump(content, f)


def other_count(content):
    content["bucket/filtered/shard-00001.jsonl.gz"] += 1


def as_total(content):
    files = dict(content)
    content.clear()
    content.update(count_per_file=files, total_count=sum(files.values()))


def no_shard(content):
    del content["bucket/filtered/shard-00000.jsonl.gz"]


def shifted(content):
    content["bucket/filtered/shard-00001.jsonl.gz"]["7"][1] += 1


def fewer(content):
    del content["bucket/filtered/shard-00001.jsonl.gz"]["44"]


def hole(content):
    del content["bucket/filtered/shard-00001.jsonl.gz"]["3"]


FAULTS = {
    "another count": ("counts.json", other_count, r"counts 46 rows in .*shard-00001\.jsonl\.gz, which has 45"),
    "a count missing": ("counts.json", no_shard, r"has no count for .*shard-00000\.jsonl\.gz"),
    "wrong offsets": (
        "offsets.json.gz",
        shifted,
        r"places row 7 of .*shard-00001\.jsonl\.gz at the bytes \d+ to",
    ),
    "too few offsets": (
        "offsets.json.gz",
        fewer,
        r"has offsets of 44 rows of .*shard-00001.*, which has more",
    ),
    "offsets with a hole": ("offsets.json.gz", hole, r"not of the form"),
    "no offsets": ("offsets.json.gz", no_shard, r"has no offsets for .*shard-00000\.jsonl\.gz"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_counts_and_offsets_are_named(tmp_path, tokenizer, fault):
    folder = write_shards(tmp_path / "filtered")
    name, change, message = FAULTS[fault]
    rewrite(folder / name, change)
    for policy in ("raise", "skip"):
        with pytest.raises(BadRow, match=message) as error:
            pretokenize(read_original(folder)[0], tokenizer, tmp_path / "cache", on_bad_row=policy, progress=False)
        assert str(folder / name) in str(error.value)


def test_offsets_that_count_characters_are_named(tmp_path, tokenizer):
    """A script writes such offsets if it counts the characters of text that is not escaped."""
    folder = write_shards(tmp_path / "filtered", length=lambda line: len(line.decode()))
    with pytest.raises(BadRow, match=r"places row 0 of .*shard-00000\.jsonl\.gz .*count characters, not bytes"):
        pretokenize(read_original(folder)[0], tokenizer, tmp_path / "cache", progress=False)


def test_counts_with_a_total_will_do(tmp_path, tokenizer):
    folder = write_shards(tmp_path / "filtered")
    rewrite(folder / "counts.json", as_total)
    assert pretokenize(read_original(folder)[0], tokenizer, tmp_path / "cache", progress=False).rows == 115


def test_offsets_are_read_in_parts(tmp_path, tokenizer, monkeypatch):
    folder = write_shards(tmp_path / "filtered", spread=(40, 30, 20))
    monkeypatch.setattr("nomic_jax.data.formats.shard_index.CHARACTERS", 100)
    assert pretokenize(read_original(folder)[0], tokenizer, tmp_path / "cache", progress=False).rows == 70
    (folder / "offsets.json.gz").write_bytes(gzip.compress(b'{"bucket/filtered/shard-00000.jsonl.gz": {"0": [0, 4'))
    with pytest.raises(BadRow, match=r"offsets\.json\.gz: not of the form .*truncated"):
        pretokenize(read_original(folder)[0], tokenizer, tmp_path / "new", progress=False)


def test_rows_say_which_columns_they_have(tmp_path, tokenizer):
    row = {"query": "q", "pos": "d", "neg": ["n"], "metadata": {"objective": {"triplet": [["query", "pos", "neg"]]}}}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")

    def mixture(objective, columns):
        path = tmp_path / "mixture.yaml"
        path.write_text(f"- {{name: a, bucket: rows.jsonl, objective: {{type: {objective}, columns: [{columns}]}}}}")
        return str(path)

    for kind in ("triplet", "pair"):
        (source,) = read_mixture(mixture("triplet", "query, pos, neg"), kind)
        assert pretokenize(source, tokenizer, tmp_path / "cache", progress=False).rows == 1
    (source,) = read_mixture(mixture("paired", "pos, query"), "pair")
    with pytest.raises(BadRow, match=r"rows\.jsonl:1: metadata\.objective names .* needs paired rows"):
        pretokenize(source, tokenizer, tmp_path / "cache", progress=False)


def test_fewer_rows_than_the_mixture_expects(tmp_path, tokenizer):
    (tmp_path / "rows.jsonl").write_text('{"query": "q", "document": "d"}\n' * 3)
    path = tmp_path / "mixture.yaml"
    for rows in (3, 4):
        path.write_text(f"- {{name: a, bucket: rows.jsonl, objective: {{type: paired}}, rows: {rows}}}")
        (source,) = read_mixture(str(path), "pair")
        if rows == 3:
            assert pretokenize(source, tokenizer, tmp_path / "cache", progress=False).rows == 3
            continue
        with pytest.raises(ValueError, match=r"'a' has 3 rows in 1 files, but its mixture expects at least 4; fetch"):
            pretokenize(source, tokenizer, tmp_path / "cache", progress=False)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("kd_loss: true", "kd_loss is for objective {type: triplet}"),
        ("weight: heavy", "weight must be a number"),
        ("weight: -1", "write a positive number"),
        ("rows: 1.5", "rows must be a number"),
        ("in_batch_negatives: false", "pairs have no other negatives"),
    ],
)
def test_fields_that_cannot_work(tmp_path, field, message):
    path = tmp_path / "mixture.yaml"
    path.write_text(f"- {{name: a, bucket: a.jsonl, objective: {{type: paired}}, {field}}}")
    with pytest.raises(MixtureError, match=message) as error:
        read_mixture(str(path), "pair")
    assert str(path) in str(error.value)


def test_broken_yaml_and_names(tmp_path):
    path = tmp_path / "mixture.yaml"
    for text, message in (("datasets: [", "broken YAML"), ("- {name: a/b, bucket: x, objective: {type: self}}", "a/b")):
        path.write_text(text)
        with pytest.raises(MixtureError, match=message):
            read_mixture(str(path), "text")
    path.write_text("- {name: a, bucket: 'hf:me/data?split=train', objective: {type: self}}")
    assert read_mixture(str(path), "text")[0].files == "hf:me/data?split=train"


def test_in_batch_negatives_false_needs_other_negatives(tmp_path):
    path = tmp_path / "mixture.yaml"
    path.write_text("- {name: a, bucket: a.jsonl, objective: {type: triplet}, in_batch_negatives: false}")
    assert not read_mixture(str(path), "triplet")[0].in_batch_negatives

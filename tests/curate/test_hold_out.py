"""Pairs split before training: held-out texts appear in no other split, even if they repeat in the input."""

import json
import random
import unicodedata

import pytest
import yaml

from launch.hold_out import hold_out
from nomic_jax.curate.hold_out import Split
from nomic_jax.data.formats.row_checks import BadRow
from nomic_jax.data.mixture import read_mixture
from nomic_jax.evals.tasks.retrieval import RetrievalTask

SETTINGS = dict(queries=20, documents=30, labelled_share=0.2, most_pairs=None, group=None, seed=0)


def read(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def mixture(tmp_path):
    """Two sources: documents with several queries, queries with several documents, documents that are queries."""
    rng = random.Random(0)
    for name, count in (("a", 400), ("b", 150)):
        rows = [
            {"q": f"{name} query {rng.randrange(count)}", "d": f"{name} document {rng.randrange(count)}", "id": i}
            for i in range(count)
        ]
        rows[5]["q"] = rows[9]["d"]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    objective = {"type": "paired", "columns": ["q", "d"]}
    datasets = [
        {"name": "a", "bucket": "a.jsonl", "objective": objective, "query_prefix": "search_query", "rows": 400}
        | {"document_prefix": "search_document"},
        {"name": "b", "bucket": "b.jsonl", "objective": objective, "query_prefix": "clustering"},
    ]
    (tmp_path / "pairs.yaml").write_text(yaml.safe_dump({"datasets": datasets}), encoding="utf-8")
    return tmp_path / "pairs.yaml"


def test_no_text_is_on_two_sides(mixture, tmp_path):
    summary = hold_out(str(mixture), tmp_path / "out", **SETTINGS)
    for source in read_mixture(str(tmp_path / "out" / "pairs.yaml"), "pair"):
        rows = read(mixture.with_name(f"{source.name}.jsonl"))
        pairs, labelled = (read(tmp_path / "out" / part / f"{source.name}.jsonl") for part in ("pairs", "labelled"))
        task = RetrievalTask.read(tmp_path / "out" / "held_out" / source.name)
        texts = {*task.queries, *task.documents}
        assert len(task.queries) == 20 and len(task.documents) >= 30
        assert texts.isdisjoint(row[side] for row in pairs + labelled for side in "qd")
        assert {row["d"] for row in pairs}.isdisjoint(row["d"] for row in labelled)
        assert all(row in rows for row in pairs + labelled)
        # Only rows that share a text with the task are removed.
        held_documents = set(task.documents)
        held_queries = {row["q"] for row in rows if row["d"] in held_documents}
        held = held_queries | held_documents
        free = [row for row in rows if row["q"] not in held and row["d"] not in held]
        assert sorted(row["id"] for row in pairs + labelled) == [row["id"] for row in free]
        assert summary["pairs"][source.name]["pairs"] == len(pairs) > 0
        # Each query has the same relevant documents as in the input.
        for query, relevant in zip(task.queries, task.relevance, strict=True):
            assert {task.documents[i] for i in relevant} == {row["d"] for row in rows if row["q"] == query} & held


def test_a_held_out_text_in_another_form_is_held_out(mixture, tmp_path):
    """One text composed (NFC), decomposed (NFD) and with a line break at its end is one text and one group."""
    forms = (lambda text: text, lambda text: unicodedata.normalize("NFD", text), lambda text: f"{text}\n")
    rows = [
        {"q": forms[i % 3](f"requête {i // 3}"), "d": forms[i // 2 % 3](f"réponse {i // 6}"), "id": i}
        for i in range(300)
    ]
    mixture.with_name("a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    mixture.write_text(mixture.read_text().replace("rows: 400", "rows: 300"))
    hold_out(str(mixture), tmp_path / "out", **SETTINGS)

    def texts(part):
        return {
            unicodedata.normalize("NFC", row[side]).strip()
            for row in read(tmp_path / "out" / part / "a.jsonl")
            for side in "qd"
        }

    task = RetrievalTask.read(tmp_path / "out" / "held_out" / "a")
    held = {unicodedata.normalize("NFC", text).strip() for text in (*task.queries, *task.documents)}
    assert held and texts("pairs") and texts("labelled")
    assert held.isdisjoint(texts("pairs") | texts("labelled"))
    assert texts("pairs").isdisjoint(texts("labelled"))


def test_a_refused_input_leaves_no_files(mixture, tmp_path):
    """The second source of the mixture is refused: it is too small, or its last row is bad."""
    with pytest.raises(ValueError, match=r"b: its 150 pairs do not exceed what is held out \(100 queries"):
        hold_out(str(mixture), tmp_path / "out", **SETTINGS | {"queries": 100, "documents": 1})
    with mixture.with_name("b.jsonl").open("a") as f:
        f.write('{"q": "a", "d": ""}\n')
    with pytest.raises(BadRow, match=r"b\.jsonl:151: column 'd' holds an empty text"):
        hold_out(str(mixture), tmp_path / "out", **SETTINGS)
    assert not (tmp_path / "out").exists()


def test_prompts_and_prefixes_follow_the_mixture(mixture, tmp_path):
    hold_out(str(mixture), tmp_path / "out", **SETTINGS)
    tasks = [RetrievalTask.read(tmp_path / "out" / "held_out" / name) for name in "ab"]
    assert [(task.query_prompt, task.document_prompt) for task in tasks] == [
        ("search_query", "search_document"),
        ("clustering", "clustering"),
    ]
    sources = read_mixture(str(tmp_path / "out" / "labelled.yaml"), "pair")
    assert [source.query_prefix for source in sources] == ["search_query", "clustering"]
    assert sources[0].rows == 0  # the number of rows of the input no longer applies


def test_a_sample_and_what_is_there_already(mixture, tmp_path):
    first = hold_out(str(mixture), tmp_path / "out", **SETTINGS | {"most_pairs": 100})
    counts = first["pairs"]["a"]
    assert 50 < counts["pairs"] + counts["labelled"] < 130 and counts["rows_found"] == 400
    assert hold_out(str(mixture), tmp_path / "out", **SETTINGS | {"most_pairs": 100}) == first
    with pytest.raises(ValueError, match="use another folder"):
        hold_out(str(mixture), tmp_path / "out", **SETTINGS)


@pytest.mark.parametrize("change", ["row", "columns", "prefix", "other file", "order"])
def test_another_input_is_refused(mixture, tmp_path, change):
    """It once came back with the pairs of the first input, and exit code 0."""
    first = hold_out(str(mixture), tmp_path / "out", **SETTINGS)
    content = yaml.safe_load(mixture.read_text(encoding="utf-8"))
    source, file = content["datasets"][0], tmp_path / "a.jsonl"
    if change == "row":
        file.write_text(file.read_text().replace('"id": 7}', '"id": 8}'))
    elif change == "columns":
        source["objective"]["columns"] = ["d", "q"]
    elif change == "prefix":
        source["query_prefix"] = "clustering"
    elif change == "other file":
        file.with_name("c.jsonl").write_text(file.read_text() + '{"q": "one more", "d": "document"}\n')
        source["bucket"] = "c.jsonl"
    else:
        content["datasets"].reverse()
    mixture.write_text(yaml.safe_dump(content), encoding="utf-8")
    with pytest.raises(ValueError, match=r"with other settings or another input: .* was .*, is .*; use another folder"):
        hold_out(str(mixture), tmp_path / "out", **SETTINGS)
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == json.loads(json.dumps(first))


def test_a_group_is_held_out_as_a_whole():
    """The first sample of 8 rows ends within a group."""
    rows = [{"q": f"q{i}", "d": f"d{i}", "g": f"g{i % 3}"} for i in range(60)]
    held = Split(("q", "d"), "g").hold_out(lambda: rows, 2, 2)
    (group,) = held.groups
    assert sorted(row["q"] for row in held.rows) == sorted(row["q"] for row in rows if row["g"] == group)


def test_too_few_pairs(mixture, tmp_path):
    with pytest.raises(ValueError, match="b: its 150 pairs do not exceed what is held out"):
        hold_out(str(mixture), tmp_path / "out", **SETTINGS | {"queries": 140, "documents": 140})


def test_the_pairs_of_another_hold_out_need_another_seed(mixture, tmp_path):
    """With the same seed, the first has taken away all that the second would."""
    settings = SETTINGS | {"labelled_share": 0.6}
    hold_out(str(mixture), tmp_path / "out", **settings)
    pairs = str(tmp_path / "out" / "pairs.yaml")
    with pytest.raises(ValueError, match=r"a: none of its \d+ pairs falls to finetuning.* give another --seed"):
        hold_out(pairs, tmp_path / "again", **settings)
    assert not (tmp_path / "again").exists()

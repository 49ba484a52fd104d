"""Mined negatives against brute force over all documents."""

import gzip
import json
import pickle
import shutil
import time
from collections import Counter

import numpy as np
import pytest

from nomic_jax.curate.engine import embedding as embed
from nomic_jax.curate.engine.embedding import Encoder
from nomic_jax.curate.engine.text_store import TextFile, TextFileWriter
from nomic_jax.curate.mine.candidates import SearchTask
from nomic_jax.curate.mine.corpus import Pairs
from nomic_jax.curate.mine.negatives import mine_negatives
from nomic_jax.curate.mine.selection import MiningOptions, find_candidates
from nomic_jax.curate.mixtures import mine_mixture
from nomic_jax.data.formats.reading import read_rows
from nomic_jax.data.formats.row_checks import BadRow
from nomic_jax.data.formats.writing import json_line, write_rows
from nomic_jax.data.mixture import read_mixture
from nomic_jax.jobs.tasks import local_engine

OUTPUTS = ("triplets.jsonl", "summary.json", "report.md")


class Killed(Exception):
    pass


class FakeTeacher:
    """Embeds each text with a vector seeded by its characters, so that only equal texts have equal vectors."""

    def __init__(self, die_after_calls: int | None = None):
        self.texts: list[str] = []
        self.calls = 0
        self.die_after_calls = die_after_calls

    def __call__(self, texts: list[str]) -> np.ndarray:
        if self.calls == self.die_after_calls:
            raise Killed
        self.calls += 1
        self.texts += texts
        return np.stack([vector(text) for text in texts])

    def encoder(self, **identity) -> Encoder:
        return Encoder(query=self, document=self, identity={"model": "fake", **identity})


def vector(text: str) -> np.ndarray:
    """Returns a vector [8] of length 1; texts that begin with the same words have similar vectors."""
    words = text.split()
    beginnings = [" ".join(words[:count]) for count in range(1, len(words) + 1)]
    x = sum(np.random.default_rng(list(beginning.encode())).normal(size=8) for beginning in beginnings)
    return (x / np.linalg.norm(x)).astype(np.float32)


def make_rows() -> list[dict]:
    rows = [
        {"id": i, "query": f"topic{i % 4} number{i % 18} query", "document": f"topic{i % 4} number{i % 18} document{i}"}
        for i in range(60)
    ]
    rows[7]["document"] = rows[3]["document"] + " "  # two queries, one document
    rows[11]["document"] = rows[12]["query"] + "\n"  # a document that is a query
    rows[20]["document"] = rows[20]["query"]
    return rows


CORPUS = [{"document": f"topic{i % 4} more{i}"} for i in range(30)] + [{"document": "topic3 number3 document3\t"}]


@pytest.fixture
def files(tmp_path):
    write_rows(tmp_path / "pairs.jsonl", make_rows())
    write_rows(tmp_path / "corpus.jsonl", CORPUS)
    return str(tmp_path / "pairs.jsonl")


def mine(files, output, teacher=None, corpus=None, identity=None, **options):
    encoder = (teacher or FakeTeacher()).encoder(**identity or {})
    summary = mine_negatives(files, output, encoder, MiningOptions(**options), corpus=corpus, progress=False)
    return summary, read(output / "triplets.jsonl")


def read(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def brute_force(rows, corpus=(), k=20, margin=0.95, range_min=0, range_max=None) -> list[list[str]]:
    """Returns the stripped negatives of every row, by the rules in the docstring of ``MiningOptions``."""
    documents = list(dict.fromkeys(row["document"].strip() for row in [*rows, *corpus]))
    vectors = {text: vector(text).astype(np.float64) for text in {*documents, *(row["query"] for row in rows)}}
    result = []
    for row in rows:
        score = {text: float(vectors[row["query"]] @ vectors[text]) for text in documents}
        positives = {other["document"].strip() for other in rows if other["query"] == row["query"]}
        near = [text for text in documents if text not in positives | {row["query"].strip()}]
        ranked = sorted(near, key=lambda text: -score[text])[:k][range_min:range_max]
        lowest = min(score[text] for text in positives)
        limit = np.inf if not margin else lowest * margin if lowest > 0 else lowest * (2 - margin)
        result.append([text for text in ranked if score[text] < limit])
    return result


@pytest.mark.parametrize(
    "options",
    [{}, {"margin": 0}, {"margin": 0.5}, {"k": 8}, {"margin": 0, "range_min": 2, "range_max": 9}, {"k": 1000}],
)
@pytest.mark.parametrize("with_corpus", [False, True])
def test_negatives_are_brute_force(files, tmp_path, options, with_corpus):
    corpus = str(tmp_path / "corpus.jsonl") if with_corpus else None
    summary, triplets = mine(files, tmp_path / "out", corpus=corpus, num_negatives=1, **options)
    rows = make_rows()
    expected = brute_force(rows, CORPUS if with_corpus else (), **options)
    kept = [(row, negatives) for row, negatives in zip(rows, expected) if negatives]
    assert len(kept) > 5
    assert [triplet["id"] for triplet in triplets] == [row["id"] for row, _ in kept]
    for triplet, (row, negatives) in zip(triplets, kept):
        assert [text.strip() for text in triplet["negatives"]] == negatives
        assert {name: triplet[name] for name in row} == row
        scores = [vector(row["query"]) @ vector(text) for text in [row["document"].strip(), *negatives]]
        np.testing.assert_allclose([triplet["document_score"], *triplet["negative_scores"]], scores, atol=2e-6)
    assert (summary["rows"], summary["written"], summary["dropped_too_few"]) == (60, len(kept), 60 - len(kept))


@pytest.mark.parametrize("too_few", ["drop", "random"])
@pytest.mark.parametrize("mined", [True, False])
def test_a_negative_is_never_a_positive_nor_the_query(files, tmp_path, too_few, mined):
    encoder = FakeTeacher().encoder() if mined else None
    options = MiningOptions(k=25, margin=0, too_few=too_few)
    mine_negatives(files, tmp_path / "out", encoder, options, progress=False)
    rows = make_rows()
    for triplet in read(tmp_path / "out" / "triplets.jsonl"):
        positives = {row["document"].strip() for row in rows if row["query"] == triplet["query"]}
        negatives = [text.strip() for text in triplet["negatives"]]
        assert not positives & set(negatives)
        assert triplet["query"].strip() not in negatives
        assert len(set(negatives)) == len(negatives) >= 7


def test_where_the_positive_scores_below_zero_negatives_score_below_it(tmp_path):
    vectors = {"q": (1, 0), "positive": (-0.6, 0.8), "near": (-0.59, -0.8), "far": (-0.8, 0.6)}

    def encode(texts):
        x = np.array([vectors[text] for text in texts], np.float32)
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    write_rows(tmp_path / "pairs.jsonl", [{"query": "q", "document": "positive"}])
    write_rows(tmp_path / "corpus.jsonl", [{"text": "near"}, {"text": "far"}])
    mine_negatives(
        str(tmp_path / "pairs.jsonl"),
        tmp_path / "out",
        Encoder(query=encode, document=encode, identity={}),
        MiningOptions(num_negatives=1),
        corpus=str(tmp_path / "corpus.jsonl"),
        corpus_column="text",
        progress=False,
    )
    assert read(tmp_path / "out" / "triplets.jsonl")[0]["negatives"] == ["far"]


def test_too_few_is_a_choice(files, tmp_path):
    expected = brute_force(make_rows(), margin=0.5)
    short = [i for i, negatives in enumerate(expected) if len(negatives) < 7]
    assert 0 < len(short) < 60
    summary, triplets = mine(files, tmp_path / "drop", margin=0.5, too_few="drop")
    assert [triplet["id"] for triplet in triplets] == [i for i in range(60) if i not in short]
    assert summary["dropped_too_few"] == len(short)
    sizes = Counter(len(triplet["negatives"]) for triplet in triplets)
    assert len(sizes) > 1
    assert summary["negatives"] == [{"negatives": size, "rows": sizes[size]} for size in sorted(sizes)]

    summary, triplets = mine(files, tmp_path / "random", margin=0.5, too_few="random")
    assert summary["filled_with_random"] == len(short)
    assert [triplet["id"] for triplet in triplets] == list(range(60))
    unfiltered = brute_force(make_rows(), margin=0)
    for triplet in triplets:
        texts, mined = [text.strip() for text in triplet["negatives"]], expected[triplet["id"]]
        assert texts[: len(mined)] == mined
        assert len(texts) == max(7, len(mined)) == len(triplet["negative_scores"])
        # Candidates that the margin removed are not sampled as random negatives.
        assert not set(texts[len(mined) :]) & set(unfiltered[triplet["id"]])

    with pytest.raises(
        ValueError, match=rf"row {short[0]} \(query 'topic.*has {len(expected[short[0]])} negatives of the 7"
    ):
        mine(files, tmp_path / "error", margin=0.5, too_few="error")
    assert not (tmp_path / "error" / "triplets.jsonl").exists()
    with pytest.raises(ValueError, match=r"no more among the 5[0-9] distinct documents"):
        mine(files, tmp_path / "none", k=60, range_max=7, margin=0.5, too_few="random")


def test_random_documents_that_are_not_enough(tmp_path):
    """Of 14 documents, one is the positive and 8 are near; 5 of the others are left where 8 are wanted."""
    rows = [{"query": f"one topic {i}", "document": f"one topic {i} document"} for i in range(14)]
    write_rows(tmp_path / "pairs.jsonl", rows)
    with pytest.raises(ValueError, match=r"row 0 .* has 5 negatives of the 8 .* no more among the 14 distinct"):
        mine(str(tmp_path / "pairs.jsonl"), tmp_path / "out", k=8, num_negatives=8, margin=0.01, too_few="random")


def test_random_negatives_depend_on_seed_and_row(files, tmp_path):
    def run(name, **options):
        mine_negatives(files, tmp_path / name, None, MiningOptions(k=10, **options), progress=False)
        return (tmp_path / name / "triplets.jsonl").read_bytes()

    assert run("a") == run("b") != run("c", seed=1)
    triplets = read(tmp_path / "a" / "triplets.jsonl")
    assert {len(triplet["negatives"]) for triplet in triplets} == {10}
    assert len({tuple(triplet["negatives"]) for triplet in triplets}) == 60
    assert "negative_scores" not in triplets[0]


def test_a_killed_run_continues_and_ends_in_the_same_bytes(files, tmp_path, monkeypatch):
    monkeypatch.setattr(embed, "TEXTS_PER_FILE", 15)
    corpus = str(tmp_path / "corpus.jsonl")
    whole = FakeTeacher()
    mine(files, tmp_path / "whole", whole, corpus)
    for calls in range(whole.calls):
        killed, restarted = FakeTeacher(die_after_calls=calls), FakeTeacher()
        output = tmp_path / f"killed{calls}"
        with pytest.raises(Killed):
            mine(files, output, killed, corpus)
        assert not any((output / name).exists() for name in OUTPUTS)
        mine(files, output, restarted, corpus)
        assert killed.texts + restarted.texts == whole.texts
        for name in OUTPUTS:
            assert (output / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_other_options_embed_nothing(files, tmp_path):
    mine(files, tmp_path / "out")
    again = FakeTeacher()
    _, triplets = mine(files, tmp_path / "out", again, k=15, margin=0.8, range_min=1, seed=3)
    _, fresh = mine(files, tmp_path / "fresh", k=15, margin=0.8, range_min=1, seed=3)
    assert again.calls == 0
    assert triplets == fresh


def test_a_restart_under_other_settings_is_refused(files, tmp_path):
    mine(files, tmp_path / "out")
    with pytest.raises(ValueError, match="query_prompt was absent, is 'search: '"):
        mine(files, tmp_path / "out", identity={"query_prompt": "search: "})
    with pytest.raises(ValueError, match=r"corpus .*corpus\.jsonl was absent.*Give another --output"):
        mine(files, tmp_path / "out", corpus=str(tmp_path / "corpus.jsonl"))
    write_rows(files, make_rows()[::-1])
    with pytest.raises(ValueError, match=r"input .*pairs\.jsonl was"):
        mine(files, tmp_path / "out")


@pytest.mark.parametrize("change", [1, -1])
def test_a_file_that_changes_meanwhile_is_named(files, tmp_path, change):
    def engine(task, encoder, wait):
        write_rows(files, (make_rows() * 2)[: 60 + change])
        local_engine(task, encoder, wait)

    with pytest.raises(ValueError, match=rf"pairs\.jsonl: {60 + change} pairs where 60 were read before"):
        mine_negatives(files, tmp_path / "out", FakeTeacher().encoder(), MiningOptions(), engine=engine, progress=False)
    assert not (tmp_path / "out" / "triplets.jsonl").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"range_max": 21}, "range_max 21 must be a range of ranks below k, 20"),
        ({"range_min": 5, "range_max": 5}, "range_min 5"),
        ({"k": 6}, "num_negatives is 7; at most 6"),
        ({"margin": 95.0}, r"margin is 95\.0"),
        ({"too_few": "fill"}, "too_few is 'fill'"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MiningOptions(**options)


def test_options_at_their_limits():
    MiningOptions(k=1, num_negatives=1), MiningOptions(k=7, margin=1), MiningOptions(k=8, range_min=1, range_max=8)
    for options in ({"num_negatives": 0}, {"range_min": -1}, {"margin": -0.1}, {"margin": 1.1}, {"k": 0}):
        with pytest.raises(ValueError, match=r"num_negatives|range|margin"):
            MiningOptions(**options)


def test_a_list_of_positives_is_as_many_triplets(tmp_path):
    rows = make_rows()
    listed = {}
    for row in rows:
        listed.setdefault(row["query"], {"query": row["query"], "document": []})["document"].append(row["document"])
    write_rows(tmp_path / "lists.jsonl", list(listed.values()))
    summary, triplets = mine(str(tmp_path / "lists.jsonl"), tmp_path / "out", num_negatives=1)
    flat = [{"query": query, "document": text} for query, row in listed.items() for text in row["document"]]
    expected = [(row, negatives) for row, negatives in zip(flat, brute_force(flat)) if negatives]
    assert [(t["query"], t["document"]) for t in triplets] == [(row["query"], row["document"]) for row, _ in expected]
    assert [[text.strip() for text in t["negatives"]] for t in triplets] == [negatives for _, negatives in expected]
    assert (summary["rows"], summary["pairs"]) == (len(listed), 60)


def test_a_first_row_of_null_does_not_decide_what_the_rows_hold(tmp_path):
    file = tmp_path / "lists.jsonl"
    rows = [{"query": f"topic{i} q", "document": [f"topic{i} d{i}"]} for i in range(12)]
    write_rows(file, [{"query": "q", "document": None}, *rows])
    with pytest.raises(BadRow, match=r"lists\.jsonl:1: column 'document' should be a list of texts, found NoneType"):
        mine(str(file), tmp_path / "out", num_negatives=1, margin=0)
    output = tmp_path / "skipped"
    options = MiningOptions(num_negatives=1, margin=0)
    summary = mine_negatives(str(file), output, FakeTeacher().encoder(), options, on_bad_row="skip", progress=False)
    assert (summary["rows"], summary["rejected"], summary["written"]) == (12, 1, 12)


def test_a_row_without_positives_is_a_bad_row(tmp_path):
    file = tmp_path / "lists.jsonl"
    write_rows(file, [{"query": f"topic{i} q", "document": [f"topic{i} d{i}"] if i != 3 else []} for i in range(12)])
    with pytest.raises(BadRow, match=r"lists\.jsonl:4: column 'document' is an empty list"):
        mine(str(file), tmp_path / "out", num_negatives=1, margin=0)
    output = tmp_path / "skipped"
    options = MiningOptions(num_negatives=1, margin=0)
    summary = mine_negatives(str(file), output, FakeTeacher().encoder(), options, on_bad_row="skip", progress=False)
    assert (summary["rows"], summary["rejected"], summary["written"]) == (11, 1, 11)
    assert len(read(output / "rejected.jsonl")) == 1
    file.write_text('{"query": "q", "document": ["d"]}\n{"query": "q", "document": 5}\n')
    with pytest.raises(BadRow, match=r"lists\.jsonl:2: column 'document' should be a list of texts, found int"):
        mine(str(file), tmp_path / "mixed")


@pytest.mark.parametrize("seed", range(4))
def test_adversarial_rows_are_brute_force(tmp_path, seed, monkeypatch):
    """Texts repeat in queries, documents and corpus, with surrounding whitespace; queries have several positives."""
    monkeypatch.setattr(embed, "TEXTS_PER_FILE", 7 if seed % 2 else 2048)
    rng = np.random.default_rng(seed)
    texts = [f"topic{i % 5} word{i % 11} text{i}" for i in range(40)]

    def drawn() -> str:
        return " " * int(rng.integers(2)) + texts[rng.integers(len(texts))] + "\t" * int(rng.integers(2))

    rows = [{"id": i, "query": drawn().strip(), "document": drawn()} for i in range(90)]
    corpus = [{"document": drawn()} for _ in range(30)] + [{"document": f"topic{i % 5} more{i}"} for i in range(30)]
    write_rows(tmp_path / "pairs.jsonl", rows)
    write_rows(tmp_path / "corpus.jsonl", corpus)
    options = {"k": int(rng.integers(4, 40)), "margin": float(rng.choice([0, 0.9, 0.99]))}
    options["range_min"] = int(rng.integers(0, 3))
    _, triplets = mine(
        str(tmp_path / "pairs.jsonl"),
        tmp_path / "out",
        corpus=str(tmp_path / "corpus.jsonl"),
        num_negatives=1,
        **options,
    )
    found = {triplet["id"]: [text.strip() for text in triplet["negatives"]] for triplet in triplets}
    assert found == {i: negatives for i, negatives in enumerate(brute_force(rows, corpus, **options)) if negatives}
    assert len(found) > (0 if options["margin"] else 50)


@pytest.mark.parametrize(("per_file", "at_once"), [(7, 13), (13, 7), (4096, 1)])
def test_candidates_do_not_depend_on_the_sizes_of_batches(files, tmp_path, per_file, at_once):
    mine(files, tmp_path / "out", corpus=str(tmp_path / "corpus.jsonl"))
    work, rows = tmp_path / "out" / "work", make_rows()
    pairs = Pairs(work / "pairs")
    shutil.rmtree(work / "candidates-20-exact")
    search = SearchTask(pairs, work, 20, None, False, per_file)
    local_engine(search, None, True)
    assert [candidates.number for candidates in find_candidates(pairs, None, at_once)] == list(range(60))
    documents = list(dict.fromkeys(row["document"].strip() for row in [*rows, *CORPUS]))
    vectors = np.stack([vector(text) for text in documents])
    for number, (row, candidates) in enumerate(zip(rows, find_candidates(pairs, search, at_once), strict=True)):
        score_N = vectors @ vector(row["query"])
        positives = {documents.index(other["document"].strip()) for other in rows if other["query"] == row["query"]}
        excluded = positives | {documents.index(row["query"]) if row["query"] in documents else -1}
        near = [x for x in np.argsort(-score_N).tolist() if x not in excluded][:20]
        assert candidates.number == number
        assert [document for document, _ in candidates.near] == near
        found = [score for _, score in candidates.near] + [candidates.score, candidates.lowest]
        expected = [*score_N[near], score_N[documents.index(row["document"].strip())], min(score_N[list(positives)])]
        np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("too_few", ["drop", "random"])
def test_queries_of_many_rows_take_no_longer(tmp_path, too_few):
    """Labels as queries: each of three has 4,000 rows. The time once grew with the square: 17 s for half as many."""
    table = np.random.default_rng(0).normal(size=(12_300, 4)).astype(np.float32)
    table /= np.linalg.norm(table, axis=1, keepdims=True)
    encode = Encoder(*[lambda texts: table[[int(text) for text in texts]]] * 2, identity={"model": "table"})
    rows = [{"query": str(12_000 + i % 3), "document": str(i)} for i in range(12_000)]
    write_rows(tmp_path / "rows.jsonl", rows)
    write_rows(tmp_path / "corpus.jsonl", [{"document": str(i)} for i in range(12_003, 12_300)])
    # With several thousand positives, one of them scores so low that no document is far enough below it.
    options = MiningOptions(k=12, margin=0.95 if too_few == "random" else 0, num_negatives=9, too_few=too_few)
    began = time.process_time()
    files, corpus = str(tmp_path / "rows.jsonl"), str(tmp_path / "corpus.jsonl")
    mine_negatives(files, tmp_path / "out", encode, options, corpus=corpus, progress=False)
    assert time.process_time() - began < 8
    triplets = read(tmp_path / "out" / "triplets.jsonl")
    assert len(triplets) == 12_000
    documents = np.array([*range(12_000), *range(12_003, 12_300)])
    for label in range(3):
        nearest = documents[np.argsort(-(table[documents] @ table[12_000 + label]))].tolist()
        expected = [str(x) for x in nearest if x >= 12_000 or x % 3 != label][: 0 if too_few == "random" else 12]
        for triplet in triplets[label::3]:
            negatives = triplet["negatives"]
            assert negatives[: len(expected)] == expected and len(set(negatives)) == len(negatives)
            assert not any(int(x) < 12_000 and int(x) % 3 == label for x in negatives)
    filled = {tuple(triplet["negatives"]) for triplet in triplets[::3]}
    assert (len(filled) > 1000) == (too_few == "random")


@pytest.mark.parametrize("others", [0, 3, 5, 40])
def test_random_negatives_are_all_equally_likely(tmp_path, others):
    """Of 50 documents, a query's own 50 - others are excluded; all of the others are drawn if there are only 5."""
    rows = [{"query": f"q{i}", "document": f"d{i}"} for i in range(others)]
    rows += [{"query": "label", "document": f"d{i}"} for i in range(others, 50)]
    write_rows(tmp_path / "rows.jsonl", rows * 8)
    options = MiningOptions(k=5, num_negatives=1)
    mine_negatives(str(tmp_path / "rows.jsonl"), tmp_path / "out", None, options, progress=False)
    triplets = [triplet for triplet in read(tmp_path / "out" / "triplets.jsonl") if triplet["query"] == "label"]
    assert len(triplets) == (8 * (50 - others) if others else 0)
    counts = dict.fromkeys((f"d{i}" for i in range(others)), 0)
    for triplet in triplets:
        assert len(set(triplet["negatives"])) == len(triplet["negatives"]) == min(5, others)
        for text in triplet["negatives"]:
            counts[text] += 1
    expected = len(triplets) * min(5, others) / max(others, 1)
    assert all(abs(count - expected) <= 4.5 * expected**0.5 for count in counts.values())


def test_approximate_search_reports_its_recall_and_keeps_the_rules(files, tmp_path):
    summary, triplets = mine(files, tmp_path / "out", approximate_above=10, num_negatives=1, margin=0)
    assert 0.95 <= summary["search"]["recall"] <= 1
    assert "search was approximate" in (tmp_path / "out" / "report.md").read_text()
    rows = make_rows()
    for triplet in triplets:
        negatives = {text.strip() for text in triplet["negatives"]}
        positives = {row["document"].strip() for row in rows if row["query"] == triplet["query"]}
        assert negatives and not negatives & (positives | {triplet["query"].strip()})
    exact, _ = mine(files, tmp_path / "exact", approximate_above=1000, num_negatives=1, margin=0)
    assert exact["search"] == "exact"


def test_a_mixture_is_mined_by_source_and_feeds_the_finetune_stage(tmp_path):
    rows = make_rows()
    write_rows(tmp_path / "a.jsonl", rows[:30])
    write_rows(tmp_path / "b.jsonl", [{"title": row["query"], "body": row["document"]} for row in rows[30:]])
    (tmp_path / "mixture.yaml").write_text(
        """
datasets:
  - {name: a, bucket: a.jsonl, objective: {type: paired}, query_prefix: search_query, document_prefix: search_document}
  - {name: b, bucket: b.jsonl, objective: {type: paired, columns: [title, body]}, query_prefix: clustering}
"""
    )
    options = MiningOptions(num_negatives=2, margin=0)
    mixture = str(tmp_path / "mixture.yaml")
    summary = mine_mixture(mixture, tmp_path / "out", FakeTeacher().encoder(), options, progress=False)
    sources = read_mixture(str(tmp_path / "out" / "mixture.yaml"), "triplet")
    assert [source.columns for source in sources] == [
        ("query", "document", "negatives"),
        ("title", "body", "negatives"),
    ]
    b = {row["document"].strip() for row in rows[30:]}
    assert all(
        text.strip() in b
        for triplet in read(tmp_path / "out" / "b" / "triplets.jsonl")
        for text in triplet["negatives"]
    )
    for source, mined in zip(sources, summary["sources"]):
        rows_of_source = list(read_rows(source.files, dict(zip(source.columns, (str, str, list)))))
        assert len(rows_of_source) == mined["written"] > 0
        assert all(len(row["negatives"]) >= 2 for row in rows_of_source)


def test_files_that_cannot_be_read_are_set_aside(files, tmp_path):
    """Row and corpus files are unreadable. After a repair, an error says what to delete; old results are not used."""
    shards = tmp_path / "shards"
    shards.mkdir()
    whole = gzip.compress(b"".join(json_line(row | {"query": f"another {row['query']}"}) for row in make_rows()))
    write_rows(shards / "0.jsonl", make_rows())
    (shards / "1.jsonl.gz").write_bytes(whole[:-9])
    (tmp_path / "corpus.parquet").mkdir()
    corpus = f"{tmp_path}/{{corpus.jsonl,corpus.parquet}}"
    output, options = tmp_path / "out", MiningOptions(num_negatives=1)

    def mine_skipping():
        encoder = FakeTeacher().encoder()
        return mine_negatives(str(shards), output, encoder, options, corpus=corpus, on_bad_row="skip", progress=False)

    summary = mine_skipping()
    expected, _ = mine(files, tmp_path / "expected", corpus=str(tmp_path / "corpus.jsonl"), num_negatives=1)
    assert (output / "triplets.jsonl").read_bytes() == (tmp_path / "expected" / "triplets.jsonl").read_bytes()
    cut, folder = summary["quarantined"]
    assert cut["file"] == f"{shards}/1.jsonl.gz" and "breaks off after line" in cut["reason"]
    assert folder == {
        "file": f"{tmp_path}/corpus.parquet",
        "reason": f"{tmp_path}/corpus.parquet: cannot be read (Is a directory); write or fetch it again",
        "rows_at_least": 0,
    }
    assert summary["rejected"] == 2 == len(read(output / "rejected.jsonl"))
    assert summary["written"] == expected["written"] and cut["file"] in (output / "report.md").read_text()
    (shards / "1.jsonl.gz").write_bytes(whole)
    with pytest.raises(ValueError, match=r"1\.jsonl\.gz was .* \(it was set aside, as it could not be read\).* delete"):
        mine_skipping()
    shutil.rmtree(output / "work")
    assert mine_skipping()["rows"] == 120


def test_rows_that_declare_their_columns_declare_triplets(files, tmp_path):
    declared = {"id": "x", "objective": {"self": [], "paired": [["query", "document"]], "triplet": []}}
    write_rows(tmp_path / "declared.jsonl", [row | {"metadata": declared} for row in make_rows()])
    _, triplets = mine(str(tmp_path / "declared.jsonl"), tmp_path / "out", num_negatives=1)
    objective = {"self": [], "paired": [["query", "document"]], "triplet": [["query", "document", "negatives"]]}
    assert triplets and all(triplet["metadata"] == {"id": "x", "objective": objective} for triplet in triplets)


def test_texts_come_back_from_their_file(tmp_path):
    texts = ["ein", "zwei ", "drei\nvier", "日本語", "zwei", "𝒳" * 1000, " ein"]
    writer = TextFileWriter(tmp_path / "texts.txt")
    assert [writer.add(text) for text in texts] == [0, 1, 2, 3, 1, 4, 0]
    writer.close()
    stored = pickle.loads(pickle.dumps(TextFile(tmp_path / "texts.txt")))
    assert [stored[i] for i in range(len(stored))] == [texts[i] for i in (0, 1, 2, 3, 5)]


@pytest.mark.parametrize("positives", [25, 40])
def test_a_query_with_more_positives_than_k_has_its_negatives(tmp_path, positives):
    """All k nearest documents of such a query may be its positives."""
    many = [{"query": "topic1 query", "document": f"topic1 answer{i} query"} for i in range(positives)]
    others = [{"query": f"topic{i % 4} q{i}", "document": f"topic{i % 4} text{i}"} for i in range(30)]
    rows = many + others
    write_rows(tmp_path / "pairs.jsonl", rows)
    summary, triplets = mine(str(tmp_path / "pairs.jsonl"), tmp_path / "out", k=20, margin=0, num_negatives=7)
    assert summary["written"] == len(rows)
    for triplet, negatives in zip(triplets, brute_force(rows, k=20, margin=0), strict=True):
        assert triplet["negatives"] == negatives and len(negatives) == 20


def test_dropped_rows_say_why(files, tmp_path):
    write_rows(tmp_path / "few.jsonl", [{"query": "a", "document": f"topic1 b{i}"} for i in range(3)])
    for name, given, why in (("margin", files, "dropped_by_margin"), ("few", "few", "dropped_for_want_of_documents")):
        given = given if given == files else str(tmp_path / "few.jsonl")
        summary, triplets = mine(given, tmp_path / name, margin=0.5)
        assert summary["dropped_too_few"] == summary["rows"] - len(triplets) > 0
        assert summary[why] == summary["dropped_too_few"]
    report = (tmp_path / "few" / "report.md").read_text(encoding="utf-8")
    assert "| 0 | a | topic1 b0 | 0 | too few other documents |" in report
    assert "scores too near the positive's (margin)" in (tmp_path / "margin" / "report.md").read_text(encoding="utf-8")

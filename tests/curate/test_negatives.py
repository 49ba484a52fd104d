"""Mined negatives against brute force over all documents."""

import json

import numpy as np
import pytest

from nomic_jax.curate import embed
from nomic_jax.curate.embed import Encoder
from nomic_jax.curate.negatives import MiningOptions, mine_negatives
from nomic_jax.data.sources import write_rows

OUTPUTS = ("triplets.jsonl", "summary.json", "report.md")


class Killed(Exception):
    pass


class FakeTeacher:
    """A text's vector is drawn from its own characters, so equal texts agree and nothing else does."""

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
    """Texts that begin with the same words lie near each other."""
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
    """The negatives of every row, stripped, by the words of the docstring."""
    documents = list(dict.fromkeys(row["document"].strip() for row in [*rows, *corpus]))
    vectors = {text: vector(text).astype(np.float64) for text in {*documents, *(row["query"] for row in rows)}}
    result = []
    for row in rows:
        score = {text: float(vectors[row["query"]] @ vectors[text]) for text in documents}
        near = sorted(documents, key=lambda text: -score[text])[:k]
        positives = {other["document"].strip() for other in rows if other["query"] == row["query"]}
        ranked = [text for text in near if text not in positives | {row["query"].strip()}][range_min:range_max]
        best = max(score[text] for text in positives)
        limit = np.inf if not margin else best * margin if best > 0 else best
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
    assert len(kept) > 10
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

    summary, triplets = mine(files, tmp_path / "random", margin=0.5, too_few="random")
    assert summary["filled_with_random"] == len(short)
    assert [triplet["id"] for triplet in triplets] == list(range(60))
    unfiltered = brute_force(make_rows(), margin=0)
    for triplet in triplets:
        texts, mined = [text.strip() for text in triplet["negatives"]], expected[triplet["id"]]
        assert texts[: len(mined)] == mined
        assert len(texts) == max(7, len(mined)) == len(triplet["negative_scores"])
        # What the margin took out does not come back by chance.
        assert not set(texts[len(mined) :]) & set(unfiltered[triplet["id"]])

    with pytest.raises(
        ValueError, match=rf"row {short[0]} \(query 'topic.*has {len(expected[short[0]])} negatives of the 7"
    ):
        mine(files, tmp_path / "error", margin=0.5, too_few="error")
    assert not (tmp_path / "error" / "triplets.jsonl").exists()
    with pytest.raises(ValueError, match=r"no more among the 5[0-9] distinct documents"):
        mine(files, tmp_path / "none", k=60, range_max=7, margin=0.5, too_few="random")


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

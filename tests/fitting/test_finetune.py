"""``launch.finetune``: no text is on both sides, the export is what was scored, and odd data are explained."""

import csv
import json

import numpy as np
import pytest

from nomic_jax import Embedder
from nomic_jax.data.formats.row_checks import BadRow
from nomic_jax.evals.suites.side_by_side import rank
from nomic_jax.evals.tasks.retrieval import RetrievalTask
from nomic_jax.files.reading import FileRefused
from nomic_jax.fitting.amounts import held_out_queries
from nomic_jax.fitting.finetune import finetune
from nomic_jax.fitting.own_pairs import OwnPairs
from nomic_jax.fitting.rows import DataError
from tests.commands import run
from tests.corpus import pairs_of_words, write_teacher


def write_csv(file, rows, header=("question", "answer")):
    with file.open("w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows([header, *rows])
    return file


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = tmp_path_factory.mktemp("base")
    write_teacher(directory)
    return directory


@pytest.fixture(scope="module")
def faq(tmp_path_factory):
    """Pairs with an empty cell, repeated rows, answers to two questions, and a question that has two answers."""
    pairs = [(row["query"], row["document"]) for row in pairs_of_words(80)]
    pairs += [(f"{query} again", document) for query, document in pairs[:40]]
    pairs += [("", "an answer without a question"), pairs[3], pairs[3], (pairs[5][0], pairs[6][1])]
    return write_csv(tmp_path_factory.mktemp("data") / "faq.csv", pairs)


FLAGS = dict(held_out=15, batch_size=8, epochs=0.2, seed=1)


@pytest.fixture(scope="module")
def done(base, faq, tmp_path_factory):
    output = tmp_path_factory.mktemp("out") / "model"
    flags = [f"--{name}={value}" for name, value in FLAGS.items()]
    return output, run("launch.finetune", faq, f"--base={base}", f"--output={output}", *flags)


def test_a_held_out_text_is_not_trained_on(done, faq):
    output, command = done
    assert command.returncode == 0, command.stderr
    task = RetrievalTask.read(output / "training" / "held_out")
    rows = [json.loads(line) for line in (output / "training" / "train.jsonl").read_text().splitlines()]
    trained = {text for row in rows for text in row.values()}
    right = {task.documents[i] for relevant in task.relevance for i in relevant}
    assert len(task.queries) == 15 and right and trained.isdisjoint({*task.queries, *right})
    assert len({tuple(row.values()) for row in rows}) == len(rows) > 70  # each pair once
    assert {row["answer"] for row in rows} == set(task.documents) - right  # the search is among these too
    assert "with an empty cell" in command.stdout


def test_the_export_is_the_model_that_was_scored(done, base, faq, capsys):
    output, command = done
    embedder = Embedder.from_pretrained(output)
    task = RetrievalTask.read(output / "training" / "held_out")
    after_QK = np.load(output / "training" / "after.npy")
    # Near ties may fall the other way in another process.
    assert (rank(task, embedder) == after_QK).mean() > 0.97
    before = Embedder.from_pretrained(base)
    assert (rank(task, before) == np.load(output / "training" / "before.npy")).mean() > 0.97
    texts = list(task.queries)
    vectors = embedder.encode_query(texts)
    assert np.abs(vectors - Embedder.from_pretrained(output / "training" / "run").encode_query(texts)).max() < 1e-5
    assert np.abs(vectors - before.encode_query(texts)).max() > 1e-4
    assert embedder.prompts["query"] == "search_query: " and embedder.max_length == before.max_length
    card = (output / "README.md").read_text(encoding="utf-8")
    assert f"{dict(task.score(after_QK))['ndcg@10']:.4f}" in card
    report = (output / "report.md").read_text(encoding="utf-8")
    verdict = next(line for line in command.stdout.splitlines() if "95% interval" in line and "nDCG@10 went" in line)
    assert report.splitlines()[2] == verdict and "BM25" in report
    assert "What to try" in report.splitlines()[4]  # four steps do not make a random model better
    assert (output / "report.html").stat().st_size > 2000
    again = finetune(str(faq), str(base), output, **FLAGS)
    assert again.verdict == verdict and "is complete" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"other data or settings: epochs was 0\.2, is 0\.3\. Give another --output"):
        finetune(str(faq), str(base), output, **FLAGS | {"epochs": 0.3})


PAIRS = [(row["query"], row["document"]) for row in pairs_of_words(30)]
ODD = {
    "five rows": (
        PAIRS[:5],
        {},
        "has 5 different pairs with a text in 'question' and 'answer'; at least 20 are needed",
    ),
    "one answer": (
        [(q, "yes") for q, _ in PAIRS],
        {},
        "'answer', the document, has only 1 different texts in 30 pairs",
    ),
    "repeated rows": (PAIRS[:4] * 20, {}, "has 4 different pairs"),
    "empty cells": ([(q, " ") for q, _ in PAIRS], {}, "has 0 different pairs"),
    "no rows": ([], {}, "has no rows"),
    "no such column": (
        PAIRS,
        {"columns": ("question", "reply")},
        "no column 'reply'; its columns are 'question', 'ans",
    ),
    "too much held out": (PAIRS, {"held_out": 25}, "only 5 pairs are left to train on beside the 25"),
}


@pytest.mark.parametrize("name", ODD)
def test_data_that_are_too_few_are_explained(tmp_path, base, name):
    rows, options, message = ODD[name]
    file = write_csv(tmp_path / "faq.csv", rows)
    with pytest.raises(DataError, match=rf"faq\.csv: .*{message}"):
        finetune(str(file), str(base), tmp_path / "out", **options)


def test_files_that_cannot_be_used_are_named(tmp_path, base):
    file = write_csv(tmp_path / "a.csv", [(1, *pair) for pair in PAIRS], ("id", "a", "b"))
    found = OwnPairs.find(str(file), ("a", "b"))
    assert found.columns == ("a", "b") and found.summarize()[:6] == (30, 0, 0, 30, 30, 30)
    unclear = tmp_path / "unclear.jsonl"
    unclear.write_text('{"id": 1, "a": "x", "b": "y"}\n')
    with pytest.raises(DataError, match=r"has the columns 'id', 'a', 'b'; say which .* --columns=QUERY,DOCUMENT"):
        OwnPairs.find(str(unclear))
    bad = write_csv(tmp_path / "bad.csv", [*PAIRS, ("one value",)])
    with pytest.raises(BadRow, match=r"bad\.csv:32: has 1 values"):
        finetune(str(bad), str(base), tmp_path / "out")
    skipped = OwnPairs.find(str(bad), (), "skip", tmp_path / "rejected.jsonl").summarize()
    assert (skipped.rows, skipped.rejected, skipped.pairs) == (30, 1, 30)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.doc").write_text("x")
    with pytest.raises(FileRefused, match=r"holds thesis\.doc"):
        finetune(str(file), str(base), tmp_path / "mine")


def test_a_large_file_is_used_in_part(tmp_path):
    rows = [(f"question {i % 500}", f"answer {i % 500}") for i in range(1500)]
    pairs = OwnPairs.find(str(write_csv(tmp_path / "a.csv", rows)))
    assert pairs.summarize()[:6] == (1500, 0, 0, 500, 500, 500)
    some = pairs.sample(40, seed=0)
    assert len(some) == len({row["answer"] for row in some}) == 40
    assert some == OwnPairs.find(str(write_csv(tmp_path / "b.csv", rows[::-1]))).sample(40, seed=0)
    assert some != pairs.sample(40, seed=1) and len(pairs.sample(1000, seed=0)) == 500


def test_what_is_held_out_by_size():
    assert [held_out_queries(pairs) for pairs in (20, 40, 100, 1000, 100_000)] == [5, 10, 20, 100, 300]

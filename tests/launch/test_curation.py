"""Runs launch.filter, launch.mine and launch.clean as a user types them."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from launch.teacher import open_scorer, open_teacher
from nomic_jax import CrossEncoder, Embedder
from nomic_jax.data.formats.writing import write_rows
from nomic_jax.hf import read_checkpoint, write_checkpoint
from nomic_jax.model.heads import init_classifier
from tests.commands import Command
from tests.corpus import pairs_of_words, write_teacher


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    write_teacher(folder)
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    write_rows(file, pairs_of_words(300))
    return file


def finish(process: Command, code: int = 0) -> str:
    out, errors = process.communicate(timeout=300)
    assert process.returncode == code, errors[-3000:]
    return out + errors


def test_scores_are_those_of_the_teacher_with_its_prefixes(teacher, pairs, tmp_path):
    """tests/faults/curation.py covers killed commands and commands that share work."""
    command = ["launch.filter", f"--input={pairs}", f"--model={teacher}", "--prefixes", "--block_size=60"]
    finish(Command(*command, f"--output={tmp_path / 'filter'}"))
    scores = [json.loads(line) for line in (tmp_path / "filter" / "scores.jsonl").read_text().splitlines()]
    embedder = Embedder.from_pretrained(teacher)
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    queries = embedder.encode_query([row["query"] for row in rows]).astype(np.float64)
    documents = embedder.encode_document([row["document"] for row in rows]).astype(np.float64)
    np.testing.assert_allclose([line["score"] for line in scores], (queries * documents).sum(1), atol=3e-6)


def test_an_embedder_scores_by_its_similarity_and_a_cross_encoder_by_its_label(teacher, pairs, tmp_path):
    finish(Command("launch.score", f"--input={pairs}", f"--model={teacher}", f"--output={tmp_path / 'embedder'}"))
    rows = [json.loads(line) for line in (tmp_path / "embedder" / "scored.jsonl").read_text().splitlines()]
    embedder = Embedder.from_pretrained(teacher)
    queries = embedder.encode_query([row["query"] for row in rows]).astype(np.float64)
    documents = embedder.encode_document([row["document"] for row in rows]).astype(np.float64)
    np.testing.assert_allclose([row["scores"] for row in rows], (queries * documents).sum(1)[:, None], atol=3e-6)

    checkpoint = read_checkpoint(teacher)
    for labels in (("score",), ("no", "perhaps", "yes")):
        head = init_classifier(jax.random.key(1), checkpoint.config.encoder, len(labels))
        params = checkpoint.params | {"classifier": jax.tree.map(lambda x: x + 0.1, head)}
        write_checkpoint(tmp_path / f"{len(labels)}", dataclasses.replace(checkpoint, params=params, labels=labels))
    texts = [row["query"] for row in rows[:9]], [row["document"] for row in rows[:9]]
    options = dict(dtype="float32", max_length=None, batch_size=4, prompts=None)
    scores = {
        activation: open_scorer(str(tmp_path / "1"), activation=activation, **options)
        for activation in ("model", "identity")
    }
    want = CrossEncoder(tmp_path / "1").predict(list(zip(*texts)))
    np.testing.assert_allclose(scores["model"].score(*texts), want, atol=1e-6)
    np.testing.assert_allclose(scores["identity"].score(*texts), np.log(want / (1 - want)), atol=1e-4)
    assert scores["model"].identity != scores["identity"].identity
    with pytest.raises(ValueError, match=r"3 numbers, one for each of its labels \(no, perhaps, yes\)"):
        open_scorer(str(tmp_path / "3"), activation="model", **options)


def test_every_local_device_embeds(teacher):
    assert jax.local_device_count() == 8
    texts = [f"text number {i}" for i in range(37)]
    encoder = open_teacher(str(teacher), "float32", None, 4, ("search_query: ", ""))
    embedder = Embedder.from_pretrained(teacher)
    expected = embedder.encode(texts, prompt="search_query: ", batch_size=1)
    np.testing.assert_allclose(encoder.query(texts), expected, atol=1e-6)
    # Four texts per device, on eight devices.
    assert encoder.query.keywords["batch_size"] == 32
    own = open_teacher(str(teacher), "float32", None, None, None)
    assert own.identity["query_prompt"] == "search_query: " and own.identity["document_prompt"] == "search_document: "


def test_cleaning_against_a_task(pairs, tmp_path):
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    task = tmp_path / "tasks" / "toy"
    write_rows(task / "queries.jsonl", [{"_id": "q", "text": rows[3]["document"].upper()}])
    write_rows(task / "corpus.jsonl", [{"_id": "d", "text": "nothing like it"}])
    write_rows(task / "qrels.jsonl", [{"query_id": "q", "document_id": "d", "score": 1}])
    command = [
        "launch.clean",
        f"--input={pairs}",
        f"--evaluation={task.parent}",
        f"--output={tmp_path / 'out'}",
        "--ngram=6",
    ]
    out = finish(Command(*command, "--remove_contaminated=queries", "--near=0.8"))
    assert "kept 299 of 300 rows (removed: 1 contaminated)" in out
    assert "toy: 1 rows overlap with 1 of 1 queries" in out
    removed = json.loads((tmp_path / "out" / "removed.jsonl").read_text())
    assert (removed["row"], removed["reason"], removed["of"]) == (3, "contaminated", ["toy"])


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["launch.filter", "--query_column=nowhere"], "pairs.jsonl:1: no column 'nowhere'"),
        (["launch.mine", "--prefixes", "--query_prompt=x"], "--prefixes takes the teacher's own prompts"),
        (["launch.filter", "--min_score=2"], "no pair is left, so there is nothing to train on"),
        (["launch.mine", "--margin=0.001"], "no pair is left, so there is nothing to train on"),
        (
            ["launch.mine", "--random", "--margin=0.5"],
            "--random has neither a teacher nor ranks nor scores: leave --margin",
        ),
        (["launch.score", "--activation=identity"], "is an embedder, whose scores are similarities"),
        (["launch.score", "--negatives_column=negatives"], "pairs.jsonl:1: no column 'negatives'"),
        (["launch.score", "--scores_column=id"], "pairs.jsonl: its rows have a column 'id' already"),
        (["launch.clean", "--near=80"], "threshold of near-duplicates is 80.0"),
        (["launch.clean", "--min_words=1000"], "no row is left"),
        (["launch.clean", "--columns=query,body"], "pairs.jsonl:1: no column 'body'"),
    ],
)
def test_a_mistake_is_answered_in_one_line(teacher, pairs, tmp_path, command, message):
    model = [] if command[0] == "launch.clean" else [f"--model={teacher}"]
    errors = finish(Command(command[0], f"--input={pairs}", *model, f"--output={tmp_path}", *command[1:]), code=2)
    last = errors.strip().splitlines()[-1]
    assert last.startswith("error: ") and message in last and "Traceback" not in errors

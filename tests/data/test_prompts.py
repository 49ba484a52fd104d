"""Prompts come from the sources with their exact texts, and one rule chooses them."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from launch.teacher import open_teacher
from nomic_jax import Embedder
from nomic_jax.data.mixture import read_mixture
from nomic_jax.data.prompts import NOMIC_PROMPTS, prompt_for, prompt_text, prompts_of
from nomic_jax.data.tokens.pretokenize import pretokenize
from nomic_jax.evals.suites.local import read_task
from nomic_jax.evals.tasks.contract import TaskError, embed_with
from nomic_jax.hf import read_checkpoint, write_checkpoint
from nomic_jax.run.pretrained import read_pretrained
from nomic_jax.train.loop import train
from tests.train.tiny_configs import load_config


def source(tmp_path: Path, fields: str):
    paired = "bucket: a.jsonl, objective: {type: paired}"
    (tmp_path / "m.yaml").write_text(f"datasets:\n  - {{name: a, {paired}, {fields}}}\n")
    return read_mixture(str(tmp_path / "m.yaml"), "pair")[0]


@pytest.mark.parametrize(
    ("fields", "query", "document"),
    [
        ("query_prefix: search_query", "search_query: ", "search_query: "),
        ('query_prefix: "query: ", document_prefix: "passage: "', "query: ", "passage: "),
        ("query_prefix: query, document_prefix: passage", "query: ", "passage: "),
        (r'query_prefix: "Instruct: find it\nQuery: ", query_only: true', "Instruct: find it\nQuery: ", ""),
        (r'query_prefix: "Instruct: find it\nQuery:", document_prefix: ""', "Instruct: find it\nQuery:", ""),
        (r'query_prefix: "Find it.\n", document_prefix: "# "', "Find it.\n", "# "),
        (
            "query_prefix: 'Given a question, find its answer', query_only: true",
            "Given a question, find its answer: ",
            "",
        ),
        ("document_prefix: passage", "", "passage: "),
        ("weight: 2", "", ""),
    ],
)
def test_any_prefix_is_put_before_texts(tmp_path, tokenizer, fields, query, document):
    (tmp_path / "a.jsonl").write_text('{"query": "Who?", "document": "He."}\n')
    found = source(tmp_path, fields)
    assert (prompt_text(found.query_prefix), prompt_text(found.document_prefix)) == (query, document)
    store = pretokenize(found, tokenizer, tmp_path / "cache", progress=False)
    for column, text in (("query", query + "Who?"), ("document", document + "He.")):
        np.testing.assert_array_equal(store.columns[column][0], tokenizer.encode([text])[0])


@pytest.mark.parametrize("prefix", ["serach_query", "search query", "search_query:", "clusterng", "Classification"])
def test_a_misspelt_prefix_is_a_warning_with_the_likely_word(tmp_path, prefix):
    with pytest.warns(UserWarning, match="source 1: query_prefix .* did you mean (search_query|cluster|classif)"):
        source(tmp_path, f"query_prefix: {json.dumps(prefix)}")


def of(*sources):
    names = ("name", "query_prefix", "document_prefix", "rows")
    return prompts_of([dict(zip(names, values)) for values in sources])


def test_prompts_of_sources():
    assert of(("a", "", "", 5), ("b", "", "", 5)) == {}
    assert of(("a", "find: ", "", 5)) == {"query": "find: ", "document": ""}
    search = {"search_query": "search_query: ", "search_document": "search_document: "}
    both = {"query": "search_query: ", "document": "search_document: "}
    assert of(("a", "search_query", "search_document", 5)) == search | both
    # nomic's mixture: the roles are those of search, whatever the numbers of rows.
    nomic = of(
        ("a", "clustering", "clustering", 9),
        ("b", "search_query", "search_document", 5),
        ("c", "classification", "classification", 7),
    )
    assert nomic == NOMIC_PROMPTS
    # Others: the text of the most rows, and each text under the name of its source.
    assert of(("a", "A: ", "", 5), ("b", "B: ", "", 3), ("c", "B: ", "D: ", 4)) == {
        "query": "B: ",
        "document": "",
        "a_query": "A: ",
        "c_document": "D: ",
    }


@pytest.mark.parametrize(
    ("prompts", "name", "text"),
    [
        ({}, "search_query", ""),
        ({"query": "", "document": ""}, "search_query", ""),
        ({"query": "q: "}, "query", "q: "),
        ({"query": "q: "}, "search_query", "q: "),
        ({"query": "q: "}, "search_document", ""),
        ({"query": "q: "}, "classification", ""),
        ({"query": "q: ", "passage": "p: "}, "document", ""),
        ({"query": "q: ", "search_query": "s: "}, "search_query", "s: "),
        (NOMIC_PROMPTS, "document", "search_document: "),
        ({"query": "q: ", "own": "o: "}, "own", "o: "),
        ({"query": "q: "}, "", ""),
    ],
)
def test_the_rule(prompts, name, text):
    assert prompt_for(prompts, name) == text


def test_a_name_that_is_no_role_and_no_prompt():
    with pytest.raises(ValueError, match="no prompt 'serach_query'; its prompts are: 'query'"):
        prompt_for({"query": "q: "}, "serach_query")


@pytest.mark.parametrize("prompts", [{"query": "query: "}, {"query": "", "document": ""}, {}])
def test_a_model_with_few_prompts_is_searched_and_evaluated(minilm, tmp_path, prompts):
    """As bge and arctic-embed have them, as sentence-transformers 5 saves a model without any, and without any."""
    shutil.copytree(minilm, tmp_path / "model")
    (tmp_path / "model" / "config_sentence_transformers.json").write_text(json.dumps({"prompts": prompts}))
    embedder = Embedder.from_pretrained(tmp_path / "model", max_length=32)
    plain = Embedder.from_pretrained(minilm, max_length=32)
    query = prompts.get("query", "")
    np.testing.assert_allclose(embedder.encode_query("a"), plain.encode(query + "a"), atol=1e-6)
    np.testing.assert_allclose(embedder.encode_document("a"), plain.encode("a"), atol=1e-6)
    teacher = open_teacher(str(tmp_path / "model"), "float32", 32, None, None)
    assert (teacher.identity["query_prompt"], teacher.identity["document_prompt"]) == (query, "")
    np.testing.assert_allclose(teacher.query(["a"]), plain.encode([query + "a"]), atol=1e-6)
    task = tmp_path / "task"
    task.mkdir()
    (task / "queries.jsonl").write_text('{"_id": "1", "text": "a"}\n')
    (task / "corpus.jsonl").write_text('{"_id": "1", "text": "a"}\n{"_id": "2", "text": "b"}\n')
    (task / "qrels.jsonl").write_text('{"query_id": "1", "document_id": "1", "score": 1}\n')
    assert dict(read_task(task).run(embed_with(embedder, True)))["ndcg@10"] == 1
    seen = []
    (task / "task.json").write_text('{"query_prompt": null}')
    list(read_task(task).run(lambda texts, prompt: seen.append(prompt) or plain.encode(texts)))
    assert seen == ["", "search_document"]
    (task / "task.json").write_text('{"query_prompt": "serach_query"}')
    with pytest.raises(TaskError, match="no prompt 'serach_query'"):
        list(read_task(task).run(embed_with(embedder, True)))


@pytest.mark.slow(reason="sentence-transformers is imported")
def test_the_prompts_of_training_reach_the_clients(corpus, minilm, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    (tmp_path / "prompts.yaml").write_text(
        f"datasets:\n  - {{name: a, bucket: {corpus}/a.jsonl, objective: {{type: paired}}, query_only: true,\n"
        '     query_prefix: "Given a question, find its answer"}\n'
    )
    config = load_config("contrastive", corpus, minilm, steps=0)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, mixture=str(tmp_path / "prompts.yaml")))
    train(config, tmp_path / "run", jax.devices()[:1])
    trained = read_pretrained(tmp_path / "run")
    prompts = {"query": "Given a question, find its answer: ", "document": ""}
    assert trained.prompts == prompts
    write_checkpoint(tmp_path / "export", trained)
    assert read_checkpoint(tmp_path / "export").prompts == prompts
    theirs = sentence_transformers.SentenceTransformer(str(tmp_path / "export"), device="cpu")
    assert theirs.prompts == prompts
    ours = Embedder.from_pretrained(tmp_path / "run")
    for name, text in (("query", "where is shelf 0?"), ("document", "Shelf 0.")):
        plain = ours.encode([prompts[name] + text], prompt="")
        assert np.abs(getattr(ours, f"encode_{name}")([text]) - plain).max() <= 1e-6
        assert np.abs(getattr(theirs, f"encode_{name}")([text]) - plain).max() <= 1e-5
    card = (tmp_path / "export" / "README.md").read_text(encoding="utf-8")
    assert '`encode_query` prepends `"Given a question, find its answer: "`, `encode_document` nothing' in card
    assert "search_query" not in card and "Every text starts" not in card

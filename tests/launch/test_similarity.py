"""Every command ranks by the similarity that the model was trained for: dot products are not compared as cosines."""

import json
import shutil

import numpy as np
import pytest

from launch.evaluate import evaluate
from launch.teacher import open_teacher
from nomic_jax import Embedder
from nomic_jax.curate.filter.consistency import FilterOptions, filter_pairs
from nomic_jax.curate.mine.negatives import mine_negatives
from nomic_jax.curate.mine.selection import MiningOptions
from nomic_jax.data.formats.writing import write_rows
from nomic_jax.inference.embed_files import embed_files
from nomic_jax.inference.integrations import langchain_embeddings
from tests.commands import run

QUERIES = ["animals at home", "the price of shares", "the moon", "what to eat", "an old city by the sea"]
DOCUMENTS = [
    *("Space travel.", "Rockets fly to the moon and to other planets.", "A pet.", "The cat sleeps on the sofa."),
    *("Share prices fell sharply on Monday.", "Shares.", "Bread is baked in an oven.", "Eat!", "Venice", "The sea."),
    *("An old town with a harbour, many churches and narrow streets.", "A dog and a cat, which are both pets."),
]


def similar(directory, target, similarity):
    """Copies a model without its Normalize module, with another similarity."""
    shutil.copytree(directory, target)
    modules = json.loads((target / "modules.json").read_text())
    (target / "modules.json").write_text(json.dumps(modules[:2]))
    file = target / "config_sentence_transformers.json"
    settings = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(settings | {"similarity_fn_name": similarity}))
    return target


@pytest.fixture(scope="module")
def dot(minilm, tmp_path_factory):
    return similar(minilm, tmp_path_factory.mktemp("dot") / "model", "dot")


@pytest.fixture(scope="module")
def score_QN(dot):
    """The scores by dot product, [5, 12]; the cosine has another best document for some queries."""
    embedder = Embedder.from_pretrained(dot)
    query_QE, document_NE = embedder.encode(QUERIES), embedder.encode(DOCUMENTS)
    lengths = np.linalg.norm(document_NE, axis=1)
    assert lengths.max() > 1.1 * lengths.min() > 1.1
    scores = np.einsum("qe,ne->qn", query_QE, document_NE)
    assert (scores.argmax(1) != (scores / lengths).argmax(1)).any()
    return scores


def test_search(dot, score_QN, tmp_path):
    write_rows(tmp_path / "corpus.jsonl", [{"text": text} for text in DOCUMENTS])
    queries = [f"--query={text}" for text in QUERIES]
    done = run("launch.search", f"--model={dot}", f"--corpus={tmp_path}/corpus.jsonl", *queries, "--k=1")
    found = [line.split() for line in done.stdout.splitlines() if line.startswith("  ")]
    for (score, *words), score_N in zip(found, score_QN, strict=True):
        assert " ".join(words) == DOCUMENTS[score_N.argmax()]
        assert float(score) == pytest.approx(score_N.max(), abs=2e-3)


@pytest.mark.parametrize("similarity", ["dot", "euclidean"])
def test_evaluate(minilm, dot, score_QN, similarity, tmp_path):
    model = dot if similarity == "dot" else similar(minilm, tmp_path / "model", similarity)
    if similarity == "euclidean":
        embedder = Embedder.from_pretrained(model)
        query_QE, document_NE = embedder.encode(QUERIES), embedder.encode(DOCUMENTS)
        score_QN = -np.linalg.norm(query_QE[:, None] - document_NE[None], axis=2)
    task = tmp_path / "data" / "best"
    write_rows(task / "queries.jsonl", [{"_id": str(i), "text": text} for i, text in enumerate(QUERIES)])
    write_rows(task / "corpus.jsonl", [{"_id": str(i), "text": text} for i, text in enumerate(DOCUMENTS)])
    best = [{"query_id": str(q), "document_id": str(n), "score": 1} for q, n in enumerate(score_QN.argmax(1))]
    write_rows(task / "qrels.jsonl", best)
    report = evaluate(str(model), [str(task)], tmp_path / "out", truncate_dim=[384])
    assert report["tasks"]["best dim 384"]["ndcg@10"] == 1.0


def test_mine_and_filter(dot, score_QN, tmp_path):
    rows = [{"query": query, "document": text} for query in QUERIES for text in DOCUMENTS]
    write_rows(tmp_path / "pairs.jsonl", rows)
    teacher = open_teacher(str(dot), "float32", None, None, ("", ""))
    assert teacher.identity["similarity of --model"] == "dot" and not teacher.has_unit_length
    filter_pairs(str(tmp_path / "pairs.jsonl"), tmp_path / "filtered", teacher, FilterOptions(k=1), progress=False)
    scored = [json.loads(line) for line in (tmp_path / "filtered" / "scores.jsonl").read_text().splitlines()]
    ranks_QN = 1 + (score_QN[:, None, :] > score_QN[:, :, None]).sum(axis=2)
    assert [row["rank"] for row in scored] == ranks_QN.ravel().tolist()
    np.testing.assert_allclose([row["score"] for row in scored], score_QN.ravel(), atol=1e-3)

    write_rows(tmp_path / "pairs.jsonl", [{"query": text, "document": f"Nothing about {text}"} for text in QUERIES])
    write_rows(tmp_path / "corpus.jsonl", [{"document": text} for text in DOCUMENTS])
    options = MiningOptions(k=17, margin=0, num_negatives=10)
    sources = {"corpus": str(tmp_path / "corpus.jsonl"), "progress": False}
    mine_negatives(str(tmp_path / "pairs.jsonl"), tmp_path / "mined", teacher, options, **sources)
    for line, score_N in zip((tmp_path / "mined" / "triplets.jsonl").read_text().splitlines(), score_QN, strict=True):
        mined = [text for text in json.loads(line)["negatives"] if text in DOCUMENTS]
        assert mined == [DOCUMENTS[n] for n in np.argsort(-score_N)]


def test_a_teacher_that_compares_distances_is_refused(minilm, tmp_path):
    model = similar(minilm, tmp_path / "model", "manhattan")
    with pytest.raises(ValueError, match="compares vectors by manhattan distance"):
        open_teacher(str(model), "float32", None, None, ("", ""))


def test_files_and_other_libraries_get_vectors_for_the_models_similarity(minilm, dot, tmp_path):
    write_rows(tmp_path / "texts.jsonl", [{"text": text} for text in DOCUMENTS])
    raw = similar(minilm, tmp_path / "cosine", "cosine")  # without Normalize, compared by the cosine
    for model, has_unit_length in ((dot, False), (raw, True)):
        embedder = Embedder.from_pretrained(model)
        vectors = embedder.encode(DOCUMENTS)
        if has_unit_length:
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        embed_files(model, tmp_path / "texts.jsonl", tmp_path / "vectors.npy", overwrite=True)
        np.testing.assert_allclose(np.load(tmp_path / "vectors.npy"), vectors, atol=1e-5)
        np.testing.assert_allclose(langchain_embeddings(embedder).embed_documents(DOCUMENTS), vectors, atol=1e-5)

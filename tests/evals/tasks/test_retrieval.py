"""Retrieval: metrics against pytrec_eval, exact search against a full sort, task folders, and ``evaluate``."""

import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from launch.evaluate import evaluate, model_sha256, table
from nomic_jax.data.formats.row_checks import BadRow
from nomic_jax.data.formats.writing import write_rows
from nomic_jax.evals.suites.local import find_tasks, task_sha256
from nomic_jax.evals.tasks import bm25, retrieval
from nomic_jax.evals.tasks.contract import TaskError
from nomic_jax.evals.tasks.retrieval import RetrievalTask, search, top_k


def write_task(folder: Path, queries: dict, corpus: dict, qrels: dict[tuple[str, str], int]) -> Path:
    write_rows(folder / "queries.jsonl", ({"_id": i, "text": text} for i, text in queries.items()))
    write_rows(folder / "corpus.jsonl", ({"_id": i, "text": text} for i, text in corpus.items()))
    rows = ({"query_id": q, "document_id": d, "score": score} for (q, d), score in qrels.items())
    write_rows(folder / "qrels.jsonl", rows)
    return folder


def write_settings(folder: Path, **settings) -> Path:
    (folder / "task.json").write_text(json.dumps(settings))
    return folder


ANIMALS = {"d1": "the cat sleeps on a warm stove", "d2": "a dog barks at night", "d3": "horses graze in the meadow"}


def animals(folder: Path) -> Path:
    return write_task(
        folder, {"q1": "sleeping cat", "q2": "barks", "q3": "of the"}, ANIMALS, {("q1", "d1"): 1, ("q2", "d2"): 2}
    )


def test_files_of_a_task_may_be_those_of_beir_or_in_another_format(tmp_path):
    want = RetrievalTask.read(animals(tmp_path / "animals"))
    folder = animals(tmp_path / "beir" / "animals")
    (folder / "qrels.jsonl").unlink()
    (folder / "qrels").mkdir()
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t1\nq2\td2\t2\nq1\td3\t0\n")
    (folder / "corpus.jsonl").unlink()
    (folder / "corpus.csv").write_text("_id,text\n" + "".join(f"{name},{text}\n" for name, text in ANIMALS.items()))
    assert find_tasks([tmp_path / "beir"]) == {"animals": folder}
    assert RetrievalTask.read(folder) == want
    before = task_sha256(folder)
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td9\t1\n")
    assert task_sha256(folder) != before
    with pytest.raises(TaskError, match=r"query 'q1', document 'd9': corpus\.csv has no such document"):
        RetrievalTask.read(folder)
    (folder / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\n")
    with pytest.raises(TaskError, match=r"has qrels\.tsv and qrels/test\.tsv; keep one"):
        RetrievalTask.read(folder)


def test_metrics_are_those_of_trec_eval(tmp_path):
    pytrec_eval = pytest.importorskip("pytrec_eval")
    rng = np.random.default_rng(0)
    queries = [f"q{i}" for i in range(40)]
    documents = [f"d{i}" for i in rng.permutation(150)]
    qrels = {(q, str(d)): int(rng.integers(-1, 4)) for q in queries for d in rng.choice(documents, 25, replace=False)}
    # q7 is judged but has no relevant document; its score is 0.
    qrels |= {("q7", d): 0 for d in documents}
    # With small integers, many documents have equal scores.
    vectors = {text: rng.integers(-1, 2, 4) for text in queries + documents}
    folder = write_task(tmp_path / "random", {q: q for q in queries}, {d: d for d in documents}, qrels)

    got = dict(RetrievalTask.read(folder).run(lambda texts, prompt: np.array([vectors[text] for text in texts])))

    judged: dict[str, dict[str, int]] = {}
    for (q, d), score in qrels.items():
        judged.setdefault(q, {})[d] = score
    run = {q: {d: float(vectors[q] @ vectors[d]) for d in documents} for q in judged}
    measures = {"ndcg_cut.10", "recall.1,10,100", "recip_rank"}
    want = list(pytrec_eval.RelevanceEvaluator(judged, measures).evaluate(run).values())
    assert len(want) == 40
    for name, key in (("ndcg@10", "ndcg_cut_10"), ("recall@1", "recall_1"), ("recall@100", "recall_100")):
        assert got[name] == pytest.approx(np.mean([w[key] for w in want]), abs=1e-9)
    assert got["recall@10"] == pytest.approx(np.mean([w["recall_10"] for w in want]), abs=1e-9)
    reciprocal = [w["recip_rank"] if w["recip_rank"] >= 0.1 else 0 for w in want]
    assert got["mrr@10"] == pytest.approx(np.mean(reciprocal), abs=1e-9)


@pytest.mark.parametrize("k", [1, 7, 60, 100])
def test_top_k_of_blocks_is_a_stable_sort(k):
    score_QN = np.random.default_rng(1).integers(-3, 4, (5, 60)).astype(np.float32) / 3
    score_QN[:, ::7] = -0.0
    want = np.argsort(-(score_QN + 0.0), axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(top_k(np.split(score_QN, [13, 14, 40], axis=1), k), want)


def test_search_in_blocks_is_search(monkeypatch):
    rng = np.random.default_rng(2)
    query_QE, document_NE = rng.normal(size=(11, 8)), rng.normal(size=(50, 8))
    monkeypatch.setattr(retrieval, "QUERY_BLOCK", 4)
    monkeypatch.setattr(retrieval, "DOCUMENT_BLOCK", 9)
    want = np.argsort(-(query_QE @ document_NE.T), axis=1)[:, :12]
    np.testing.assert_array_equal(search(query_QE, document_NE, 12), want)


def test_prompts_and_titles_reach_the_encoder(tmp_path):
    folder = animals(tmp_path / "animals")
    write_rows(folder / "corpus.jsonl", [{"_id": "d1", "title": "Cats", "text": "sleep"}, {"_id": "d2", "text": ""}])
    (folder / "task.json").write_text('{"query_prompt": "classification"}')
    seen = {}

    def embed(texts, prompt):
        seen[prompt] = sorted(texts)
        return np.ones((len(texts), 2))

    dict(RetrievalTask.read(folder).run(embed))
    # q3 is not judged, so it is not embedded.
    assert seen == {"classification": ["barks", "sleeping cat"], "search_document": ["", "Cats sleep"]}


@pytest.mark.parametrize(
    ("file", "content", "error", "message"),
    [
        ("qrels.jsonl", None, TaskError, "has no qrels.jsonl"),
        ("qrels.jsonl", '{"query_id": "q9", "document_id": "d1", "score": 1}', TaskError, "queries.jsonl has no such"),
        ("qrels.jsonl", '{"query_id": "q1", "document_id": "d9", "score": 1}', TaskError, "corpus.jsonl has no such"),
        ("qrels.jsonl", '{"query_id": "q1", "document_id": "d1", "score": 0}', TaskError, "no query has a relevant"),
        ("qrels.jsonl", '{"query_id": "q1", "document_id": "d1"}', TaskError, "score is None"),
        ("corpus.jsonl", '{"_id": "d1"}', TaskError, "'d1' needs a text"),
        ("corpus.jsonl", '{"_id": "d1", "text": "a"}\n{"_id": "d1", "text": "b"}', TaskError, "given twice"),
        ("corpus.jsonl", '{"_id": "d1", "text"', BadRow, "corpus.jsonl:1: broken JSON"),
        ("task.json", '{"prompt": "x"}', TaskError, "unknown field 'prompt'"),
    ],
)
def test_a_broken_task_says_what_is_wrong(tmp_path, file, content, error, message):
    folder = animals(tmp_path / "animals")
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(content)
    with pytest.raises(error, match=message):
        RetrievalTask.read(folder)


@pytest.mark.parametrize(
    ("vectors", "message"), [(np.ones((1, 2)), "returned shape"), (np.full((2, 2), np.nan), "NaN or infinity")]
)
def test_bad_embeddings_are_refused(tmp_path, vectors, message):
    with pytest.raises(ValueError, match=message):
        RetrievalTask.read(animals(tmp_path / "animals")).run(lambda texts, prompt: vectors)


def test_bm25_finds_words(tmp_path):
    pytest.importorskip("bm25s")
    folder = write_task(
        tmp_path / "animals",
        {"found": "CAT stove", "stop words only": "of the", "unknown words": "zebra"},
        ANIMALS,
        {("found", "d1"): 1, ("stop words only", "d1"): 1, ("unknown words", "d1"): 1},
    )
    # For a query without a match, documents rank by descending id, so d1 is third.
    assert dict(bm25.run(RetrievalTask.read(folder)))["mrr@10"] == pytest.approx((1 + 1 / 3 + 1 / 3) / 3)


def test_bm25_finds_words_of_scripts_without_spaces(tmp_path):
    pytest.importorskip("bm25s")
    corpus = {"d1": "猫睡在炉子上", "d2": "ราคาอาหารวันนี้แพง", "d3": "किताब की कीमत", "d4": "कुत्ता तेज़ है"}
    queries = {"zh": "炉子", "th": "อาหารแพง", "hi": unicodedata.normalize("NFD", "कीमत")}
    folder = write_task(tmp_path / "a", queries, corpus, {("zh", "d1"): 1, ("th", "d2"): 1, ("hi", "d3"): 1})
    assert dict(bm25.run(RetrievalTask.read(folder)))["mrr@10"] == 1.0


def test_bm25_has_the_words_of_bm25s_for_english():
    bm25s = pytest.importorskip("bm25s")
    text = "The cat's a 9-day wonder of GPU_2 and x in 42 U.S. cities"
    expected = bm25s.tokenize([text], return_ids=False, show_progress=False)
    assert bm25.tokens([text]) == expected


def test_evaluate_goes_on_where_it_stopped(tmp_path, monkeypatch):
    pytest.importorskip("bm25s")
    first, second = animals(tmp_path / "tasks" / "first"), animals(tmp_path / "tasks" / "second")
    (second / "qrels.jsonl").rename(tmp_path / "away")
    report = evaluate("bm25", [str(tmp_path / "tasks")], tmp_path / "out")
    assert report["tasks"]["first"]["ndcg@10"] == report["average"]["ndcg@10"] == 1.0
    assert report["tasks"]["first"]["queries"] == 2 and report["tasks"]["first"]["documents"] == 3
    assert "has no qrels.jsonl" in report["failed"]["second"] and "FAILED" in table(report)

    (tmp_path / "away").rename(second / "qrels.jsonl")
    computed = []
    # One document alone, which answers one of the two queries.
    monkeypatch.setattr(bm25, "rank", lambda task: computed.append(task.name) or np.ones((2, 1), int))
    report = evaluate("bm25", [str(first), str(second)], tmp_path / "out")
    assert computed == ["second"] and not report["failed"]
    assert report == json.loads((tmp_path / "out" / "bm25.json").read_text())
    assert report["average"]["ndcg@10"] == 0.75


def test_evaluate_refuses_to_mix_figures(tmp_path):
    pytest.importorskip("bm25s")
    folder = animals(tmp_path / "animals")
    evaluate("bm25", [str(folder)], tmp_path / "out")
    with pytest.raises(ValueError, match="max_length None, this is 128; give another --name"):
        evaluate("bm25", [str(folder)], tmp_path / "out", max_length=128)
    before = task_sha256(folder)
    (folder / "task.json").write_text('{"query_prompt": "clustering"}')
    assert task_sha256(folder) != before
    with pytest.raises(ValueError, match="scores of task 'animals' with other content"):
        evaluate("bm25", [str(folder)], tmp_path / "out")


def test_a_run_that_went_on_is_another_model(tmp_path):
    from nomic_jax.run.manifest import write_manifest

    (tmp_path / "config.json").write_text("{}")
    hashes = set()
    for step in (1, 2):
        checkpoint = tmp_path / "checkpoints" / str(step)
        checkpoint.mkdir(parents=True)
        (checkpoint / "params").write_text(f"weights of step {step}")
        write_manifest(checkpoint)
        hashes.add(model_sha256(str(tmp_path)))
    assert len(hashes) == 2


def test_evaluate_says_what_it_cannot_do(tmp_path):
    folder = animals(tmp_path / "a" / "animals")
    with pytest.raises(ValueError, match="--suite=beir does not exist; write one of: local"):
        evaluate("bm25", [str(folder)], tmp_path / "out", suite="beir")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        evaluate("bm25", [str(tmp_path / "nowhere")], tmp_path / "out")
    with pytest.raises(ValueError, match="both named 'animals'"):
        evaluate("bm25", [str(folder), str(animals(tmp_path / "b" / "animals"))], tmp_path / "out")


def test_a_querys_own_document_can_be_left_out(tmp_path):
    """As in ArguAna: queries are documents of the corpus, under the same id, and their answers are other documents."""
    pytrec_eval = pytest.importorskip("pytrec_eval")
    rng = np.random.default_rng(0)
    corpus = {f"d{i}": f"text {i}" for i in range(120)}
    queries = {f"d{i}": corpus[f"d{i}"] for i in range(0, 30, 2)} | {"q": "no document has this id"}
    qrels = {(q, f"d{d}"): 1 + int(d) % 2 for q in queries for d in rng.choice(np.arange(31, 120), 3, replace=False)}
    vectors = {text: rng.normal(size=8) for text in [*corpus.values(), *queries.values()]}
    folder = write_settings(write_task(tmp_path / "own", queries, corpus, qrels), ignore_identical_ids=True)
    task = RetrievalTask.read(folder)
    got = dict(task.run(lambda texts, prompt: np.array([vectors[text] for text in texts])))
    judged: dict[str, dict[str, int]] = {}
    for (q, d), score in qrels.items():
        judged.setdefault(q, {})[d] = score
    run = {
        q: {d: float(np.float32(vectors[queries[q]] @ vectors[corpus[d]])) for d in corpus if d != q} for q in queries
    }
    want = list(pytrec_eval.RelevanceEvaluator(judged, {"ndcg_cut.10", "recall.100"}).evaluate(run).values())
    assert got["ndcg@10"] == pytest.approx(np.mean([w["ndcg_cut_10"] for w in want]), abs=1e-9)
    assert got["recall@100"] == pytest.approx(np.mean([w["recall_100"] for w in want]), abs=1e-9)
    ranked_with = dict(RetrievalTask.read(write_settings(folder)).run(lambda x, _: np.array([vectors[t] for t in x])))
    assert got["ndcg@10"] > ranked_with["ndcg@10"]
    # BM25 ranks a text first for itself.
    answers = {"a": "homework should be abolished", "b": "homework should stay, as it is good", "c": "free museums"}
    task = write_task(tmp_path / "bm25", {"a": answers["a"]}, answers, {("a", "b"): 1})
    assert dict(bm25.run(RetrievalTask.read(task)))["ndcg@10"] == pytest.approx(1 / np.log2(3))
    assert dict(bm25.run(RetrievalTask.read(write_settings(task, ignore_identical_ids=True))))["ndcg@10"] == 1
    with pytest.raises(TaskError, match=r"ignore_identical_ids is 'yes'; write true or false"):
        RetrievalTask.read(write_settings(task, ignore_identical_ids="yes"))


def test_column_names_of_beir(tmp_path):
    folder = animals(tmp_path / "animals")
    want = RetrievalTask.read(folder)
    rows = [json.loads(line) for line in (folder / "qrels.jsonl").read_text().splitlines()]
    for query_id, document_id in (("query-id", "corpus-id"), ("query_id", "corpus_id")):
        beir = [
            {query_id: row["query_id"], document_id: row["document_id"], "score": 1.0 * row["score"]} for row in rows
        ]
        write_rows(folder / "qrels.jsonl", beir)
        assert RetrievalTask.read(folder) == want
    write_rows(folder / "qrels.jsonl", [{"qid": "q1", "docid": "d1", "score": 1}])
    with pytest.raises(TaskError, match=r"the columns docid, qid, score; write query_id, document_id and score, or"):
        RetrievalTask.read(folder)


def test_two_judgements_of_a_document_must_agree(tmp_path):
    folder = animals(tmp_path / "animals")
    want = RetrievalTask.read(folder)
    rows = [json.loads(line) for line in (folder / "qrels.jsonl").read_text().splitlines()]
    write_rows(folder / "qrels.jsonl", rows + rows[:1])
    assert RetrievalTask.read(folder) == want
    for score in (0, 2):
        write_rows(folder / "qrels.jsonl", [*rows, rows[0] | {"score": score}])
        with pytest.raises(TaskError, match=rf"query 'q1', document 'd1': is judged twice, with 1 and {score}"):
            RetrievalTask.read(folder)


def test_tasks_inside_of_a_task_are_found(tmp_path):
    outer = animals(tmp_path / "data" / "outer")
    inner = animals(outer / "inner")
    animals(outer / "notes" / "elsewhere")  # in a folder that is no task
    (inner / "again").symlink_to(outer)
    found = {"outer": outer, "inner": inner}
    assert find_tasks([tmp_path / "data"], ["outer", "inner"]) == found
    assert find_tasks([outer], ["outer", "inner"]) == found

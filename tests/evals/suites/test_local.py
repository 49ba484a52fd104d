"""Local tasks of every type: scores against mteb with the same weights in sentence-transformers, and every error."""

import dataclasses
import json
import random
import shutil
import sys

import numpy as np
import pytest

from launch.evaluate import evaluate, table
from nomic_jax.data.formats.row_checks import BadRow
from nomic_jax.data.formats.writing import write_rows
from nomic_jax.evals.suites.local import read_task
from nomic_jax.evals.tasks.classification import ClassificationTask
from nomic_jax.evals.tasks.clustering import ClusteringTask
from nomic_jax.evals.tasks.contract import TaskError
from nomic_jax.evals.tasks.retrieval import RetrievalTask
from nomic_jax.evals.tasks.sts import StsTask
from nomic_jax.inference.embedder import Embedder

MAX_LENGTH = 48
ONE = '{"text": "a", "label": 1}'
MAIN = {"retrieval": "ndcg@10", "classification": "accuracy", "clustering": "v_measure", "sts": "spearman"}


def as_mteb_tasks(folder):
    """Returns the same data as mteb tasks, defined as in mteb's documentation."""
    from datasets import Dataset, DatasetDict
    from mteb.abstasks import AbsTaskClassification, AbsTaskRetrieval, AbsTaskSTS
    from mteb.abstasks.clustering_legacy import AbsTaskClusteringLegacy
    from mteb.abstasks.task_metadata import TaskMetadata

    def rows(name):
        return [json.loads(line) for line in (folder / name).read_text().splitlines()]

    def make(base, name, kind, score, dataset, **attributes):
        metadata = TaskMetadata(
            name=name,
            description="local",
            dataset={"path": "nowhere", "revision": "1"},
            type=kind,
            eval_langs=["eng-Latn"],
            main_score=score,
        )
        task = type(name, (base,), {"metadata": metadata, "load_data": lambda self, **_: None} | attributes)()
        task.dataset, task.data_loaded = dataset, True
        return task

    relevant: dict = {}
    for row in rows("retrieval/qrels.jsonl"):
        relevant.setdefault(row["query_id"], {})[row["document_id"]] = row["score"]
    retrieval = {
        "corpus": Dataset.from_list([{"id": row.pop("_id")} | row for row in rows("retrieval/corpus.jsonl")]),
        "queries": Dataset.from_list([{"id": row.pop("_id")} | row for row in rows("retrieval/queries.jsonl")]),
        "relevant_docs": relevant,
        "top_ranked": None,
    }
    labelled = {split: Dataset.from_list(rows(f"classification/{split}.jsonl")) for split in ("train", "test")}
    clusters = rows("clustering/test.jsonl")
    cluster_set = Dataset.from_dict(
        {"sentences": [[row["text"] for row in clusters]], "labels": [[row["label"] for row in clusters]]}
    )
    pairs = Dataset.from_list(rows("sts/test.jsonl"))
    return {
        "retrieval": make(AbsTaskRetrieval, "R", "Retrieval", "ndcg_at_10", {"default": {"test": retrieval}}),
        "classification": make(AbsTaskClassification, "C", "Classification", "accuracy", DatasetDict(**labelled)),
        "clustering": make(AbsTaskClusteringLegacy, "K", "Clustering", "v_measure", DatasetDict(test=cluster_set)),
        "sts": make(AbsTaskSTS, "S", "STS", "cosine_spearman", DatasetDict(test=pairs), min_score=0, max_score=6),
    }


@pytest.fixture(scope="module")
def report(local_tasks, minilm, tmp_path_factory):
    output = tmp_path_factory.mktemp("out")
    found = evaluate(str(minilm), [str(local_tasks)], output, name="minilm", max_length=MAX_LENGTH)
    return found, output


@pytest.mark.slow(reason="imports mteb and torch, and runs four tasks with both implementations")
def test_scores_are_those_of_mteb_and_sentence_transformers(report, local_tasks, minilm):
    mteb = pytest.importorskip("mteb")
    SentenceTransformer = pytest.importorskip("sentence_transformers").SentenceTransformer

    model = SentenceTransformer(str(minilm), device="cpu")
    model.max_seq_length = MAX_LENGTH
    theirs = {}
    for name, task in as_mteb_tasks(local_tasks).items():
        [result] = mteb.evaluate(model, task, cache=None, show_progress_bar=False).task_results
        theirs[name] = result.scores["test"][0]
    ours = report[0]["tasks"]
    assert ours.keys() == MAIN.keys() and not report[0]["failed"]
    for name, figures in ours.items():
        assert figures["metric"] == MAIN[name] and 0.1 < figures[MAIN[name]] < 0.99, "score too close to 0 or 1"
        assert figures[MAIN[name]] == pytest.approx(theirs[name]["main_score"], abs=1e-4), name
    for ours_name, theirs_name in (("recall@10", "recall_at_10"), ("mrr@10", "mrr_at_10"), ("recall@1", "recall_at_1")):
        assert ours["retrieval"][ours_name] == pytest.approx(theirs["retrieval"][theirs_name], abs=1e-4)
    for metric in ("f1", "f1_weighted"):
        assert ours["classification"][metric] == pytest.approx(theirs["classification"][metric], abs=1e-4)
    assert ours["sts"]["pearson"] == pytest.approx(theirs["sts"]["cosine_pearson"], abs=1e-4)
    # One query is judged but has no relevant document; both implementations score it 0.
    assert ours["retrieval"]["queries"] == 20


@pytest.mark.slow(reason="runs mteb's ten classifiers twice")
def test_classification_of_the_suite_mteb_is_that_of_a_model_without_normalisation(local_tasks, minilm, tmp_path):
    mteb = pytest.importorskip("mteb")
    SentenceTransformer = pytest.importorskip("sentence_transformers").SentenceTransformer

    from nomic_jax import Embedder
    from nomic_jax.evals.suites.mteb import UNNORMALIZED, score
    from nomic_jax.inference.integrations import mteb_encoder

    model = SentenceTransformer(str(minilm), device="cpu")
    model = SentenceTransformer(modules=[model[0], model[1]], device="cpu")
    model.max_seq_length = MAX_LENGTH
    task = as_mteb_tasks(local_tasks)["classification"]
    [theirs] = mteb.evaluate(model, task, cache=None, show_progress_bar=False).task_results
    encoder = mteb_encoder(Embedder.from_pretrained(minilm, max_length=MAX_LENGTH), unnormalized_types=UNNORMALIZED)
    assert score(encoder, task, tmp_path, 32)["score"] == pytest.approx(theirs.get_score(), abs=1e-4)


def test_long_texts_are_cut_where_sentence_transformers_cuts(minilm, words):
    SentenceTransformer = pytest.importorskip("sentence_transformers").SentenceTransformer

    from nomic_jax import Embedder

    rng = random.Random(4)
    odd = [
        "e\u0301",
        "\u4e2d\u6587",
        "\U0001f600",
        "#tag",
        "o'clock",
        "\u00df",
        "x" * 150,
        "[SEP]",
        "a\tb\n c",
        "\u200b",
    ]
    texts = ["classification: " + " ".join(rng.choices(words + odd * 3000, k=k)) for k in (3, 14, 15, 16, 17, 40, 400)]
    model = SentenceTransformer(str(minilm), device="cpu")
    model.max_seq_length = 32
    theirs = [model.tokenize([text])["input_ids"][0].tolist() for text in texts]
    ours, cut = Embedder.from_pretrained(minilm, max_length=32)._tokenize(
        [text.removeprefix("classification: ") for text in texts], "classification: "
    )
    assert [ids.tolist() for ids in ours] == theirs
    assert cut >= 2 and max(map(len, theirs)) == 32


def test_report_and_pictures(report):
    found, output = report
    text = (output / "report.md").read_text()
    for kind in ("Retrieval, ndcg@10", "Classification, accuracy", "Clustering, v_measure", "STS, spearman"):
        assert kind in text
    assert f"| minilm | {MAX_LENGTH} | {found['tasks']['sts']['spearman']:.4f} |" in text
    assert (output / "local.png").stat().st_size > 1000
    html = (output / "report.html").read_text()
    assert f"{found['tasks']['sts']['spearman']:.4f}</td>" in html and html.count("data:image/png") == 1
    assert f"{found['tasks']['clustering']['v_measure']:.4f}" in table(found)


def test_matryoshka_dims_are_cut_before_normalisation(report, local_tasks, minilm, tmp_path):
    settings = {"max_length": MAX_LENGTH, "tasks": ["retrieval", "clustering"]}
    found = evaluate(str(minilm), [str(local_tasks)], tmp_path, name="m", truncate_dim=[384, 64], **settings)
    from nomic_jax import Embedder

    embedder = Embedder.from_pretrained(minilm, max_length=MAX_LENGTH)
    task = RetrievalTask.read(local_tasks / "retrieval")
    want = dict(task.run(lambda texts, prompt: embedder.encode(texts, truncate_dim=64, normalize_embeddings=True)))
    assert tuple(want) == task.metrics
    assert found["tasks"]["retrieval dim 64"]["ndcg@10"] == want["ndcg@10"]
    whole = report[0]
    for name in settings["tasks"]:
        metric = MAIN[name]
        assert found["tasks"][f"{name} dim 384"][metric] == pytest.approx(whole["tasks"][name][metric], abs=1e-6)
    text = (tmp_path / "report.md").read_text()
    assert "## Components kept" in text and (tmp_path / "matryoshka.png").exists()


def test_known_answers(tmp_path):
    """Embeddings that reveal the label score 1; constant embeddings score at chance level."""
    rows = [{"text": f"{label} {i}", "label": label} for i in range(20) for label in ("yes", "no")]
    write_rows(tmp_path / "c" / "train.jsonl", rows)
    write_rows(tmp_path / "c" / "test.jsonl", rows[:10])
    write_rows(tmp_path / "k" / "test.jsonl", rows)
    write_rows(
        tmp_path / "s" / "test.jsonl",
        [{"sentence1": "0", "sentence2": str(i), "score": -i} for i in range(1, 9)],
    )
    tasks = [read_task(tmp_path / name) for name in "cks"]
    assert [type(task) for task in tasks] == [ClassificationTask, ClusteringTask, StsTask]
    seen = []

    def telling(texts, prompt):
        seen.append(prompt)
        return np.array([[1.0, 0.0] if text.startswith("yes") else [0.0, 1.0] for text in texts])

    def angles(texts, prompt):
        seen.append(prompt)
        return np.array([[np.cos(int(text) / 10), np.sin(int(text) / 10)] for text in texts])

    assert all(tuple(dict(task.run(embed))) == task.metrics for task, embed in zip(tasks, (telling, telling, angles)))
    seen.clear()
    assert dict(tasks[0].run(telling)) == {"accuracy": 1.0, "f1": 1.0, "f1_weighted": 1.0}
    assert dict(tasks[1].run(telling)) == {"v_measure": 1.0}
    assert dict(tasks[2].run(angles))["spearman"] == pytest.approx(1.0)
    assert seen == ["classification"] * 2 + ["clustering"] + ["classification"] * 2
    same = lambda texts, prompt: np.ones((len(texts), 2))  # noqa: E731
    assert dict(tasks[0].run(same))["accuracy"] == 0.5
    assert dict(tasks[1].run(same))["v_measure"] == 0


@pytest.mark.parametrize(
    ("files", "error", "message"),
    [
        ({"train.jsonl": '{"text": "a", "label": 1}'}, TaskError, "has no test.jsonl"),
        ({"test.jsonl": '{"query": "a"}'}, TaskError, "has the columns query; write text and label"),
        ({"test.jsonl": '{"text": "a", "label": 1}'}, TaskError, "all rows have the label 1"),
        (
            {"test.jsonl": '{"text": "a", "label": 1}\n{"text": "a", "label": "x"}'},
            TaskError,
            "row 2 has the label .x",
        ),
        (
            {"test.jsonl": '{"text": "a", "label": 1}\n{"text": "a", "label": 0.5}'},
            TaskError,
            "row 2 has the label 0.5",
        ),
        ({"test.jsonl": '{"text": "a", "label": 1}\n{"text": 3, "label": 2}'}, BadRow, "test.jsonl:2: column 'text'"),
        (
            {
                "train.jsonl": '{"text": "a", "label": 1}\n{"text": "b", "label": 2}',
                "test.jsonl": '{"text": "a", "label": 3}',
            },
            TaskError,
            "no row of train.jsonl has the label 3",
        ),
        (
            {"test.jsonl": '{"sentence1": "a", "sentence2": "b", "score": "high"}'},
            TaskError,
            "row 1 has the score 'high'",
        ),
        (
            {"test.jsonl": '{"sentence1": "a", "sentence2": "b", "score": 1}'},
            TaskError,
            "every pair has the same score",
        ),
        ({"test.jsonl": '{"text": "a", "label": 1}', "task.json": '{"promt": "x"}'}, TaskError, "task.json: expected"),
    ],
)
def test_a_broken_task_says_what_is_wrong(tmp_path, files, error, message):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(error, match=message):
        read_task(tmp_path)


def test_scores_while_training_are_those_of_the_command(local_tasks, tiny_model, tmp_path, monkeypatch):
    from nomic_jax.fitting.stage import make_evaluation
    from nomic_jax.hf.read import read_checkpoint
    from nomic_jax.train.config import ConfigurationError, EvaluationConfig

    config = EvaluationConfig(every=1, tasks=str(local_tasks))
    scores = make_evaluation(config)(read_checkpoint(tiny_model))
    tasks = evaluate(str(tiny_model), [str(local_tasks)], tmp_path)["tasks"]
    assert scores == {name: {metric: tasks[name][metric] for metric in scores[name]} for name in MAIN}
    # The model of a run is computed in the dtype of the run, not in the default of an embedder.
    model = read_checkpoint(tiny_model)
    encoder = dataclasses.replace(model.config.encoder, dtype="bfloat16")
    in_bfloat16 = dataclasses.replace(model, config=dataclasses.replace(model.config, encoder=encoder))
    seen = []
    original = Embedder.from_checkpoint
    monkeypatch.setattr(Embedder, "from_checkpoint", lambda *a, **kw: seen.append(original(*a, **kw)) or seen[0])
    monkeypatch.setattr("nomic_jax.fitting.stage.run_task", lambda task, embedder, embed: {"accuracy": 0.0})
    make_evaluation(config)(in_bfloat16)
    assert seen[0].config.encoder.dtype == "bfloat16"
    with pytest.raises(ConfigurationError, match="'ndcg'; the tasks have accuracy, f1, f1_weighted, mrr@10, ndcg@10"):
        make_evaluation(dataclasses.replace(config, metric="ndcg"))


def test_a_collapsed_model_has_no_correlation(tmp_path):
    rows = [{"sentence1": f"a{i}", "sentence2": f"b{i}", "score": i} for i in range(9)]
    write_rows(tmp_path / "sts" / "test.jsonl", rows)
    task = StsTask.read(tmp_path / "sts")
    assert dict(task.run(lambda texts, prompt: np.ones((len(texts), 4), np.float32))) == {"spearman": 0, "pearson": 0}
    assert json.dumps(dict(task.run(lambda texts, prompt: np.eye(9, 9)[: len(texts)])), allow_nan=False)


def test_another_model_under_the_name_of_an_evaluation_is_refused(local_tasks, tiny_model, tmp_path, monkeypatch):
    """truncate_dim in a file that the hash left out: the figures of all components came back."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    arguments = (str(model), [str(local_tasks / "sts")], tmp_path / "out")
    before = evaluate(*arguments)
    with monkeypatch.context() as on_a_gpu, pytest.raises(ValueError, match="dtype 'float32', this is 'bfloat16'"):
        on_a_gpu.setattr("nomic_jax.inference.precision.choose", lambda dtype: "cudnn")
        evaluate(*arguments)
    file = model / "config_sentence_transformers.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"truncate_dim": 4}))
    with pytest.raises(ValueError, match=r"was made with model_sha256 .*; give another --name"):
        evaluate(*arguments)
    after = evaluate(*arguments, name="truncated")
    assert after["tasks"]["sts"]["spearman"] != before["tasks"]["sts"]["spearman"]


def test_a_failing_task_leaves_the_others(local_tasks, minilm, tmp_path):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "sts").symlink_to(local_tasks / "sts")
    write_rows(tmp_path / "tasks" / "broken" / "test.jsonl", [{"wrong": "columns"}])
    found = evaluate(str(minilm), [str(tmp_path / "tasks")], tmp_path / "out", name="m")
    assert list(found["tasks"]) == ["sts"] and "has the columns wrong" in found["failed"]["broken"]
    assert "FAILED: TaskError" in table(found)
    assert "| m | broken | TaskError" in (tmp_path / "out" / "report.md").read_text()


def test_a_model_that_cannot_be_read_fails_the_run(local_tasks, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match="is not a directory and could not be fetched"):
        evaluate(str(tmp_path / "nowhere"), [str(local_tasks)], tmp_path)
    for suite, data, message in (("loco", [], "is for --suite=local"), ("mteb", ["x"], "is for --suite=local")):
        with pytest.raises(ValueError, match=message):
            evaluate("bm25", data, tmp_path, suite=suite)
    with pytest.raises(ValueError, match="takes its data from mteb"):
        evaluate("model", ["x"], tmp_path, suite="jina_long")


def test_it_needs_neither_mteb_nor_torch(local_tasks, tiny_model, tmp_path):
    import subprocess

    code = (
        "import sys; sys.meta_path.insert(0, type('No', (), {'find_spec': staticmethod(lambda name, *_: "
        "exec('raise ModuleNotFoundError(name)') if name.split('.')[0] in "
        "('torch', 'mteb', 'sentence_transformers', 'pytrec_eval') else None)}));"
        "from launch.evaluate import evaluate;"
        f"found = evaluate({str(tiny_model)!r}, [{str(local_tasks)!r}], {str(tmp_path)!r}, max_length=16);"
        "assert len(found['tasks']) == 4 and not found['failed'], found"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]

"""The suites mteb and jina_long: run by the mteb library, with the protocol of the published scores, restartable."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from launch.evaluate import evaluate
from nomic_jax import Embedder
from nomic_jax.evals.suites import hub, mteb
from nomic_jax.evals.tasks.contract import TaskError
from nomic_jax.inference.integrations import mteb_encoder

pytest.importorskip("mteb")
ROOT = Path(__file__).parent.parent.parent.parent


@pytest.fixture(scope="module")
def mock_tasks():
    """mteb's offline mock tasks, one of each type in MTEB(eng, v1)."""
    from mteb.mocks import mock_tasks

    return [
        mock_tasks.MockClassificationTask(),
        mock_tasks.LegacyMockClusteringFastTask(),
        mock_tasks.MockPairClassificationTask(),
        mock_tasks.MockRerankingTask(),
        mock_tasks.MockRetrievalTask(),
        mock_tasks.MockSTSTask(),
        mock_tasks.MockSummarizationTask(),
    ]


@pytest.fixture
def only(monkeypatch, mock_tasks):
    monkeypatch.setattr(mteb, "find_tasks", lambda names=(): mock_tasks)
    monkeypatch.setattr(hub, "is_reachable", lambda: False)
    return mock_tasks


@pytest.mark.slow(reason="imports mteb and torch, and runs a task of every type")
def test_every_type_runs_and_a_second_run_computes_nothing(minilm, only, tmp_path, monkeypatch):
    from mteb.results import TaskResult

    report = evaluate(str(minilm), output=tmp_path, suite="mteb", name="minilm", max_length=64)
    assert not report["failed"] and len(report["tasks"]) == 7
    types = {figures["type"] for figures in report["tasks"].values()}
    assert types == set(mteb_types())
    files = {path.stem: path for path in (tmp_path / "results").rglob("*Mock*.json")}
    for label, figures in report["tasks"].items():
        task = label.partition("@")[0]
        assert figures["score"] == pytest.approx(TaskResult.from_disk(files[task]).get_score(), abs=2e-6)
    text = (tmp_path / "report.md").read_text()
    assert "7 of 56 tasks" in text and "| nomic-embed-text-v1 | 62.39 | 74.10 |" in text
    assert (tmp_path / "mteb.png").stat().st_size > 1000

    def refuse(*args, **kwargs):
        raise AssertionError("computed again")

    monkeypatch.setattr(Embedder, "encode", refuse)
    # The scores come from the report or, if it is missing, from mteb's result files.
    assert (
        evaluate(str(minilm), output=tmp_path, suite="mteb", name="minilm", max_length=64)["tasks"] == report["tasks"]
    )
    (tmp_path / "minilm-mteb.json").unlink()
    again = evaluate(str(minilm), output=tmp_path, suite="mteb", name="minilm", max_length=64)
    assert again["tasks"] == report["tasks"] and not again["failed"]


def mteb_types():
    from nomic_jax.evals.report.published import MTEB_TYPES

    return MTEB_TYPES


def test_a_task_that_fails_leaves_the_others(minilm, only, tmp_path, monkeypatch):
    def broken(**_):
        raise ConnectionError("Couldn't reach 'mteb/x' on the Hub (LocalEntryNotFoundError)")

    task, other = only[5:]
    monkeypatch.setattr(mteb, "find_tasks", lambda names=(): [task, other])
    monkeypatch.setattr(task, "data_loaded", False)
    monkeypatch.setattr(task, "load_data", broken)
    report = evaluate(str(minilm), output=tmp_path, suite="mteb", name="m", max_length=[32, 64])
    assert list(report["failed"]) == ["MockSTSTask@32", "MockSTSTask@64"] and len(report["tasks"]) == 2
    assert "cannot be reached and is not in the cache" in report["failed"]["MockSTSTask@32"]
    assert "## Failed" in (tmp_path / "report.md").read_text()


def test_classification_alone_is_not_normalised(minilm, mock_tasks):
    embedder = Embedder.from_pretrained(minilm, max_length=64)
    encoder = mteb_encoder(embedder, "m", unnormalized_types=mteb.UNNORMALIZED)
    texts = ["a first text", "another, longer one"]
    vectors = {
        task.metadata.type: encoder.encode(
            [{"text": texts}], task_metadata=task.metadata, hf_split="test", hf_subset="default"
        )
        for task in mock_tasks
    }
    lengths = {kind: np.linalg.norm(x, axis=1) for kind, x in vectors.items()}
    assert np.abs(lengths.pop("Classification") - 1).min() > 0.1
    for kind, length in lengths.items():
        np.testing.assert_allclose(length, 1, atol=1e-5, err_msg=kind)
    # These vectors have the same direction; they come from before the model's Normalize module.
    raw = vectors["Classification"]
    np.testing.assert_allclose(raw / np.linalg.norm(raw, axis=1, keepdims=True), vectors["STS"], atol=1e-6)
    plain = mteb_encoder(embedder, "m").mteb_model_meta.revision
    assert encoder.mteb_model_meta.revision != plain


def test_the_tasks_are_those_of_the_published_figures():
    from collections import Counter

    tasks = mteb.find_tasks()
    assert Counter(task.metadata.type for task in tasks) == dict(zip(mteb_types(), (12, 11, 3, 4, 15, 10, 1)))
    assert next(task for task in tasks if task.metadata.name == "MSMARCO").eval_splits == ["dev"]
    [task] = mteb.find_tasks(["MSMARCO"])
    assert list(task.eval_splits) == ["dev"]
    names = [task.metadata.name for task in mteb.find_tasks(mteb.JINA_TASKS)]
    assert names == list(mteb.JINA_TASKS)
    with pytest.raises(ValueError, match="no task 'SciFacts'; did you mean SciFact"):
        mteb.find_tasks(["SciFacts"])


def test_jina_lengths_are_cells_of_their_own(minilm, only, tmp_path, monkeypatch):
    chosen = [task for task in only if task.metadata.type in ("Retrieval", "Clustering")]
    monkeypatch.setattr(mteb, "find_tasks", lambda names=(): chosen)
    report = evaluate(str(minilm), output=tmp_path, suite="jina_long", name="m", max_length=[16, 64])
    with pytest.raises(ValueError, match="takes at most 512 tokens, not 8191; write --max_length=512"):
        evaluate(str(minilm), output=tmp_path, suite="jina_long", name="m")
    assert len(report["tasks"]) == 4 and {figures["max_length"] for figures in report["tasks"].values()} == {16, 64}
    text = (tmp_path / "report.md").read_text()
    assert "| nomic-embed-text-v1 | 8191 | 54.20 |" in text and "| m | 64 |" in text
    assert (tmp_path / "jina_long.png").exists()


@pytest.mark.slow(reason="a separate process imports mteb and torch")
def test_an_unreachable_hub_is_said_at_once(minilm, tmp_path):
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "cache")}
    environment.pop("HF_HUB_OFFLINE", None)
    flags = [f"--model={minilm}", "--suite=mteb", "--tasks=STS12,SciFact", f"--output={tmp_path}", "--name=m"]
    done = subprocess.run(
        [sys.executable, "-m", "launch.evaluate", *flags],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1, done.stderr[-2000:]
    assert "the hub at http://127.0.0.1:9 cannot be reached" in done.stderr and "Traceback" not in done.stderr
    failed = json.loads((tmp_path / "m-mteb.json").read_text())["failed"]
    assert set(failed) == {"STS12", "SciFact"}
    assert all("cannot be reached and is not in the cache" in message for message in failed.values()), failed


@pytest.mark.parametrize(
    ("code", "status", "message"),
    [
        ("GatedRepo", 403, "is gated: accept its terms"),
        ("RepoNotFound", 404, "does not exist on the hub, or is private"),
    ],
)
def test_a_gated_or_missing_data_set_is_said(code, status, message, tmp_path):
    """Uses a local server that answers as the hub does."""
    import threading
    from http.server import BaseHTTPRequestHandler, HTTPServer

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", "Access to dataset x/y is restricted")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    program = (
        "from nomic_jax.evals.suites import hub\n"
        "assert hub.is_reachable()\n"
        "for get in (lambda: hub.load('x/y', None, 'test'), lambda: hub.download('x/y', 'a.zip')):\n"
        "    try:\n        get()\n    except hub.TaskError as error:\n        print(error)\n"
    )
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "0",
    }
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60)
    server.shutdown()
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and all(message in line and "x/y" in line for line in lines), done.stdout + done.stderr


def test_another_schema_is_said():
    error = KeyError("sentence1")
    assert "has a different format than this task expects (KeyError: 'sentence1')" in hub.explain(error, "mteb/x")
    assert issubclass(TaskError, ValueError)

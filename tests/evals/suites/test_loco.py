"""LoCo: files and archives in the published format, scores against a second implementation, lengths beyond training."""

import json
import random
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from launch.evaluate import evaluate
from nomic_jax import Embedder
from nomic_jax.data.formats.row_checks import BadRow
from nomic_jax.data.formats.writing import write_rows
from nomic_jax.evals.suites import loco
from nomic_jax.evals.suites.loco import LocoTask
from nomic_jax.evals.tasks.contract import TaskError, unit_length

SECTIONS = [
    {"section_name": "Introduction", "paragraphs": ["One.", "Two."]},
    {"section_name": None, "paragraphs": ["Three."]},
    {"section_name": "End", "paragraphs": []},
]
AS_COLUMNS = {name: [section[name] for section in SECTIONS] for name in ("section_name", "paragraphs")}
ARTICLE = "Introduction\nOne. Two.\nThree.\nEnd"


@pytest.fixture(scope="module")
def data(tmp_path_factory, words) -> Path:
    """The five tasks with six rows each; documents have up to 60 words."""
    folder = tmp_path_factory.mktemp("loco")
    rng = random.Random(1)

    def text(n):
        return " ".join(rng.choices(words, k=n))

    for name in ("summ_screen_fd", "gov_report", "qmsum"):
        documents = [text(rng.randint(5, 60)) for _ in range(6)]
        rows = [{"id": i, "input": text, "output": " ".join(text.split()[:3])} for i, text in enumerate(documents)]
        if name == "qmsum":
            pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")
        else:
            write_rows(folder / f"{name}.jsonl", rows)
    articles = [
        {
            "title": f"title {i}",
            "abstract": text(12),
            "full_text": [{"section_name": text(2), "paragraphs": [text(9), text(9)]}],
        }
        for i in range(6)
    ]
    write_rows(folder / "qasper" / "a.jsonl", articles[:3])
    write_rows(folder / "qasper" / "b.jsonl", articles[3:])
    return folder


def test_all_tasks_at_several_lengths(data, tiny_model, tmp_path):
    report = evaluate(str(tiny_model), [str(data)], tmp_path, suite="loco", max_length=[32, 128])
    assert not report["failed"] and len(report["tasks"]) == 10
    assert report["tasks"]["qmsum@32"]["documents"] == 6
    # Compare with ranks by cosine, computed here from the Embedder at that length.
    task = LocoTask.read("gov_report", data)
    embedder = Embedder.from_pretrained(tiny_model, max_length=128)
    query, document = embedder.encode_query(task.queries), embedder.encode_document(task.documents)
    cosine = unit_length(query) @ unit_length(document).T
    rank = (cosine > np.diag(cosine)[:, None]).sum(axis=1)
    assert report["tasks"]["gov_report@128"]["ndcg@10"] == pytest.approx(np.mean(1 / np.log2(rank + 2)))
    # Beyond the trained length, positions are rescaled, so the vectors depend on max_length.
    assert not np.allclose(
        document, Embedder.from_pretrained(tiny_model, max_length=32).encode_document(task.documents)
    )
    text = (tmp_path / "report.md").read_text()
    assert "| nomic-embed-text-v1 | 8192 | 85.50 |" in text and "| tiny | 128 |" in text
    assert (tmp_path / "loco.png").stat().st_size > 1000


def test_ties_are_broken_as_trec_eval_does():
    """Among equal scores, the highest id in string order comes first: Passage_9 before Passage_10."""
    figures = dict(loco.score(np.zeros((12, 12))))
    ranks = {n: r for r, n in enumerate(sorted(range(12), key=lambda n: f"Passage_{n}", reverse=True))}
    want = [1 / np.log2(ranks[n] + 2) if ranks[n] < 10 else 0 for n in range(12)]
    assert figures["ndcg@10"] == pytest.approx(np.mean(want)) and figures["recall@10"] == pytest.approx(10 / 12)


@pytest.mark.parametrize("full_text", [SECTIONS, AS_COLUMNS, ARTICLE])
def test_articles_of_every_published_form(tmp_path, full_text):
    write_rows(tmp_path / "qasper.jsonl", [{"title": "t", "abstract": "a", "full_text": full_text}])
    assert LocoTask.read("qasper_title", tmp_path) == LocoTask("qasper_title", ("t",), (ARTICLE,))


def test_the_archives_of_the_hub(tmp_path, monkeypatch):
    """Reads from a cache in the hub's layout, through the hub's client."""
    from huggingface_hub import constants

    snapshot = tmp_path / "datasets--tau--scrolls" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (tmp_path / "datasets--tau--scrolls" / "refs").mkdir()
    (tmp_path / "datasets--tau--scrolls" / "refs" / "main").write_text("0" * 40)
    rows = [{"id": "1", "pid": "1_0", "input": "a long transcript", "output": "its summary"}]
    with zipfile.ZipFile(snapshot / "qmsum.zip", "w") as archive:
        archive.writestr("qmsum/validation.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert LocoTask.read("qmsum") == LocoTask("qmsum", ("its summary",), ("a long transcript",))
    with pytest.raises(TaskError, match="tau/scrolls cannot be reached and is not in the cache"):
        LocoTask.read("gov_report")


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        (None, TaskError, "has none of qmsum.jsonl, qmsum.jsonl.gz, qmsum.parquet and no folder qmsum"),
        ([{"input": "a", "summary": "b"}], BadRow, "qmsum.jsonl:1: no column 'output'"),
        ([{"document": "a", "output": "b"}], TaskError, "has an unexpected format: no column 'input'"),
        ([{"input": [1], "output": "b"}], TaskError, "row 1: the document is list, neither a text"),
    ],
)
def test_other_forms_are_said(tmp_path, rows, error, message):
    if rows is not None:
        write_rows(tmp_path / "qmsum.jsonl", rows)
    with pytest.raises(error, match=message):
        LocoTask.read("qmsum", tmp_path)


def test_mistakes_are_said_before_anything_is_computed(data, tiny_model, tmp_path):
    with pytest.raises(ValueError, match="LoCo has no task 'qmsun'; it has summ_screen_fd"):
        evaluate(str(tiny_model), [str(data)], tmp_path, suite="loco", tasks=["qmsun"])
    with pytest.raises(ValueError, match="takes at most 256 tokens, not 2048; write --max_length=256"):
        evaluate(str(tiny_model), [str(data)], tmp_path, suite="loco")

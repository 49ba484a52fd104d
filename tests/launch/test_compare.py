"""Two models side by side: the figures are those of the task, and a report is written."""

import jax
import pytest

from launch.compare import compare
from nomic_jax import Embedder
from nomic_jax.data.formats.writing import write_rows
from nomic_jax.evals.suites.local import run_task
from nomic_jax.evals.tasks import bm25
from nomic_jax.evals.tasks.contract import embed_with
from nomic_jax.evals.tasks.retrieval import RetrievalTask
from nomic_jax.fitting.rows import DataError
from tests.commands import run
from tests.corpus import pairs_of_words, write_teacher


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / "tiny"
    write_teacher(directory)
    return directory


def test_pairs_are_compared_as_the_task_that_is_kept(tmp_path, model):
    write_rows(tmp_path / "pairs.jsonl", pairs_of_words(60))
    output = tmp_path / "out"
    done = run("launch.compare", "bm25", model, f"--input={tmp_path}/pairs.jsonl", f"--output={output}", "--queries=20")
    assert done.returncode == 0, done.stderr
    task = RetrievalTask.read(output / "task")
    assert len(task.queries) == 20 and len(task.documents) == 60
    embedder = Embedder.from_pretrained(model)
    right = dict(run_task(task, embedder, lambda normalize: embed_with(embedder, normalize)))
    words = dict(bm25.run(task))
    (line,) = [line.split() for line in done.stdout.splitlines() if line.startswith("ndcg@10 ")]
    assert [float(value) for value in line[1:3]] == pytest.approx([words["ndcg@10"], right["ndcg@10"]], abs=6e-4)
    verdict = next(line for line in done.stdout.splitlines() if line.startswith("tiny: "))
    assert " bm25. nDCG@10 went from" in verdict and "documents/s" in done.stdout
    report = (output / "report.md").read_text(encoding="utf-8")
    assert report.startswith(f"# bm25 and tiny on pairs.jsonl\n\n{verdict}") and "## Models" in report

    said, figures, facts, changes = compare((str(model), str(model)), str(output / "task"))  # a task, and no output
    assert "no clear difference" in said and figures.rows[0][3] == "+0.000" and not changes.rows
    assert (
        figures.header[-1] == "BM25"
        and facts.rows[0][1] == f"{sum(leaf.size for leaf in jax.tree.leaves(embedder.params)):,}"
    )


def test_data_without_pairs(tmp_path):
    write_rows(tmp_path / "pairs.jsonl", [{"query": "", "document": "a"}])
    with pytest.raises(DataError, match=r"pairs\.jsonl: has no row with a text in 'query' and 'document'"):
        compare(("bm25", "bm25"), str(tmp_path / "pairs.jsonl"))

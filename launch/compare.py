"""Compares two models on your own pairs or a retrieval task: nomic-jax compare A B --input=pairs.csv

    nomic-jax compare thenlper/gte-base my-embedder --input=faq.csv --output=comparison
    nomic-jax compare bm25 my-embedder --input=beir/scifact

A and B are folders, runs or names on the hub; "bm25" is word matching. --input holds a query and a document in each row
(csv, tsv, json, jsonl, parquet; --columns names them), of which some queries are searched among the documents; or it is
the folder of a retrieval task: queries, corpus and qrels, see nomic-jax evaluate --help. Each model uses its own
prompts and its own similarity.

The command prints figures of both with the interval of their difference (a paired bootstrap over the queries), BM25
beside them, the queries that differ most, and sizes and speeds. --output gets report.md, report.html and the task.
"""

import contextlib
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from nomic_jax.evals.report.document import Heading, Paragraph, Table, write_document
from nomic_jax.evals.suites.side_by_side import changes_table, figures_table, rank, report_parts, to_text, verdict
from nomic_jax.evals.tasks import bm25
from nomic_jax.evals.tasks.comparison import Comparison
from nomic_jax.evals.tasks.files import find_file
from nomic_jax.evals.tasks.retrieval import RetrievalTask
from nomic_jax.extras import MissingPackage
from nomic_jax.files.folders import check_only
from nomic_jax.files.printable import printable
from nomic_jax.fitting.own_pairs import OwnPairs
from nomic_jax.inference.compilation_cache import use_compilation_cache

from .errors import run

FLAGS = flags.FLAGS
BM25 = "bm25"
TIMED = 256  # documents whose embedding is timed
OUTPUTS = {"report.md", "report.html", "task"}


class Ranked(NamedTuple):
    """Attributes:
    ranking_QK: see ``RetrievalTask.rank``.
    facts: parameters, dimensions, tokens of a text, documents embedded in a second.
    """

    ranking_QK: np.ndarray
    facts: list[Any]


FACTS = ["model", "parameters", "dimensions", "tokens of a text", "documents/s here"]


def compare(
    models: tuple[str, str],
    data: str,
    output: str | Path | None = None,
    *,
    columns: tuple[str, ...] = (),
    queries: int = 500,
    documents: int = 5000,
    seed: int = 0,
    batch_size: int = 64,
    max_length: int | None = None,
    dtype: str = "auto",
) -> tuple[str, Table, Table, Table]:
    """Returns the verdict and the tables of figures, of models and of queries. The arguments are the flags.

    Raises:
      TaskError, DataError, BadRow, OSError: the data cannot be used; the message names file and line.
      FileRefused: ``output`` holds something else.
    """
    if output is not None:
        check_only(Path(output), OUTPUTS.__contains__, "the output of launch.compare")
    with _folder(output) as folder:
        task = _read(data, folder, columns, queries, documents, seed)
        names = _names(models)
        print(f"{len(task.queries):,} queries, {len(task.documents):,} documents", flush=True)
        ranked = []
        for model, name in zip(models, names):
            print(printable(f"ranking with {name}"), flush=True)
            ranked.append(_rank(model, task, batch_size, max_length, dtype))
        baselines = {}
        if BM25 not in models:
            with contextlib.suppress(MissingPackage):  # the extra `report` brings it
                baselines["BM25"] = dict(bm25.run(task))
        comparison = Comparison(task, ranked[0].ranking_QK, ranked[1].ranking_QK)
        differences = comparison.differences()
        said = verdict(differences, names, len(task.queries))
        facts = Table(FACTS, [[name, *each.facts] for name, each in zip(names, ranked)])
        if output is not None:
            parts = report_parts(comparison, names, baselines)
            heading = Heading(f"{names[0]} and {names[1]} on {Path(data).name}", 1)
            write_document(folder, [heading, Paragraph(said), *parts, Heading("Models"), facts])
        figures = figures_table(differences, names, baselines)
        return said, figures, facts, changes_table(comparison.changes(), names)


@contextlib.contextmanager
def _folder(output: str | Path | None) -> Iterator[Path]:
    if output is None:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
    else:
        Path(output).mkdir(parents=True, exist_ok=True)
        yield Path(output)


def _read(data: str, folder: Path, columns: tuple[str, ...], queries: int, documents: int, seed: int) -> RetrievalTask:
    if Path(data).is_dir() and find_file(Path(data), "queries"):
        return RetrievalTask.read(data)
    OwnPairs.find(data, columns).write_task(folder / "task", queries, documents, seed)
    return RetrievalTask.read(folder / "task")


def _names(models: tuple[str, str]) -> tuple[str, str]:
    """Returns the last parts of the names, or all of them if the last parts are equal."""
    first, second = (Path(model).name or model for model in models)
    return (first, second) if first != second else models


def _rank(model: str, task: RetrievalTask, batch_size: int, max_length: int | None, dtype: str) -> Ranked:
    if model == BM25:
        return Ranked(bm25.rank(task), ["", "", "", ""])
    import jax

    from nomic_jax.inference.embedder import Embedder

    embedder = Embedder.from_pretrained(model, dtype=dtype, max_length=max_length)
    ranking_QK = rank(task, embedder, batch_size)
    sample = list(task.documents[:TIMED])
    seconds = []
    for _ in range(2):  # the first compiles
        started = time.perf_counter()
        embedder.encode_document(sample, batch_size=batch_size, show_progress_bar=False)
        seconds.append(time.perf_counter() - started)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(embedder.params))
    facts = [f"{parameters:,}", embedder.dim, embedder.max_length, f"{len(sample) / seconds[1]:,.0f}"]
    return Ranked(ranking_QK, facts)


def main(arguments: list[str]) -> None:
    use_compilation_cache()
    said, figures, facts, changes = compare(
        (arguments[0], arguments[1]),
        FLAGS.input,
        FLAGS.output,
        columns=tuple(FLAGS.columns),
        queries=FLAGS.queries,
        documents=FLAGS.documents,
        seed=FLAGS.seed,
        batch_size=FLAGS.batch_size,
        max_length=FLAGS.max_length,
        dtype=FLAGS.dtype,
    )
    print(f"\n{printable(said)}\n\n{to_text(figures)}\n\n{to_text(facts)}\n")
    if changes.rows:
        print(f"The queries that differ most:\n{to_text(changes)}\n")
    if FLAGS.output:
        print(printable(f"wrote {FLAGS.output}/report.md and report.html"))


if __name__ == "__main__":
    flags.DEFINE_string("input", None, "Files of pairs, or the folder of a retrieval task.", required=True)
    flags.DEFINE_string("output", None, "Folder for report.md, report.html and the task. [only printed]")
    flags.DEFINE_list("columns", [], "Columns of query and document. [by their names or order]")
    flags.DEFINE_integer("queries", 500, "Queries taken from pairs, at random.", lower_bound=1)
    flags.DEFINE_integer("documents", 5000, "Documents taken from pairs, the right ones included.", lower_bound=2)
    flags.DEFINE_integer("seed", 0, "Of the choice of pairs.")
    flags.DEFINE_integer("batch_size", 64, "Texts in a batch.", lower_bound=1)
    flags.DEFINE_integer("max_length", None, "Tokens kept of a text. [each model's own setting]", lower_bound=2)
    flags.DEFINE_enum(
        "dtype",
        "auto",
        ["auto", "float32", "bfloat16"],
        "Precision of the computation. auto: bfloat16 on a GPU that has flash attention, else float32.",
    )
    run(main, ("A", "B"))

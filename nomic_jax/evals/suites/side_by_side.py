"""Two models on one retrieval task, query by query: figures for a terminal, and the parts of a report."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nomic_jax.evals.report.document import Heading, Paragraph, Part, Table
from nomic_jax.evals.tasks.comparison import CONFIDENCE, Change, Comparison, Difference
from nomic_jax.evals.tasks.contract import embed_with
from nomic_jax.evals.tasks.retrieval import DEPTH, RetrievalTask
from nomic_jax.files.printable import printable

METRIC = "ndcg@10"
SHOWN = ("ndcg@10", "recall@1", "recall@10", "mrr@10")
BEGINNING = 120  # characters of a text that a table shows
FEW = 50  # queries with which only large differences are more than chance


def rank(task: RetrievalTask, embedder: Any, batch_size: int = 64) -> np.ndarray:
    """Returns the ranking of a task by an embedder, with its own similarity and prompts; see ``RetrievalTask.rank``."""
    is_cosine = embedder.similarity_fn_name == "cosine"
    embed = embed_with(embedder, is_cosine, batch_size)
    return task.rank(embed) if is_cosine else task.rank(embed, embedder.similarity)


def verdict(differences: Mapping[str, Difference], names: tuple[str, str], queries: int) -> str:
    """Returns in a sentence whether the second model is better, by the interval of nDCG@10."""
    before, after = names
    figure = differences[METRIC]
    if figure.is_better:
        first = f"{after}: better than {before}"
    elif figure.is_worse:
        first = f"{after}: worse than {before}"
    else:
        first = f"{after}: no clear difference from {before}"
    few = f" {queries} queries are few: only a large difference shows." if queries < FEW else ""
    return (
        f"{first}. nDCG@10 went from {figure.before:.3f} to {figure.after:.3f}, a difference of {figure.gain:+.3f} "
        f"({CONFIDENCE:.0%} interval {figure.low:+.3f} to {figure.high:+.3f}, {queries:,} queries).{few}"
    )


def figures_table(
    differences: Mapping[str, Difference], names: tuple[str, str], baselines: Mapping[str, Mapping[str, float]]
) -> Table:
    """Returns the table of metrics.

    Args:
      baselines: name -> metric -> figure, of models beside the two, such as BM25.
    """
    header = ["metric", *names, "difference", f"{CONFIDENCE:.0%} interval", *baselines]
    rows = [
        [
            metric,
            f"{each.before:.3f}",
            f"{each.after:.3f}",
            f"{each.gain:+.3f}",
            f"{each.low:+.3f} to {each.high:+.3f}",
            *(f"{figures[metric]:.3f}" for figures in baselines.values()),
        ]
        for metric, each in differences.items()
        if metric in SHOWN
    ]
    return Table(header, rows)


def changes_table(changes: Sequence[Change], names: tuple[str, str]) -> Table:
    """Returns the table of the queries that changed most: the ranks of the right document in both models."""
    rows = [
        [_beginning(change.query), _rank(change.before), _rank(change.after), _beginning(change.document)]
        for change in changes
    ]
    return Table(["query", f"rank, {names[0]}", f"rank, {names[1]}", "right document"], rows)


def report_parts(
    comparison: Comparison, names: tuple[str, str], baselines: Mapping[str, Mapping[str, float]], most: int = 10
) -> list[Part]:
    """Returns the parts of a report about a task: the figures, what they are of, and the queries that changed most."""
    task, differences = comparison.task, comparison.differences()
    changes = comparison.changes(most)
    moved = len(comparison.changes(len(task.queries)))
    relevant = statistics.fmean(map(len, task.relevance))
    parts: list[Part] = [
        figures_table(differences, names, baselines),
        Paragraph(
            f"{len(task.queries):,} queries, each with {relevant:.3g} right documents on average among "
            f"{len(task.documents):,}. The interval is a paired bootstrap over the queries: other queries of the same "
            f"kind would give a difference within it in {CONFIDENCE:.0%} of cases."
        ),
        Heading("Queries that changed most"),
    ]
    if changes:
        parts += [
            Paragraph(f"The right document has another rank for {moved:,} of {len(task.queries):,} queries."),
            changes_table(changes, names),
        ]
    else:
        parts.append(Paragraph("The right document has the same rank for every query."))
    return parts


def to_text(table: Table, widest: int = 60) -> str:
    """Returns a table for a terminal. Longer cells are cut; what a terminal would take as a command is escaped."""
    lines = [[_cut(printable(cell), widest) for cell in row] for row in (table.header, *table.rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def _beginning(text: str) -> str:
    return _cut(" ".join(text.split()), BEGINNING)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _rank(rank: int | None) -> str:
    return f"below {DEPTH - 1}" if rank is None else str(rank)

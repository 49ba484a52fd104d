"""Scores of a teacher: each row gets a column with a number for its document and for each of its negatives.

The scores are those of the texts, so the teacher may have any tokenizer. The losses on a teacher's scores read them.
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nomic_jax.curate.engine.array_task import ArrayTask
from nomic_jax.curate.engine.embedding import Scorer
from nomic_jax.curate.engine.report import Sample, quarantine, table
from nomic_jax.curate.engine.row_blocks import AlreadyRejected, CountedRows, count_rows, equal_blocks, read_file
from nomic_jax.curate.engine.settings import fingerprints, locked_settings, matching_summary, settings_sha256
from nomic_jax.curate.engine.sharded_array import ShardedArray
from nomic_jax.data.formats.paths import input_files
from nomic_jax.data.formats.row_checks import BadRow
from nomic_jax.data.formats.writing import write_rows
from nomic_jax.files.folders import check_only
from nomic_jax.files.locks import exclusive_lock
from nomic_jax.files.printable import code
from nomic_jax.files.writing import atomic_file, write_json
from nomic_jax.jobs.tasks import Engine, local_engine

OUTPUTS = {"scored.jsonl", "rejected.jsonl", "summary.json", "report.md", "work"}


@dataclasses.dataclass(frozen=True)
class ScoreOptions:
    """What is written.

    Attributes:
      column: name of the column of scores. No row may have it already.
      block_size: maximum number of rows in a block, which one process scores. Its pairs are computed in order of
        length, so larger blocks need less padding.
    """

    column: str = "scores"
    block_size: int = 1024

    def __post_init__(self):
        if not self.column or self.block_size < 1:
            raise ValueError(
                f"column is {self.column!r} and block_size {self.block_size}; name a column, and 1 or more"
            )


def score_rows(
    files: str,
    output: str | os.PathLike,
    scorer: Scorer,
    options: ScoreOptions,
    *,
    columns: Sequence[str] = ("query", "document"),
    on_bad_row: str = "raise",
    engine: Engine = local_engine,
    progress: bool = True,
) -> dict[str, Any]:
    """Writes the rows with a teacher's scores of their candidates, in input order.

    Rows are counted and checked before anything is scored. Any number of processes may work on one output: they share
    the blocks, and the bytes of the result do not depend on their number. Another process, or the next run, takes over
    the block of a killed process. ``output`` receives

        scored.jsonl    the rows, with ``options.column``: [score of the document, of negative 1, of negative 2, ...]
        rejected.jsonl  rows that cannot be used and files that were set aside, with on_bad_row="skip"
        summary.json    the returned dictionary
        report.md       the summary as a page, with a sample of rows
        work/           scores of finished blocks

    Args:
      scorer: the teacher.
      columns: query and document; for triplets also the column with a list of negatives, or one column a negative.
      engine: makes the blocks.

    Raises:
      ValueError: ``output`` has work on other files or columns, or of another teacher; there is no usable row; or rows
        have a column of that name already.
      BadRow: a row cannot be used, with on_bad_row="raise".
    """
    output, columns = Path(output), tuple(columns)
    with opened_task(files, output, scorer, options, columns, on_bad_row=on_bad_row, progress=progress) as task:
        engine(task, scorer, True)
        return write_scores(files, output, task, options)


@contextlib.contextmanager
def opened_task(
    files: str,
    output: Path,
    scorer: Scorer,
    options: ScoreOptions,
    columns: tuple[str, ...],
    *,
    on_bad_row: str,
    progress: bool,
) -> Iterator["ScoringTask"]:
    """Yields the task, and locks the output against other settings meanwhile. Arguments as for ``score_rows``."""
    check_only(output, OUTPUTS.__contains__, "launch.score")
    work = output / "work"
    inputs = input_files(files, output)
    settings = {"columns": list(columns), "block_size": options.block_size, **scorer.identity}
    settings |= fingerprints("input", inputs, on_bad_row)
    with locked_settings(work, settings):
        with exclusive_lock(work / ".rows.lock"):
            kinds = _kinds(columns)
            for file in inputs:
                _check_is_new(file, kinds, options.column)
            rejected = output / "rejected.jsonl"
            rows = count_rows(inputs, kinds, work / "rows.json", rejected, on_bad_row=on_bad_row, progress=progress)
        yield ScoringTask(rows, work, columns, options.block_size, progress)


def _kinds(columns: Sequence[str]) -> dict[str, type]:
    """Column -> the type that its values must have."""
    kinds: dict[str, type] = dict.fromkeys(columns, str)
    return kinds | {columns[2]: list} if len(columns) == 3 else kinds


def _check_is_new(file: str, kinds: Mapping[str, type], column: str) -> None:
    """Raises ValueError if the first usable row of a file has the column, before anything is scored."""
    with contextlib.suppress(StopIteration, BadRow):  # other faults are named when all rows are counted
        row = next(iter(read_file(file, kinds, "skip", AlreadyRejected(), others=(column,))))
        if column in row:
            raise _Exists(file, column)


class _Exists(ValueError):
    def __init__(self, file: str, column: str):
        super().__init__(
            f"{file}: its rows have a column {column!r} already; choose another --scores_column, or take the column "
            f"out of the file"
        )


class ScoringTask(ArrayTask):
    """A task that scores the candidates of rows: float32, row after row."""

    def __init__(self, rows: CountedRows, work: Path, columns: tuple[str, ...], block_size: int, progress: bool):
        super().__init__("scoring", work, progress)
        self.rows, self.folder, self.columns = rows, work / "scores", columns
        self.blocks = equal_blocks(len(rows), block_size)

    def __len__(self) -> int:
        return len(self.blocks)

    def file(self, block: int) -> Path:
        return ShardedArray.file(self.folder, block)

    def make(self, block: int, encoder: Scorer | None) -> np.ndarray:
        assert encoder is not None
        queries: list[str] = []
        documents: list[str] = []
        for row in self.rows.block(*self.blocks[block]):
            candidates = self.candidates(row)
            queries += [row[self.columns[0]]] * len(candidates)
            documents += candidates
        scores = np.asarray(encoder.score(queries, documents), np.float32)
        if scores.shape != (len(queries),):
            raise ValueError(f"the teacher returned an array of shape {scores.shape} for {len(queries)} pairs")
        if len(wrong := np.flatnonzero(~np.isfinite(scores))):
            query, document = queries[wrong[0]], documents[wrong[0]]
            raise ValueError(
                f"the teacher gave the pair {query[:80]!r} and {document[:80]!r} the score {scores[wrong[0]]}; "
                f"expected a finite number"
            )
        return scores

    def candidates(self, row: Mapping[str, Any]) -> list[str]:
        """Returns the document and the negatives of a row."""
        others = self.columns[2:]
        negatives = row[others[0]] if len(others) == 1 else [row[column] for column in others]
        return [row[self.columns[1]], *negatives]


def write_scores(files: str, output: Path, task: ScoringTask, options: ScoreOptions) -> dict[str, Any]:
    """Writes scored.jsonl, report.md and summary.json from the blocks of the task; returns the summary."""
    rule = {"column": options.column, "settings_sha256": settings_sha256(output / "work")}
    with exclusive_lock(output / "work" / ".write.lock"):
        summary = matching_summary(rule, output, ("scored.jsonl", "report.md"))
        if summary is None:
            summary, sample = _write_rows(output, task, rule)
            with atomic_file(output / "report.md") as part:
                part.write_text(_report(files, summary, sample, task.columns), encoding="utf-8")
            write_json(output / "summary.json", summary)
        return summary


def _write_rows(output: Path, task: ScoringTask, rule: Mapping[str, Any]) -> tuple[dict[str, Any], Sample]:
    sample, column = Sample(5), rule["column"]
    positives, negatives, best = _Mean(), _Mean(), 0

    def scored() -> Iterator[dict[str, Any]]:
        nonlocal best
        scores = (score for block in range(len(task)) for score in np.load(task.file(block)).tolist())
        for number, (file, row) in enumerate(task.rows.read()):
            if column in row:
                raise _Exists(file, column)
            own = [round(next(scores), 6) for _ in task.candidates(row)]
            positives.add(own[:1])
            negatives.add(own[1:])
            best += own[0] >= max(own)
            sample.add((number, row[task.columns[0]], list(zip(own, task.candidates(row)))))
            yield row | {column: own}

    rows = write_rows(output / "scored.jsonl", scored())
    return {
        "rows": rows,
        "scores": positives.count + negatives.count,
        "mean_of_documents": positives.value,
        "mean_of_negatives": negatives.value,
        "lowest": min(positives.lowest, negatives.lowest),
        "highest": max(positives.highest, negatives.highest),
        "rows_whose_document_is_best": best,
        "rejected": task.rows.rejected,
        "quarantined": [entry._asdict() for entry in task.rows.quarantined],
        **rule,
    }, sample


class _Mean:
    def __init__(self):
        self.count, self.total, self.lowest, self.highest = 0, 0.0, float("inf"), float("-inf")

    def add(self, scores: Sequence[float]) -> None:
        self.count += len(scores)
        self.total += sum(scores)
        self.lowest, self.highest = min([self.lowest, *scores]), max([self.highest, *scores])

    @property
    def value(self) -> float | None:
        return round(self.total / self.count, 6) if self.count else None


def _report(files: str, summary: Mapping[str, Any], sample: Sample, columns: Sequence[str]) -> str:
    lines: list[tuple] = []
    for number, query, candidates in sorted(sample.items, key=lambda item: item[0]):
        lines.append((number, "query", "", query))
        lines += [
            ("", f"negative {i}" if i else "document", score, text) for i, (score, text) in enumerate(candidates[:4])
        ]
    counts = [
        (name.replace("_", " "), "" if value is None else value)
        for name, value in summary.items()
        if isinstance(value, int | float | None)
    ]
    return (
        f"# Scores of {code(files)}\n\nThe column {code(summary['column'])} of scored.jsonl has the teacher's score of "
        f"{code(columns[1])}{' and of each negative, in this order' if len(columns) > 2 else ''}.\n\n"
        f"{quarantine(summary)}{table(('', 'count or score'), counts)}\n"
        f"## A sample\n\n{table(('row', '', 'score', 'text'), lines)}"
    )

"""Consistency filtering: keep a pair if a teacher finds its document by its query (paper section 3.2)."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nomic_jax.curate.engine.embedding import Encoder
from nomic_jax.curate.engine.index import RANK_DEPTH
from nomic_jax.curate.engine.locks import exclusive_lock
from nomic_jax.curate.engine.row_blocks import count_rows
from nomic_jax.curate.engine.settings import fingerprints, locked_settings
from nomic_jax.curate.engine.tasks import Engine, run_here
from nomic_jax.curate.filter.ranking import RankingTask
from nomic_jax.curate.filter.selection import write_selection
from nomic_jax.data.formats.paths import expand_files


@dataclasses.dataclass(frozen=True)
class FilterOptions:
    """Which pairs are kept.

    Attributes:
      k: keep a pair if its document is among the k nearest to its query.
      min_score: and if its score is at least this; None for no such rule.
      block_size: most rows whose documents compete.
      approximate_above: search a block of more distinct documents by an ``ApproximateIndex``, whose recall is reported;
        None for exact search always.
    """

    k: int = 2
    min_score: float | None = None
    block_size: int = 1_000_000
    approximate_above: int | None = None

    def __post_init__(self):
        if self.k < 1 or self.block_size < 1:
            raise ValueError(f"k is {self.k} and block_size is {self.block_size}; both must be at least 1")
        if self.approximate_above is not None and self.k > RANK_DEPTH:
            raise ValueError(f"k is {self.k}; an approximate search tells {RANK_DEPTH} ranks apart")


def filter_pairs(
    files: str,
    output: str | os.PathLike,
    encoder: Encoder,
    options: FilterOptions,
    *,
    query_column: str = "query",
    document_column: str = "document",
    on_bad_row: str = "raise",
    engine: Engine = run_here,
    progress: bool = True,
) -> dict[str, Any]:
    """Keeps the pairs whose document ranks in the top ``k`` of its block, and says of every pair where it ranks.

    Rows are cut in the order they come into as few blocks as ``block_size`` allows, of equal size, so that a rank is
    worth the same in each; they are counted first, and a bad row is met before anything is embedded. Memory holds the
    texts of one block. Any number of processes may work on one output: they share the blocks, and the block of one that
    was killed is taken up by another, or by the next run. ``output`` receives

        kept.jsonl      the kept rows as they were, in input order
        scores.jsonl    {row, rank, score} of every row; rows are counted from 0, without rejected ones
        rejected.jsonl  rows that could not be used and files that were set aside, under on_bad_row="skip"
        summary.json    the dictionary that is returned
        report.md       the same to read, with a sample of kept and dropped rows
        work/           ranks of finished blocks, and embeddings of those at hand

    Ranks and scores depend on neither k nor min_score, so others on the same output select again without embedding.

    Args:
      engine: where the blocks are made.

    Raises:
      ValueError: ``output`` holds work on other files, columns or block size, or of another encoder; no usable row.
      BadRow: a row that cannot be used, under on_bad_row="raise".
    """
    output, columns = Path(output), (query_column, document_column)
    with scoring(files, output, encoder, options, columns, on_bad_row=on_bad_row, progress=progress) as task:
        engine(task, encoder, True)
        return write_selection(files, output, task, options.k, options.min_score)


@contextlib.contextmanager
def scoring(
    files: str,
    output: Path,
    encoder: Encoder,
    options: FilterOptions,
    columns: tuple[str, str],
    *,
    on_bad_row: str,
    progress: bool,
) -> Iterator[RankingTask]:
    """The task, while no other process works on the output under other settings. Arguments as for ``filter_pairs``."""
    work = output / "work"
    settings: dict[str, Any] = dict(zip(("query_column", "document_column"), columns))
    settings["block_size"] = options.block_size
    if options.approximate_above is not None:
        settings["approximate_above"] = options.approximate_above
    settings |= {**encoder.identity, **fingerprints("input", expand_files(files), on_bad_row)}
    with locked_settings(work, settings):
        with exclusive_lock(work / ".rows.lock"):
            checked = dict.fromkeys(columns, str)
            side_file = output / "rejected.jsonl"
            rows = count_rows(files, checked, work / "rows.json", side_file, on_bad_row=on_bad_row, progress=progress)
        yield RankingTask(
            rows,
            work,
            columns,
            block_size=options.block_size,
            approximate_above=options.approximate_above,
            progress=progress,
        )

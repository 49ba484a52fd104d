"""Consistency filtering: keep a pair if a teacher retrieves the document with the query (paper section 3.2)."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nomic_jax.curate.engine.embedding import Encoder
from nomic_jax.curate.engine.index import RANK_DEPTH
from nomic_jax.curate.engine.row_blocks import count_rows
from nomic_jax.curate.engine.settings import fingerprints, locked_settings
from nomic_jax.curate.filter.ranking import RankingTask
from nomic_jax.curate.filter.selection import write_selection
from nomic_jax.curate.filter.vectors import check_installed
from nomic_jax.data.formats.paths import input_files
from nomic_jax.files.folders import check_only
from nomic_jax.files.locks import exclusive_lock
from nomic_jax.jobs.tasks import Engine, local_engine

OUTPUTS = {"kept.jsonl", "scores.jsonl", "rejected.jsonl", "summary.json", "report.md", "work", "vectors"}


@dataclasses.dataclass(frozen=True)
class FilterOptions:
    """Which pairs are kept.

    Attributes:
      k: keep a pair if its document is among the k nearest to its query.
      min_score: also require a score of at least this; None for no minimum.
      block_size: maximum number of rows in a block. Documents are ranked within their block.
      approximate_above: search a block of more distinct documents than this with an ``ApproximateIndex``, whose recall
        is reported. None: the search is always exact.
      vectors: also write the teacher's vectors of all pairs, kept or not, for embedding distillation.
    """

    k: int = 2
    min_score: float | None = None
    block_size: int = 1_000_000
    approximate_above: int | None = None
    vectors: bool = False

    def __post_init__(self):
        if self.k < 1 or self.block_size < 1:
            raise ValueError(f"k is {self.k} and block_size is {self.block_size}; both must be at least 1")
        if self.approximate_above is not None and self.k > RANK_DEPTH:
            raise ValueError(f"k is {self.k}; an approximate search distinguishes {RANK_DEPTH} ranks: lower k")
        if self.vectors:
            check_installed()


def filter_pairs(
    files: str,
    output: str | os.PathLike,
    encoder: Encoder,
    options: FilterOptions,
    *,
    query_column: str = "query",
    document_column: str = "document",
    on_bad_row: str = "raise",
    engine: Engine = local_engine,
    progress: bool = True,
) -> dict[str, Any]:
    """Keeps the pairs whose document ranks in the top ``k`` of its block, and writes the rank of every pair.

    Rows are divided, in input order, into the fewest blocks that ``block_size`` allows. Blocks are equal in size, so
    that ranks are comparable. Rows are counted first, so that a bad row is found before anything is embedded. Memory
    holds the texts of one block. Any number of processes may work on one output: they share the blocks. Another
    process, or the next run, takes over the block of a killed process. ``output`` receives

        kept.jsonl      the kept rows, unchanged, in input order
        scores.jsonl    {row, rank, score} of every row; rows are numbered from 0, without rejected rows
        rejected.jsonl  rows that cannot be used and files that were set aside, with on_bad_row="skip"
        summary.json    the returned dictionary
        report.md       the summary as a page, with a sample of kept and dropped rows
        vectors/        with ``options.vectors``, a parquet of each block: the two texts of each pair, and their vectors
        work/           ranks of finished blocks, and embeddings of unfinished blocks

    Ranks and scores do not depend on k or min_score: a run with other values of these reuses them without embedding.

    Args:
      engine: makes the blocks.

    Raises:
      ValueError: ``output`` has work on other files, columns or block size, or of another encoder; no usable row.
      BadRow: a row cannot be used, with on_bad_row="raise".
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
    """Yields the task, and locks the output against other settings meanwhile. Arguments as for ``filter_pairs``."""
    check_only(output, OUTPUTS.__contains__, "launch.filter")
    work = output / "work"
    settings: dict[str, Any] = dict(zip(("query_column", "document_column"), columns))
    settings["block_size"] = options.block_size
    if options.approximate_above is not None:
        settings["approximate_above"] = options.approximate_above
    if options.vectors:
        settings["vectors"] = True
    inputs = input_files(files, output)
    settings |= {**encoder.identity, **fingerprints("input", inputs, on_bad_row)}
    with locked_settings(work, settings):
        with exclusive_lock(work / ".rows.lock"):
            checked = dict.fromkeys(columns, str)
            side_file = output / "rejected.jsonl"
            rows = count_rows(inputs, checked, work / "rows.json", side_file, on_bad_row=on_bad_row, progress=progress)
        yield RankingTask(
            rows,
            work,
            columns,
            block_size=options.block_size,
            approximate_above=options.approximate_above,
            vectors=output / "vectors" if options.vectors else None,
            progress=progress,
        )

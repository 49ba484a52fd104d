"""Consistency filtering: keep a pair if a teacher finds its document by its query (paper section 3.2)."""

import bisect
import functools
import itertools
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from nomic_jax.curate.blocks import Encoder, cached_array, distinct_texts, embed_texts, fingerprints, hold_settings
from nomic_jax.curate.index import own_ranks
from nomic_jax.curate.report import Sample, table
from nomic_jax.data.sources import (
    RejectedRows,
    atomic_file,
    expand_files,
    read_rows,
    write_json,
    write_rows,
)

SCORES = np.dtype([("rank", np.int32), ("score", np.float32)])
_BAND_STARTS = (1, 2, 3, 4, 6, 11, 21, 101, 1001)  # of the rank histogram


def score_block(
    queries: list[str], documents: list[str], encoder: Encoder, folder: Path, *, label: str, progress: bool = True
) -> np.ndarray:
    """Rank and score of each pair's own document among the distinct documents of the block, SCORES [N].

    Equal documents (up to surrounding whitespace) are one, so they share a rank and do not push each other out.
    Embeddings are kept in ``folder`` on the way.
    """
    texts, own_N = distinct_texts(documents)
    query_NE = embed_texts(
        queries, encoder.query, folder / "queries", label=f"{label}: embedding queries", progress=progress
    )
    document_DE = embed_texts(
        texts, encoder.document, folder / "documents", label=f"{label}: embedding documents", progress=progress
    )
    scores = np.empty(len(queries), SCORES)
    scores["rank"], scores["score"] = own_ranks(query_NE, document_DE, own_N, progress=progress)
    return scores


def filter_pairs(
    files: str,
    output: str | os.PathLike,
    encoder: Encoder,
    *,
    k: int = 2,
    block_size: int = 1_000_000,
    query_column: str = "query",
    document_column: str = "document",
    on_bad_row: str = "raise",
    progress: bool = True,
) -> dict[str, Any]:
    """Keeps the pairs whose document ranks in the top ``k`` of its block, and says of every pair where it ranks.

    Rows are cut into blocks of ``block_size`` in the order they come (the last block is what remains, and in a small
    block a rank is worth less). Memory holds one block: its rows, and 4 * E bytes a text. ``output`` receives

        kept.jsonl      the kept rows as they were, in input order
        scores.jsonl    {row, rank, score} of every row; rows are counted from 0, without rejected ones
        rejected.jsonl  rows that could not be used, under on_bad_row="skip"
        summary.json    the dictionary that is returned
        report.md       the same to read, with a sample of kept and dropped rows
        work/           ranks of finished blocks, and embeddings of the current one

    A run that was killed continues where it was. Ranks do not depend on k, so another k on the same output selects
    again without embedding anything.

    Raises:
      ValueError: ``output`` holds work on other files, columns or block size, or of another encoder; no usable row.
      BadRow: a row that cannot be used, under on_bad_row="raise".
    """
    if k < 1 or block_size < 1:
        raise ValueError(f"k is {k} and block_size is {block_size}; both must be at least 1")
    output = Path(output)
    settings = {"block_size": block_size, "query_column": query_column, "document_column": document_column}
    inputs = fingerprints("input", expand_files(files))
    hold_settings(output / "work", {**settings, **encoder.identity, **inputs})

    rejected = RejectedRows(output / "rejected.jsonl")
    rows = read_rows(files, {query_column: str, document_column: str}, on_bad_row=on_bad_row, rejected=rejected)
    bands: Counter[int] = Counter()
    kept, dropped = Sample(), Sample()

    def select(scores_file) -> Iterator[dict[str, Any]]:
        scored = _score_rows(rows, output / "work", encoder, block_size, query_column, document_column, progress)
        for number, (row, rank, score) in enumerate(scored):
            scores_file.write(json.dumps({"row": number, "rank": rank, "score": round(score, 6)}) + "\n")
            bands[bisect.bisect_right(_BAND_STARTS, rank) - 1] += 1
            (kept if rank <= k else dropped).add((number, rank, score, row[query_column], row[document_column]))
            if rank <= k:
                yield row

    with atomic_file(output / "scores.jsonl") as part, part.open("w", encoding="utf-8") as scores_file:
        write_rows(output / "kept.jsonl", select(scores_file))
    total = kept.seen + dropped.seen
    if total == 0:
        raise ValueError(f"{files} has no usable row; {rejected.count} rejected ones are in {rejected.side_file}")
    summary = {
        "rows": total,
        "kept": kept.seen,
        "share_kept": round(kept.seen / total, 4),
        "rejected": rejected.count,
        "k": k,
        "block_size": block_size,
        "ranks": _rank_histogram(bands, total),
    }
    (output / "report.md").write_text(_report(files, summary, kept, dropped), encoding="utf-8")
    write_json(output / "summary.json", summary)
    return summary


def _score_rows(
    rows: Iterator[dict[str, Any]],
    work: Path,
    encoder: Encoder,
    block_size: int,
    query_column: str,
    document_column: str,
    progress: bool,
) -> Iterator[tuple[dict[str, Any], int, float]]:
    with tqdm(desc="filtering", unit=" rows", disable=not progress) as bar:
        for number in itertools.count():
            block = list(itertools.islice(rows, block_size))
            if not block:
                return
            folder = work / f"{number:05d}"
            compute = functools.partial(
                score_block,
                [row[query_column] for row in block],
                [row[document_column] for row in block],
                encoder,
                folder,
                label=f"block {number}",
                progress=progress,
            )
            scores = cached_array(work / f"{number:05d}.scores.npy", compute)
            # With the ranks saved, the embeddings (6 GB for a million pairs of width 768) have done their work.
            shutil.rmtree(folder, ignore_errors=True)
            yield from zip(block, scores["rank"].tolist(), scores["score"].tolist(), strict=True)
            bar.update(len(block))


def _rank_histogram(bands: Counter[int], total: int) -> list[dict[str, Any]]:
    histogram = []
    for band, start in enumerate(_BAND_STARTS):
        end = _BAND_STARTS[band + 1] - 1 if band + 1 < len(_BAND_STARTS) else None
        ranks = str(start) if end == start else f"{start}-{end}" if end else f"{start}-"
        histogram.append({"ranks": ranks, "rows": bands[band], "share": round(bands[band] / total, 4)})
    return histogram


def _report(files: str, summary: dict[str, Any], kept: Sample, dropped: Sample) -> str:
    ranks = summary["ranks"]
    so_far = itertools.accumulate(band["rows"] for band in ranks)
    shares = [(band["ranks"], band["rows"], count / summary["rows"]) for band, count in zip(ranks, so_far)]
    header = ("row", "rank", "score", "query", "document")
    return (
        f"# Consistency filter of {files}\n\n"
        f"Kept {summary['kept']:,} of {summary['rows']:,} pairs ({summary['share_kept']:.1%}): those whose document is "
        f"among the {summary['k']} nearest to its query, in blocks of {summary['block_size']:,}. "
        f"Rejected rows: {summary['rejected']:,}.\n\n"
        f"{table(('rank', 'rows', 'share up to here'), shares)}\n"
        f"## Kept, a sample\n\n{table(header, sorted(kept.items))}\n"
        f"## Dropped, a sample\n\n{table(header, sorted(dropped.items))}"
    )

"""Selects the rows that the consistency filter keeps, by their ranks, in one pass over the rows."""

import bisect
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nomic_jax.curate.engine.report import FileName, Sample, quarantine, table
from nomic_jax.curate.engine.settings import matching_summary, settings_sha256
from nomic_jax.curate.filter.ranking import RankingTask
from nomic_jax.data.formats.writing import write_rows
from nomic_jax.files.locks import exclusive_lock
from nomic_jax.files.printable import code
from nomic_jax.files.writing import atomic_file, write_json

_BAND_STARTS = (1, 2, 3, 4, 6, 11, 21, 101, 1001)  # lowest rank of each band of the rank histogram


def write_selection(files: str, output: Path, task: RankingTask, k: int, min_score: float | None) -> dict[str, Any]:
    """Writes kept.jsonl, scores.jsonl, report.md and summary.json by the ranks of the task; returns the summary."""
    rule = {"k": k, "min_score": min_score, "settings_sha256": settings_sha256(output / "work")}
    with exclusive_lock(output / "work" / ".select.lock"):
        summary = matching_summary(rule, output, ("kept.jsonl", "scores.jsonl", "report.md"))
        if summary is None:
            summary = _write_selection(files, output, task, rule)
        return summary


def _write_selection(files: str, output: Path, task: RankingTask, rule: Mapping[str, Any]) -> dict[str, Any]:
    k, min_score = rule["k"], rule["min_score"]
    bands: Counter[int] = Counter()
    of_file: dict[str, Counter[str]] = {file: Counter() for file in task.rows.counts}
    kept, dropped = Sample(), Sample()

    def select(scores_file) -> Iterator[dict[str, Any]]:
        scores = (pair for block in range(len(task)) for pair in np.load(task.file(block)).tolist())
        for number, ((file, row), (rank, score)) in enumerate(zip(task.rows.read(), scores, strict=True)):
            scores_file.write(json.dumps({"row": number, "rank": rank, "score": round(score, 6)}) + "\n")
            bands[bisect.bisect_right(_BAND_STARTS, rank) - 1] += 1
            is_kept = rank <= k and (min_score is None or score >= min_score)
            query, document = (row[column] for column in task.columns)
            (kept if is_kept else dropped).add((number, rank, score, query, document))
            of_file[file]["rows"] += 1
            if is_kept:
                of_file[file]["kept"] += 1
                yield row

    with atomic_file(output / "scores.jsonl") as part, part.open("w", encoding="utf-8") as scores_file:
        write_rows(output / "kept.jsonl", select(scores_file))
    total = len(task.rows)
    sizes = [stop - start for start, stop in task.blocks]
    summary: dict[str, Any] = {
        "rows": total,
        "kept": kept.seen,
        "share_kept": round(kept.seen / total, 4),
        "rejected": task.rows.rejected,
        "quarantined": [entry._asdict() for entry in task.rows.quarantined],
        **rule,
        "blocks": {"number": len(sizes), "smallest": min(sizes), "largest": max(sizes)},
        "search": _search(task),
        "ranks": _rank_histogram(bands, total),
        "files": [
            {"file": file, "rows": c["rows"], "kept": c["kept"], "share_kept": round(c["kept"] / max(1, c["rows"]), 4)}
            for file, c in of_file.items()
        ],
    }
    with atomic_file(output / "report.md") as part:
        part.write_text(_report(files, summary, kept, dropped), encoding="utf-8")
    write_json(output / "summary.json", summary)
    return summary


def _search(task: RankingTask) -> str | dict[str, Any]:
    found = [task.recall_file(block) for block in range(len(task)) if task.recall_file(block).exists()]
    if not found:
        return "exact"
    measured = [json.loads(file.read_text(encoding="utf-8")) for file in found]
    return {"approximate_blocks": len(found), "lowest": min(measured, key=lambda block: block["recall"])}


def _rank_histogram(bands: Counter[int], total: int) -> list[dict[str, Any]]:
    histogram = []
    for band, start in enumerate(_BAND_STARTS):
        end = _BAND_STARTS[band + 1] - 1 if band + 1 < len(_BAND_STARTS) else None
        ranks = str(start) if end == start else f"{start}-{end}" if end else f"{start}-"
        histogram.append({"ranks": ranks, "rows": bands[band], "share": round(bands[band] / total, 4)})
    return histogram


def _report(files: str, summary: dict[str, Any], kept: Sample, dropped: Sample) -> str:
    ranks, blocks = summary["ranks"], summary["blocks"]
    so_far = itertools.accumulate(band["rows"] for band in ranks)
    shares = [(band["ranks"], band["rows"], count / summary["rows"]) for band, count in zip(ranks, so_far)]
    by_file = [(FileName(file["file"]), file["rows"], file["kept"], file["share_kept"]) for file in summary["files"]]
    header = ("row", "rank", "score", "query", "document")
    return (
        f"# Consistency filter of {code(files)}\n\n"
        f"Kept {summary['kept']:,} of {summary['rows']:,} pairs ({summary['share_kept']:.1%}): those whose document is "
        f"among the {summary['k']} nearest to its query{threshold_text(summary)}, in {blocks['number']:,} blocks of "
        f"{blocks['smallest']:,} to {blocks['largest']:,} rows. Rejected rows: {summary['rejected']:,}. "
        f"{_search_text(summary['search'])}\n\n"
        f"{quarantine(summary)}{table(('rank', 'rows', 'cumulative share'), shares)}\n"
        + (f"{table(('file', 'rows', 'kept', 'share kept'), by_file)}\n" if len(by_file) > 1 else "")
        + f"## Kept, a sample\n\n{table(header, sorted(kept.items))}\n"
        f"## Dropped, a sample\n\n{table(header, sorted(dropped.items))}"
    )


def threshold_text(summary: dict[str, Any]) -> str:
    return "" if summary["min_score"] is None else f" and scores at least {summary['min_score']}"


def _search_text(search: str | dict[str, Any]) -> str:
    if isinstance(search, str):
        return "The search was exact."
    low = search["lowest"]
    return (
        f"{search['approximate_blocks']:,} blocks were searched approximately (nlist {low['nlist']}, nprobe "
        f"{low['nprobe']}); in the worst, the index found {low['recall']:.1%} of the {low['k']} nearest of "
        f"{low['queries']:,} queries."
    )

"""Hard negatives: for each pair, documents that a teacher finds near the query but that are not its positives."""

import contextlib
import dataclasses
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from nomic_jax.curate.engine.embedding import Encoder
from nomic_jax.curate.engine.report import Sample, quarantine, table
from nomic_jax.curate.engine.settings import fingerprints, locked_settings, matching_summary, settings_sha256
from nomic_jax.curate.mine.candidates import EmbeddingTask, SearchTask
from nomic_jax.curate.mine.corpus import Pairs, collect_pairs
from nomic_jax.curate.mine.selection import MiningOptions, choose_negatives, find_candidates
from nomic_jax.data.formats.paths import input_files
from nomic_jax.data.formats.writing import write_rows
from nomic_jax.files.folders import check_only
from nomic_jax.files.locks import exclusive_lock
from nomic_jax.files.printable import code
from nomic_jax.files.writing import atomic_file, write_json
from nomic_jax.jobs.tasks import Engine, Task, local_engine

SCORE_COLUMNS = ("document_score", "negative_scores")  # the teacher's
OUTPUTS = {"triplets.jsonl", "rejected.jsonl", "summary.json", "report.md", "work"}


def mine_negatives(
    files: str,
    output: str | os.PathLike,
    encoder: Encoder | None,
    options: MiningOptions,
    *,
    query_column: str = "query",
    document_column: str = "document",
    corpus: str | None = None,
    corpus_column: str = "document",
    on_bad_row: str = "raise",
    engine: Engine = local_engine,
    progress: bool = True,
) -> dict[str, Any]:
    """Writes the rows with their negatives as triplets, in input order.

    A row keeps its columns and gains ``negatives`` (texts, nearest first) and, with an encoder, ``negative_scores`` and
    ``document_score``. A row whose document column has a list of positives becomes one triplet per positive. Negatives
    come from the distinct documents of the rows and of ``corpus``. Texts and embeddings are in files; memory holds
    about 150 bytes per distinct text and 100 bytes per pair. Any number of processes may work on one output: they share
    embedding and search. ``output`` receives

        triplets.jsonl  the rows
        rejected.jsonl  rows that cannot be used and files that were set aside, with on_bad_row="skip"
        summary.json    the returned dictionary
        report.md       the summary as a page, with a sample of written and dropped rows
        work/           embeddings, which a restart after a kill or a run with other options reuses

    Args:
      encoder: the teacher, or None for ``options.k`` random documents per row (fewer if there are fewer).
      corpus: files with additional documents in ``corpus_column``.
      engine: embeds and searches the texts.

    Raises:
      ValueError: ``output`` has embeddings of other files or columns, or of another encoder; there is no usable row; a
        row has too few negatives, with too_few="error" or if there are not enough documents for "random".
      BadRow: a row cannot be used, with on_bad_row="raise".
    """
    output, columns = Path(output), (query_column, document_column)
    common: dict[str, Any] = {"on_bad_row": on_bad_row, "progress": progress}
    corpus_and_column = (corpus, corpus_column) if corpus else None
    with collected(files, output, encoder, options, columns, corpus_and_column, **common) as inputs:
        find_candidates_of([output], encoder, options, engine, progress)
        return write_mined(files, inputs, output, encoder, options, columns, progress)


@contextlib.contextmanager
def collected(
    files: str,
    output: Path,
    encoder: Encoder | None,
    options: MiningOptions,
    columns: tuple[str, str],
    corpus: tuple[str, str] | None = None,
    *,
    on_bad_row: str,
    progress: bool,
) -> Iterator[list[str]]:
    """Reads and checks all rows, and yields the input files for ``write_mined``.

    Meanwhile, the output is locked against other settings. Arguments as for ``mine_negatives``; ``corpus`` is its files
    and their column.
    """
    check_only(output, OUTPUTS.__contains__, "launch.mine")
    work = output / "work"
    settings = dict(zip(("query_column", "document_column"), columns))
    inputs = input_files(files, output)
    settings |= fingerprints("input", inputs, on_bad_row)
    if encoder:
        settings |= encoder.identity
    corpus_files, corpus_column = (input_files(corpus[0], output), corpus[1]) if corpus else (None, "")
    if corpus_files:
        settings |= {"corpus_column": corpus_column, **fingerprints("corpus", corpus_files, on_bad_row)}
    with locked_settings(work, settings):
        with exclusive_lock(work / ".pairs.lock"):
            pairs = collect_pairs(
                inputs,
                *columns,
                corpus_files,
                corpus_column,
                work / "pairs",
                output / "rejected.jsonl",
                on_bad_row=on_bad_row,
                progress=progress,
            )
        _check_enough_documents(files, pairs, options)
        del pairs  # its files: a mixture has many
        yield inputs


def find_candidates_of(
    outputs: Sequence[Path], encoder: Encoder | None, options: MiningOptions, engine: Engine, progress: bool
) -> None:
    """Embeds and searches what ``collected`` has read into each output, while its ``with`` block lasts."""

    def embedding(work: Path) -> list[Task]:
        pairs = Pairs(work / "pairs")
        return [
            EmbeddingTask(pairs.queries, "query", work, progress),
            EmbeddingTask(pairs.documents, "document", work, progress),
        ]

    def search(work: Path) -> list[Task]:
        return [SearchTask(Pairs(work / "pairs"), work, options.k, options.approximate_above, progress)]

    if not encoder:
        return
    steps: tuple[tuple[Callable[[Path], list[Task]], Encoder | None], ...] = ((embedding, encoder), (search, None))
    for tasks, worker in steps:
        for wait in (False, True):  # do not wait for other processes in the first pass: the next output has work
            for output in outputs:
                for task in tasks(output / "work"):
                    engine(task, worker, wait)


def write_mined(
    files: str,
    inputs: list[str],
    output: Path,
    encoder: Encoder | None,
    options: MiningOptions,
    columns: tuple[str, str],
    progress: bool,
) -> dict[str, Any]:
    """Writes the triplets of the candidates that ``find_candidates_of`` has found; returns the summary.

    Arguments as for ``collected``, which yields ``inputs``.
    """
    work = output / "work"
    pairs = Pairs(work / "pairs")
    search = SearchTask(pairs, work, options.k, options.approximate_above, progress)
    rule = {
        "options": dataclasses.asdict(options),
        "negatives_are": "mined" if encoder else "random",
        "candidates": "without positives",  # earlier versions counted positives among the k
        "settings_sha256": settings_sha256(work),
    }
    with exclusive_lock(work / ".select.lock"):
        summary = matching_summary(rule, output, ("triplets.jsonl", "report.md"))
        if summary is None:
            rows = pairs.read(inputs, *columns)
            summary = rule | _write_triplets(rows, output, pairs, search if encoder else None, options, *columns)
            summary["search"] = search.recall() if encoder else "none"
            with atomic_file(output / "report.md") as part:
                part.write_text(_report(files, summary), encoding="utf-8")
            del summary["samples"]
            write_json(output / "summary.json", summary)
    return summary


def _check_enough_documents(files: str, pairs: Pairs, options: MiningOptions) -> None:
    """Raises ValueError, before anything is embedded, if some row cannot get the negatives that it has to get."""
    query, positives = pairs.most_positives()
    left = len(pairs.documents) - positives
    if options.too_few != "drop" and left < options.num_negatives:
        raise ValueError(
            f"{files}: {positives} of the {len(pairs.documents)} distinct documents are positives of the query "
            f"{pairs.queries[query][:80]!r}; the {left} others are fewer than its {options.num_negatives} negatives: "
            f'lower num_negatives, add a corpus, or set too_few to "drop"'
        )


def _write_triplets(
    rows: Iterator[dict[str, Any]],
    output: Path,
    pairs: Pairs,
    search: SearchTask | None,
    options: MiningOptions,
    query_column: str,
    document_column: str,
) -> dict[str, Any]:
    counts: Counter[str] = Counter()
    sizes: Counter[int] = Counter()
    written, dropped = Sample(), Sample()

    def triplets() -> Iterator[dict[str, Any]]:
        for row, candidates in zip(rows, find_candidates(pairs, search), strict=True):
            number, query = candidates.number, row[query_column]
            negatives, row_counts = choose_negatives(candidates, pairs, search, options)
            counts.update(row_counts)
            if len(negatives) < options.num_negatives:
                if options.too_few != "drop":
                    raise ValueError(_too_few(number, query, len(negatives), pairs, options))
                # Without the margin there would be enough, or there are too few other documents.
                is_margin = len(negatives) + row_counts.get("beyond_margin", 0) >= options.num_negatives
                counts["dropped by the margin" if is_margin else "dropped for want of documents"] += 1
                why = "scores too near the positive's (margin)" if is_margin else "too few other documents"
                dropped.add((number, query, row[document_column], len(negatives), why))
                continue
            triplet = row | {"negatives": [pairs.documents[document] for document, _ in negatives]}
            _declare(triplet, [query_column, document_column, "negatives"])
            if search:
                of_document, of_negatives = SCORE_COLUMNS
                triplet[of_negatives] = [round(score, 6) for _, score in negatives]
                triplet[of_document] = round(candidates.score, 6)
            sizes[len(negatives)] += 1
            written.add((number, query, row[document_column], triplet))
            yield triplet

    write_rows(output / "triplets.jsonl", triplets())
    return {
        "rows": pairs.rows,
        "pairs": len(pairs),
        "written": written.seen,
        "dropped_too_few": dropped.seen,
        "dropped_by_margin": counts["dropped by the margin"],
        "dropped_for_want_of_documents": counts["dropped for want of documents"],
        "filled_with_random": counts["filled"],
        "candidates_beyond_margin": counts["beyond_margin"],
        "rejected": pairs.rejected,
        "quarantined": [entry._asdict() for entry in pairs.quarantined],
        "distinct_queries": len(pairs.queries),
        "distinct_documents": len(pairs.documents),
        "negatives": [{"negatives": size, "rows": count} for size, count in sorted(sizes.items())],
        "samples": (written, dropped),
    }


def _declare(row: dict[str, Any], columns: list[str]) -> None:
    """Updates metadata.objective, in which rows of the original Nomic data format declare their columns."""
    metadata = row.get("metadata")
    if isinstance(metadata, dict) and isinstance(metadata.get("objective"), dict):
        row["metadata"] = metadata | {"objective": metadata["objective"] | {"triplet": [columns]}}


def _too_few(number: int, query: str, found: int, pairs: Pairs, options: MiningOptions) -> str:
    where = f"row {number} (query {query[:80]!r}) has {found} negatives of the {options.num_negatives} it needs"
    if options.too_few == "random":
        documents = len(pairs.documents)
        return f"{where}, and there are no more among the {documents} distinct documents: lower k, or add a corpus"
    return f'{where}: raise k or margin, or set too_few to "drop" or "random"'


def _report(files: str, summary: dict[str, Any]) -> str:
    written, dropped = summary["samples"]
    lines = []
    for number, query, document, triplet in sorted(written.items, key=lambda item: item[0]):
        lines.append((number, "query", "", query))
        lines.append(("", "document", triplet.get("document_score", ""), document))
        scores = triplet.get("negative_scores", [""] * len(triplet["negatives"]))
        lines += [
            ("", f"negative {i}", s, text) for i, (s, text) in enumerate(zip(scores, triplet["negatives"][:3]), 1)
        ]
    header = ("pair", "query", "document", "negatives left", "why")
    options = ", ".join(f"{name} {value}" for name, value in summary["options"].items() if value is not None)
    counts = [(name.replace("_", " "), value) for name, value in summary.items() if isinstance(value, int)]
    return (
        f"# Negatives of {code(files)}\n\n"
        f"{summary['negatives_are'].capitalize()}, with {options}.{_recall(summary)}\n\n"
        f"{quarantine(summary)}{table(('', 'count'), counts)}\n"
        f"{table(('negatives', 'pairs'), [tuple(size.values()) for size in summary['negatives']])}\n"
        f"## Written, a sample\n\n{table(('pair', '', 'score', 'text'), lines)}\n"
        f"## Dropped for too few negatives, a sample\n\n{table(header, sorted(dropped.items))}"
    )


def _recall(summary: dict[str, Any]) -> str:
    search = summary["search"]
    if isinstance(search, str):
        return ""
    return (
        f" The search was approximate (nlist {search['nlist']}, nprobe {search['nprobe']}): it found "
        f"{search['recall']:.1%} of the {search['k']} nearest of {search['queries']:,} queries."
    )

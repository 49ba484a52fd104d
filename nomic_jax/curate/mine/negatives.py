"""Hard negatives: for each pair, documents that a teacher finds near the query but that are not its positives."""

import contextlib
import dataclasses
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from nomic_jax.curate.engine.embedding import Encoder
from nomic_jax.curate.engine.index import pair_scores
from nomic_jax.curate.engine.report import Sample, quarantine, table
from nomic_jax.curate.engine.settings import fingerprints, locked_settings, matching_summary, settings_sha256
from nomic_jax.curate.engine.tasks import Engine, local_engine
from nomic_jax.curate.mine.candidates import EmbeddingTask, SearchTask
from nomic_jax.curate.mine.corpus import Pairs, collect_pairs
from nomic_jax.data.formats.paths import input_files
from nomic_jax.data.formats.writing import write_rows
from nomic_jax.files.folders import check_only
from nomic_jax.files.locks import exclusive_lock
from nomic_jax.files.printable import code
from nomic_jax.files.writing import atomic_file, write_json

PAIRS_AT_ONCE = 1024
OUTPUTS = {"triplets.jsonl", "rejected.jsonl", "summary.json", "report.md", "work"}


@dataclasses.dataclass(frozen=True)
class MiningOptions:
    """Which documents become negatives.

    A row's positives are its own document and those of all rows with the same query. Positives, and a document that
    equals the query, are never negatives. Texts are equal if they differ only in surrounding whitespace.

    Attributes:
      k: number of candidates per query: the k nearest documents that are not its positives.
      margin: keep candidates that score less than margin * the positive's score (NV-Retriever's TopK-PercPos). If a
        query has several positives, the lowest score counts, as in sentence-transformers. 0 keeps all candidates. For
        negative scores, the limit is the positive's score - (1 - margin) * its absolute value.
      range_min, range_max: keep candidates of ranks range_min ... range_max - 1, counted from 0 without the positives.
      num_negatives: number of negatives that training needs per row.
      too_few: what to do with a row that has fewer: "drop" it, add "random" documents that are not among its candidates
        (a candidate removed by the margin may be a positive), or stop with an "error".
      seed: seed of the random documents. They depend only on the seed, the pair's number and the documents.
      approximate_above: if there are more distinct documents than this, search with an ``ApproximateIndex``, whose
        recall is reported. None: the search is always exact.
    """

    k: int = 20
    margin: float = 0.95
    range_min: int = 0
    range_max: int | None = None
    num_negatives: int = 7
    too_few: str = "drop"
    seed: int = 0
    approximate_above: int | None = None

    def __post_init__(self):
        end = self.k if self.range_max is None else self.range_max
        if not 0 <= self.range_min < end <= self.k:
            raise ValueError(
                f"range_min {self.range_min} and range_max {end} must be a range of ranks below k, {self.k}; raise k"
            )
        if not 1 <= self.num_negatives <= end - self.range_min:
            raise ValueError(
                f"num_negatives is {self.num_negatives}; at most {end - self.range_min} can be found: raise k, or "
                f"lower num_negatives"
            )
        if not 0 <= self.margin <= 1:
            raise ValueError(
                f"margin is {self.margin}; write a share of the positive's score such as 0.95, or 0 for none"
            )
        if self.too_few not in ("drop", "random", "error"):
            raise ValueError(f'too_few is {self.too_few!r}; write "drop", "random" or "error"')
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; it must not be negative")


@dataclasses.dataclass(frozen=True)
class Candidates:
    """The candidates of one pair.

    Attributes:
      number: number of the pair.
      query: number of its query.
      near: the documents nearest to the query that can be negatives (neither positives of the query, nor equal to it)
        with their scores, best first; None without a teacher.
      score: score of the pair's document.
      lowest: lowest score of the query's positives.
    """

    number: int
    query: int
    near: list[tuple[int, float]] | None
    score: float
    lowest: float


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
        return mine_collected(files, inputs, output, encoder, options, columns, engine, progress)


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
    """Reads and checks all rows, and yields the input files for ``mine_collected``.

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


def mine_collected(
    files: str,
    inputs: list[str],
    output: Path,
    encoder: Encoder | None,
    options: MiningOptions,
    columns: tuple[str, str],
    engine: Engine,
    progress: bool,
) -> dict[str, Any]:
    """Mines the pairs that ``collected`` has read, while its ``with`` block lasts. Arguments as for both functions."""
    work = output / "work"
    pairs = Pairs(work / "pairs")
    search = SearchTask(pairs, work, options.k, options.approximate_above, progress)
    if encoder:
        for wait in (False, True):  # do not wait for other processes in the first pass
            engine(EmbeddingTask(pairs.queries, "query", work / "queries", progress), encoder, wait)
            engine(EmbeddingTask(pairs.documents, "document", work / "documents", progress), encoder, wait)
        engine(search, None, True)
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
            negatives, row_counts = _choose(candidates, pairs, search, options)
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
                triplet["negative_scores"] = [round(score, 6) for _, score in negatives]
                triplet["document_score"] = round(candidates.score, 6)
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


def find_candidates(pairs: Pairs, search: SearchTask | None, at_once: int = PAIRS_AT_ONCE) -> Iterator[Candidates]:
    """Yields the candidates of all pairs, in order, computed for ``at_once`` pairs at a time.

    A query's positives are looked up, and never listed for each of its pairs: a label that serves as a query may have
    100,000 of both.
    """
    lowest_Q = _lowest_scores(pairs, search, at_once) if search else np.zeros(0, np.float32)
    for start in range(0, len(pairs), at_once):
        chunk = slice(start, start + at_once)
        query_P, document_P = np.asarray(pairs.query_P[chunk]), np.asarray(pairs.document_P[chunk])
        if not search:
            for i, query in enumerate(query_P.tolist(), start):
                yield Candidates(i, query, None, 0.0, 0.0)
            continue
        query_U, at_P = np.unique(query_P, return_inverse=True)
        score_P = pair_scores(search.query_QE, query_P, search.document_DE, document_P)
        near_U = [[item for item in items if item[0] >= 0] for items in search.near[query_U].tolist()]
        for i, (at, query, score) in enumerate(zip(at_P.tolist(), query_P.tolist(), score_P.tolist()), start):
            yield Candidates(i, query, near_U[at], score, float(lowest_Q[query]))


def _lowest_scores(pairs: Pairs, search: SearchTask, at_once: int) -> np.ndarray:
    """Returns the lowest score of each query's positives, float32 [Q]."""
    lowest_Q = np.full(len(pairs.queries), np.inf, np.float32)
    for query_P, document_P in pairs.distinct_pairs(at_once):
        score_P = pair_scores(search.query_QE, query_P, search.document_DE, document_P)
        np.minimum.at(lowest_Q, query_P, score_P)
    return lowest_Q


def _choose(
    candidates: Candidates, pairs: Pairs, search: SearchTask | None, options: MiningOptions
) -> tuple[list[tuple[int, float]], dict[str, int]]:
    """Returns the negatives of a pair with their scores, and counts for the summary."""
    if candidates.near is None:
        return [(document, 0.0) for document in _random_documents(candidates, options.k, pairs, options)], {}
    ranked = candidates.near[options.range_min : options.range_max]
    limit = candidates.lowest - (1 - options.margin) * abs(candidates.lowest) if options.margin else float("inf")
    chosen = [(document, score) for document, score in ranked if score < limit]
    counts = {"beyond_margin": len(ranked) - len(chosen)}
    missing = options.num_negatives - len(chosen)
    if missing > 0 and options.too_few == "random":
        assert search is not None
        counts["filled"] = 1
        sampled = _random_documents(candidates, missing, pairs, options)
        query_P = np.full(len(sampled), candidates.query)
        scores = pair_scores(search.query_QE, query_P, search.document_DE, np.array(sampled, np.int64))
        chosen += zip(sampled, scores.tolist())
    return chosen, counts


def _random_documents(candidates: Candidates, count: int, pairs: Pairs, options: MiningOptions) -> list[int]:
    """Returns ``count`` distinct documents that can be negatives and are not near, or all there are."""
    random = np.random.default_rng((options.seed, candidates.number))
    query, total = candidates.query, len(pairs.documents)
    near = {document for document, _ in candidates.near or ()}
    free = total - len(pairs.positives_of(query)) - (int(pairs.own_Q[query]) >= 0) - len(near)  # at least so many
    if free < max(count * 4, total // 8):
        # Few are left: list them. The list is short, and shared by the pairs of the query, if there are many documents.
        left = [document for document in pairs.unrelated(query).tolist() if document not in near]
        return random.permutation(left)[:count].tolist()
    chosen: dict[int, None] = {}
    while len(chosen) < count:
        sampled_N = random.integers(0, total, 2 * count)
        allowed_N = pairs.can_be_negative(sampled_N, query)
        chosen |= dict.fromkeys(document for document in sampled_N[allowed_N].tolist() if document not in near)
    return list(chosen)[:count]


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

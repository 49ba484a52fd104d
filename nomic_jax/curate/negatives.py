"""Hard negatives: for each pair, the documents that a teacher finds near its query though they do not belong to it."""

import dataclasses
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from nomic_jax.curate.blocks import Encoder, distinct_texts, embed_texts, fingerprints, hold_settings
from nomic_jax.curate.index import pair_scores, top_k
from nomic_jax.curate.report import Sample, table
from nomic_jax.data.sources import RejectedRows, expand_files, read_rows, write_json, write_rows


@dataclasses.dataclass(frozen=True)
class MiningOptions:
    """Which documents become negatives.

    A row's positives are its own document and those of every row with the same query. They, and a document that equals
    the query, are never negatives. Texts are equal if they differ in surrounding whitespace only.

    Attributes:
      k: candidates a query: its k nearest documents, before positives are taken out.
      margin: keep candidates that score less than margin * the positive's score, the best one's where a query has
        several (NV-Retriever's TopK-PercPos); 0 keeps all. Where the positive scores 0 or less, a candidate has to
        score less than the positive.
      range_min, range_max: keep candidates of ranks range_min ... range_max - 1, counted from 0 without the positives.
      num_negatives: what training needs of each row.
      too_few: what becomes of a row with fewer: "drop" it, fill it up with "random" documents that are not among its
        candidates (one that the margin took out may well be a positive), or stop with an "error".
      seed: of the random documents, which depend on it, the row's number and the documents, on nothing else.
    """

    k: int = 20
    margin: float = 0.95
    range_min: int = 0
    range_max: int | None = None
    num_negatives: int = 7
    too_few: str = "drop"
    seed: int = 0

    def __post_init__(self):
        end = self.k if self.range_max is None else self.range_max
        if not 0 <= self.range_min < end <= self.k:
            raise ValueError(
                f"range_min {self.range_min} and range_max {end} must be a range of ranks below k, {self.k}"
            )
        if not 1 <= self.num_negatives <= end - self.range_min:
            raise ValueError(
                f"num_negatives is {self.num_negatives}; at most {end - self.range_min} can be found: raise k"
            )
        if not 0 <= self.margin <= 1:
            raise ValueError(
                f"margin is {self.margin}; write a share of the positive's score such as 0.95, or 0 for none"
            )
        if self.too_few not in ("drop", "random", "error"):
            raise ValueError(f'too_few is {self.too_few!r}; write "drop", "random" or "error"')
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; it must not be negative")


class Pairs:
    """The distinct queries and documents of rows, and what belongs together.

    Attributes:
      queries, documents: distinct texts, those of the corpus after those of the rows.
      query_R, document_R: each row's place in them, int64.
      excluded: for each query, the documents that are not its negatives: its positives, and its own text.
    """

    def __init__(self, rows: list[dict[str, Any]], query_column: str, document_column: str, corpus: list[str]):
        self.queries, self.query_R = distinct_texts(row[query_column] for row in rows)
        self.documents, places = distinct_texts([row[document_column] for row in rows] + corpus)
        self.document_R = places[: len(rows)]
        place = {text.strip(): i for i, text in enumerate(self.documents)}
        self.excluded = [{place[text.strip()]} if text.strip() in place else set() for text in self.queries]
        for query, document in zip(self.query_R.tolist(), self.document_R.tolist()):
            self.excluded[query].add(document)


class Embedded:
    """The teacher's view of pairs.

    Attributes:
      near_QK, score_QK: each query's nearest documents and their scores.
      score_R: of each row's own document.
      best_Q: the highest of a query's positives.
    """

    def __init__(self, pairs: Pairs, encoder: Encoder, work: Path, k: int, progress: bool):
        self.query_QE = embed_texts(
            pairs.queries, encoder.query, work / "queries", label="embedding queries", progress=progress
        )
        self.document_DE = embed_texts(
            pairs.documents, encoder.document, work / "documents", label="embedding documents", progress=progress
        )
        self.near_QK, self.score_QK = top_k(self.query_QE, self.document_DE, k, progress=progress)
        self.score_R = pair_scores(self.query_QE, pairs.query_R, self.document_DE, pairs.document_R)
        self.best_Q = np.full(len(pairs.queries), -np.inf, np.float32)
        np.maximum.at(self.best_Q, pairs.query_R, self.score_R)

    def scores(self, query: int, documents: list[int]) -> list[float]:
        found = pair_scores(self.query_QE, np.full(len(documents), query), self.document_DE, np.array(documents, int))
        return [round(score, 6) for score in found.tolist()]


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
    progress: bool = True,
) -> dict[str, Any]:
    """Writes the rows with their negatives: triplets, in input order.

    A row keeps its columns and gains ``negatives`` (texts, nearest first), and where an encoder is at work
    ``negative_scores`` and ``document_score``. Negatives come from the distinct documents of rows and ``corpus``.
    Memory holds all of it: the rows, and 4 * E bytes for each distinct text. ``output`` receives

        triplets.jsonl  the rows
        rejected.jsonl  rows that could not be used, under on_bad_row="skip"
        summary.json    the dictionary that is returned
        report.md       the same to read, with a sample of written and dropped rows
        work/           embeddings: a run that was killed, or another with other options, does not make them again

    Args:
      encoder: the teacher, or None for ``options.k`` random documents a row (fewer if there are no more).
      corpus: files of more documents, in ``corpus_column``.

    Raises:
      ValueError: ``output`` holds embeddings of other files or columns, or of another encoder; no usable row; a row
        with too few negatives, under too_few="error" or where there are not enough documents for "random".
      BadRow: a row that cannot be used, under on_bad_row="raise".
    """
    output = Path(output)
    if encoder:
        settings = {"query_column": query_column, "document_column": document_column, **encoder.identity}
        settings |= fingerprints("input", expand_files(files))
        if corpus:
            settings |= {"corpus_column": corpus_column, **fingerprints("corpus", expand_files(corpus))}
        hold_settings(output / "work", settings)

    rejected = RejectedRows(output / "rejected.jsonl")
    columns = {query_column: str, document_column: str}
    rows = list(read_rows(files, columns, on_bad_row=on_bad_row, rejected=rejected))
    if not rows:
        raise ValueError(f"{files} has no usable row; {rejected.count} rejected ones are in {rejected.side_file}")
    more = read_rows(corpus, {corpus_column: str}, on_bad_row=on_bad_row, rejected=rejected) if corpus else ()
    pairs = Pairs(rows, query_column, document_column, [row[corpus_column] for row in more])
    embedded = Embedded(pairs, encoder, output / "work", options.k, progress) if encoder else None

    counts: Counter[str] = Counter()
    sizes: Counter[int] = Counter()
    written, dropped = Sample(), Sample()

    def triplets() -> Iterator[dict[str, Any]]:
        for number, row in enumerate(rows):
            documents, row_counts = _choose(number, pairs, embedded, options)
            counts.update(row_counts)
            query = row[query_column]
            if len(documents) < options.num_negatives:
                if options.too_few != "drop":
                    raise ValueError(_too_few(number, query, documents, pairs, options))
                dropped.add((number, query, row[document_column], len(documents)))
                continue
            triplet = {**row, "negatives": [pairs.documents[document] for document in documents]}
            if embedded:
                triplet["negative_scores"] = embedded.scores(int(pairs.query_R[number]), documents)
                triplet["document_score"] = round(float(embedded.score_R[number]), 6)
            sizes[len(documents)] += 1
            written.add((number, query, triplet))
            yield triplet

    write_rows(output / "triplets.jsonl", triplets())
    summary = {
        "rows": len(rows),
        "written": written.seen,
        "dropped_too_few": dropped.seen,
        "filled_with_random": counts["filled"],
        "candidates_beyond_margin": counts["beyond_margin"],
        "rejected": rejected.count,
        "negatives_are": "mined" if encoder else "random",
        "distinct_queries": len(pairs.queries),
        "distinct_documents": len(pairs.documents),
        "negatives": [{"negatives": size, "rows": count} for size, count in sorted(sizes.items())],
        "options": dataclasses.asdict(options),
    }
    (output / "report.md").write_text(_report(files, document_column, summary, written, dropped), encoding="utf-8")
    write_json(output / "summary.json", summary)
    return summary


def _choose(
    number: int, pairs: Pairs, embedded: Embedded | None, options: MiningOptions
) -> tuple[list[int], dict[str, int]]:
    """The documents that are negatives of a row, and what happened on the way, to be counted."""
    query = int(pairs.query_R[number])
    excluded = pairs.excluded[query]
    if embedded is None:
        return _random_documents(number, options.k, pairs, excluded, options), {}
    near = embedded.near_QK[query].tolist()
    ranked = [(document, score) for document, score in zip(near, embedded.score_QK[query]) if document not in excluded]
    ranked = ranked[options.range_min : options.range_max]
    best = embedded.best_Q[query]
    limit = min(options.margin * best, best) if options.margin else np.inf
    chosen = [document for document, score in ranked if score < limit]
    counts = {"beyond_margin": len(ranked) - len(chosen)}
    missing = options.num_negatives - len(chosen)
    if missing > 0 and options.too_few == "random":
        counts["filled"] = 1
        chosen += _random_documents(number, missing, pairs, excluded | set(near), options)
    return chosen, counts


def _random_documents(number: int, count: int, pairs: Pairs, excluded: set[int], options: MiningOptions) -> list[int]:
    """``count`` distinct documents that are not excluded, or all of them if there are fewer."""
    random = np.random.default_rng((options.seed, number))
    drawn = random.choice(len(pairs.documents), min(count + len(excluded), len(pairs.documents)), replace=False)
    return [document for document in drawn.tolist() if document not in excluded][:count]


def _too_few(number: int, query: str, documents: list[int], pairs: Pairs, options: MiningOptions) -> str:
    where = (
        f"row {number} (query {query[:80]!r}) has {len(documents)} negatives of the {options.num_negatives} it needs"
    )
    if options.too_few == "random":
        return f"{where}, and no more among the {len(pairs.documents)} distinct documents: lower k, or add a corpus"
    return f'{where}: raise k or margin, or set too_few to "drop" or "random"'


def _report(files: str, document_column: str, summary: dict[str, Any], written: Sample, dropped: Sample) -> str:
    lines = []
    for number, query, triplet in sorted(written.items):
        lines.append((number, "query", "", query))
        lines.append(("", "document", triplet.get("document_score", ""), triplet[document_column]))
        scores = triplet.get("negative_scores", [""] * len(triplet["negatives"]))
        lines += [
            ("", f"negative {i}", s, text) for i, (s, text) in enumerate(zip(scores, triplet["negatives"][:3]), 1)
        ]
    header = ("row", "query", "document", "negatives left")
    options = ", ".join(f"{name} {value}" for name, value in summary["options"].items() if value is not None)
    counts = [(name.replace("_", " "), value) for name, value in summary.items() if isinstance(value, int)]
    return (
        f"# Negatives of {files}\n\n{summary['negatives_are'].capitalize()}, with {options}.\n\n"
        f"{table(('', 'count'), counts)}\n"
        f"{table(('negatives', 'rows'), [tuple(size.values()) for size in summary['negatives']])}\n"
        f"## Written, a sample\n\n{table(('row', '', 'score', 'text'), lines)}\n"
        f"## Dropped for too few, a sample\n\n{table(header, sorted(dropped.items))}"
    )

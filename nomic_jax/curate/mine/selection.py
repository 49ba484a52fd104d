"""Which documents become the negatives of a pair, among the candidates that a search has found."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from nomic_jax.curate.engine.index import pair_scores
from nomic_jax.curate.mine.candidates import SearchTask
from nomic_jax.curate.mine.corpus import Pairs

PAIRS_AT_ONCE = 1024


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


def choose_negatives(
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

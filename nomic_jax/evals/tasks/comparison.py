"""Compares two rankings of one retrieval task query by query: is the difference more than chance, and where is it?"""

import dataclasses
from typing import NamedTuple

import numpy as np

from nomic_jax.evals.tasks.retrieval import RetrievalTask

RESAMPLES = 10_000
CONFIDENCE = 0.95
BLOCK = 1 << 22  # counts of resamples that are in memory at a time


class Difference(NamedTuple):
    """The means of a metric in two rankings, and the interval of their difference.

    Attributes:
      before, after: means over the queries.
      low, high: the interval of ``after - before`` at the level CONFIDENCE, by a paired bootstrap over the queries
        (Efron's percentile interval; paired as in Smucker, Allan and Carterette, CIKM 2007).
    """

    before: float
    after: float
    low: float
    high: float

    @property
    def gain(self) -> float:
        return self.after - self.before

    @property
    def is_better(self) -> bool:
        return self.low > 0

    @property
    def is_worse(self) -> bool:
        return self.high < 0


class Change(NamedTuple):
    """A query whose right document has another rank.

    Attributes:
      query, document: the texts; the document is the relevant one that ranks highest in either ranking.
      before, after: its ranks, from 1; None below the depth of the rankings.
    """

    query: str
    document: str
    before: int | None
    after: int | None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two rankings of the same task, as ``RetrievalTask.rank`` returns them."""

    task: RetrievalTask
    before_QK: np.ndarray
    after_QK: np.ndarray

    def differences(self) -> dict[str, Difference]:
        """Returns metric -> its difference."""
        after = dict(self.task.score_queries(self.after_QK))
        return {
            metric: difference(before_Q, after[metric]) for metric, before_Q in self.task.score_queries(self.before_QK)
        }

    def changes(self, most: int = 10) -> list[Change]:
        """Returns the queries whose right document moved most, in both directions, the largest move first.

        A move is measured in 1 / log2(1 + rank), the discount of nDCG: from 1 to 2 is more than from 50 to 90.
        """
        found = [self._change(query) for query in range(len(self.task.queries))]
        moved = [change for change in found if change is not None and change.before != change.after]
        moved.sort(key=lambda change: -abs(_discount(change.before) - _discount(change.after)))
        return moved[:most]

    def _change(self, query: int) -> Change | None:
        relevant = self.task.relevance[query]
        ranks = [self._ranks(ranking_QK, query) for ranking_QK in (self.before_QK, self.after_QK)]
        best = min(relevant, key=lambda i: min(rank.get(i, np.inf) for rank in ranks), default=None)
        if best is None:
            return None
        before, after = (rank.get(best) for rank in ranks)
        return Change(self.task.queries[query], self.task.documents[best], before, after)

    def _ranks(self, ranking_QK: np.ndarray, query: int) -> dict[int, int]:
        """Returns relevant document -> rank."""
        own = self.task.ignored[query] if self.task.ignored else -1
        kept = [document for document in ranking_QK[query].tolist() if document != own]
        return {i: rank for rank, i in enumerate(kept, 1) if i in self.task.relevance[query]}


def _discount(rank: int | None) -> float:
    return 0.0 if rank is None else 1 / np.log2(1 + rank)


def difference(before_Q: np.ndarray, after_Q: np.ndarray, seed: int = 0) -> Difference:
    """Returns the means of two series of figures of the same queries, and the interval of their difference."""
    # A resample counts how often it has each query. Queries with the same difference are counted together.
    gain_N, count_N = np.unique(np.asarray(after_Q, np.float64) - before_Q, return_counts=True)
    queries = len(before_Q)
    rng = np.random.default_rng(seed)
    at_once = max(1, BLOCK // len(gain_N))
    mean_R = np.concatenate(
        [
            rng.multinomial(queries, count_N / queries, min(at_once, RESAMPLES - start)) @ gain_N / queries
            for start in range(0, RESAMPLES, at_once)
        ]
    )
    low, high = np.quantile(mean_R, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Difference(float(np.mean(before_Q)), float(np.mean(after_Q)), float(low), float(high))

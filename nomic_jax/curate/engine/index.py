"""Inner-product search with faiss. Results depend only on the vectors: neither ties nor batch sizes change them.

Vectors are arrays, or a ``ShardedArray`` on disk, of which at most one batch of documents is in memory at once.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from nomic_jax.curate.engine.sharded_array import Matrix
from nomic_jax.extras import needs
from nomic_jax.files.locks import exclusive_lock
from nomic_jax.files.writing import atomic_file

with needs("curation", "nomic_jax[curate]"):
    import faiss

MAX_GPU_RESULTS = 2048  # maximum number of results per query that faiss finds on a GPU
RECALL, RECALL_AT = 0.95, 20  # target of an approximate index: share found of the 20 nearest documents
RANK_DEPTH = 100  # number of ranks that an approximate search distinguishes

# In a float32 matrix product, the dot product of the same two unit vectors varies by about 1e-7 with its position in
# the matrix. Scores that differ by less than this count as equal; for longer vectors, times the product of lengths.
ROUNDING = 1e-6
# In float64, it varies by less than this.
ROUNDING_64 = 1e-12


class Batches(NamedTuple):
    """How many rows are compared at once. Results do not depend on it.

    Attributes:
      queries, documents: rows of a matrix product.
      pairs: rows of ``pair_scores``.
      exact: queries whose scores in float64 are computed at once.
    """

    queries: int = 4096
    documents: int = 8192
    pairs: int = 4096
    exact: int = 256


DEFAULT = Batches()


def pair_scores(
    queries_QE: Matrix, query_P: np.ndarray, documents_NE: Matrix, document_P: np.ndarray, batches: Batches = DEFAULT
) -> np.ndarray:
    """Returns the inner products, float32 [P], of pairs of a query and a document, given as two lists of row numbers.

    The sums are in float64, so that equal vectors have equal scores at any position.
    """
    score_P = np.empty(len(query_P), np.float32)
    for start in range(0, len(query_P), batches.pairs):
        pairs = slice(start, start + batches.pairs)
        # Not einsum: its buffer may end within a row, so the last bits depend on the row's position.
        score_P[pairs] = (queries_QE[query_P[pairs]].astype(np.float64) * documents_NE[document_P[pairs]]).sum(axis=1)
    return score_P


def top_k(
    queries_QE: Matrix, documents_NE: Matrix, k: int, *, batches: Batches = DEFAULT, progress: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Finds the k documents with the highest scores for each query, exactly. Ties are in order of document number.

    faiss searches on a GPU if its GPU build is installed and finds one.

    Args:
      queries_QE, documents_NE: float32, rows of any length.
      k: reduced to the number of documents if there are fewer.

    Returns:
      Document numbers, int64 [Q, k], and scores, float32 [Q, k].
    """
    k = min(k, len(documents_NE))
    longest = longest_vector(documents_NE, batches)
    id_QK = np.empty((len(queries_QE), k), np.int64)
    score_QK = np.empty((len(queries_QE), k), np.float32)
    with tqdm(total=len(queries_QE), desc="searching", unit=" queries", leave=False, disable=not progress) as bar:
        for start in range(0, len(queries_QE), batches.queries):
            batch = slice(start, start + batches.queries)
            queries = queries_QE[batch]
            fetches, near_Q = (k + 8, 4 * k + 32), rounding(queries, longest)
            id_QK[batch], score_QK[batch] = _search(queries, documents_NE, k, fetches, near_Q, batches)
            bar.update(len(id_QK[batch]))
    return id_QK, score_QK


def longest_vector(vectors_NE: Matrix, batches: Batches = DEFAULT) -> float:
    """Returns the largest length of a row; 0 for none."""
    starts = range(0, len(vectors_NE), batches.documents)
    lengths = (np.linalg.norm(vectors_NE[first : first + batches.documents], axis=1).max() for first in starts)
    return float(max(lengths, default=0.0))


def rounding(queries_QE: np.ndarray, longest: float) -> np.ndarray:
    """Returns, for each query, the difference below which scores count as equal, float32 [Q].

    Args:
      longest: length of the longest document.
    """
    scale_Q = np.linalg.norm(queries_QE, axis=1) * longest
    # The lengths of unit vectors are themselves rounded: these have ROUNDING exactly.
    return np.where(np.abs(scale_Q - 1) < 1e-3, 1, scale_Q).astype(np.float32) * np.float32(ROUNDING)


def _search(
    queries_QE: np.ndarray,
    documents_NE: Matrix,
    k: int,
    fetches: tuple[int, ...],
    rounding_Q: np.ndarray,
    batches: Batches,
) -> tuple[np.ndarray, np.ndarray]:
    """Searches for ``fetches[0]`` documents, and again, for the next number, where ties may hide a better one."""
    if not fetches:
        return _exact_search(queries_QE, documents_NE, k, rounding_Q, batches)
    fetch = min(fetches[0], len(documents_NE))
    rough_QF, id_QF = _rough_search(queries_QE, documents_NE, fetch, batches)
    id_QK, score_QK = _best_of(queries_QE, documents_NE, id_QF, k, batches)
    # faiss returns equal scores in any order. If the k-th may tie with documents that were not fetched, fetch more.
    undecided = rough_QF[:, -1] > score_QK[:, -1] - rounding_Q
    if fetch < len(documents_NE) and undecided.any():
        more = _search(queries_QE[undecided], documents_NE, k, fetches[1:], rounding_Q[undecided], batches)
        id_QK[undecided], score_QK[undecided] = more
    return id_QK, score_QK


def _exact_search(
    queries_QE: np.ndarray, documents_NE: Matrix, k: int, rounding_Q: np.ndarray, batches: Batches
) -> tuple[np.ndarray, np.ndarray]:
    """Compares all documents in float64, so that its time does not depend on how many documents share a vector."""
    id_QK = np.empty((len(queries_QE), k), np.int64)
    score_QK = np.empty((len(queries_QE), k), np.float32)
    for start in range(0, len(queries_QE), batches.exact):
        queries, near_B = queries_QE[start : start + batches.exact], rounding_Q[start : start + batches.exact]
        id_BK: np.ndarray = np.empty((len(queries), 0), np.int64)
        score_BK: np.ndarray = np.empty((len(queries), 0), np.float32)
        for first in range(0, len(documents_NE), batches.documents):
            score_BN = _exact_scores(queries, documents_NE[first : first + batches.documents], near_B, batches)
            number_N = np.arange(first, first + score_BN.shape[1])
            score_BM = np.concatenate([score_BK, score_BN], axis=1)
            id_BM = np.concatenate([id_BK, np.broadcast_to(number_N, score_BN.shape)], axis=1)
            best_BK = _first_of_the_best(score_BM, min(k, score_BM.shape[1]))
            id_BK, score_BK = (np.take_along_axis(x, best_BK, axis=1) for x in (id_BM, score_BM))
        order_BK = np.lexsort((id_BK, -score_BK), axis=1)
        batch = slice(start, start + len(queries))
        id_QK[batch], score_QK[batch] = (np.take_along_axis(x, order_BK, axis=1) for x in (id_BK, score_BK))
    return id_QK, score_QK


def _exact_scores(
    queries_QE: np.ndarray, documents_NE: np.ndarray, rounding_Q: np.ndarray, batches: Batches
) -> np.ndarray:
    """Returns the scores of all pairs, float32 [Q, N], equal to those of ``pair_scores``."""
    score_QN = queries_QE.astype(np.float64) @ documents_NE.astype(np.float64).T
    rounded_QN = score_QN.astype(np.float32)
    # A sum in another order may round to the next float32 only where the sum lies between two of them.
    near_Q1 = rounding_Q[:, None].astype(np.float64) * (ROUNDING_64 / ROUNDING)
    unsure_QN = (score_QN - near_Q1).astype(np.float32) != (score_QN + near_Q1).astype(np.float32)
    query_P, document_P = np.nonzero(unsure_QN)
    rounded_QN[query_P, document_P] = pair_scores(queries_QE, query_P, documents_NE, document_P, batches)
    return rounded_QN


def _first_of_the_best(score_QN: np.ndarray, k: int) -> np.ndarray:
    """Returns the columns [Q, k] of the k highest scores, in order of column; of equal scores, the first ones."""
    lowest_Q1 = np.partition(score_QN, -k, axis=1)[:, -k, None]
    above_QN, equal_QN = score_QN > lowest_Q1, score_QN == lowest_Q1
    missing_Q1 = k - np.count_nonzero(above_QN, axis=1, keepdims=True)
    _, column_P = np.nonzero(above_QN | equal_QN & (np.cumsum(equal_QN, axis=1) <= missing_Q1))
    return column_P.reshape(len(score_QN), k)


def _rough_search(
    queries_QE: np.ndarray, documents_NE: Matrix, fetch: int, batches: Batches
) -> tuple[np.ndarray, np.ndarray]:
    """Returns scores as faiss computes them, float32 [Q, fetch], and ids: the best of all batches of documents."""
    best_QF: np.ndarray = np.empty((len(queries_QE), 0), np.float32)
    id_QF: np.ndarray = np.empty((len(queries_QE), 0), np.int64)
    for first in range(0, len(documents_NE), batches.documents):
        documents = np.ascontiguousarray(documents_NE[first : first + batches.documents])
        score_QF, local_QF = _knn(np.ascontiguousarray(queries_QE), documents, min(fetch, len(documents)))
        best_QF = np.concatenate([best_QF, score_QF], axis=1)
        id_QF = np.concatenate([id_QF, local_QF + first], axis=1)
        if best_QF.shape[1] > fetch:
            order_QF = np.argpartition(-best_QF, fetch - 1, axis=1)[:, :fetch]
            best_QF, id_QF = (np.take_along_axis(x, order_QF, axis=1) for x in (best_QF, id_QF))
    order_QF = np.argsort(-best_QF, axis=1, kind="stable")
    return np.take_along_axis(best_QF, order_QF, axis=1), np.take_along_axis(id_QF, order_QF, axis=1)


def _knn(queries_QE: np.ndarray, documents_NE: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    gpu = _gpu()
    if gpu is not None and k <= MAX_GPU_RESULTS:
        return faiss.knn_gpu(gpu, queries_QE, documents_NE, k, metric=faiss.METRIC_INNER_PRODUCT)
    return faiss.knn(queries_QE, documents_NE, k, metric=faiss.METRIC_INNER_PRODUCT)


@functools.cache
def _gpu():
    """Returns faiss's GPU resources, or None if this is no GPU build (the extra ``faiss-gpu``) or finds no GPU."""
    has_gpu = hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0
    return faiss.StandardGpuResources() if has_gpu else None


def _best_of(
    queries_QE: np.ndarray, documents_NE: Matrix, id_QF: np.ndarray, k: int, batches: Batches
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the k best of the candidate documents (-1 for none), ordered by exact score, then by number."""
    query_P = np.repeat(np.arange(len(queries_QE)), id_QF.shape[1])
    document_P = np.maximum(id_QF, 0).ravel()
    score_QF = pair_scores(queries_QE, query_P, documents_NE, document_P, batches).reshape(id_QF.shape)
    score_QF = np.where(id_QF < 0, -np.inf, score_QF)
    order_QK = np.lexsort((id_QF, -score_QF), axis=1)[:, :k]
    return np.take_along_axis(id_QF, order_QK, axis=1), np.take_along_axis(score_QF, order_QK, axis=1)


class ApproximateIndex:
    """An inverted-file index (IVF) of vectors in 8 bits a component: a quarter of the memory, a fraction of the work.

    k-means on at most 64 documents per cell divides the documents into nlist = 4 sqrt(N) cells (as a power of two).
    A query searches the nprobe nearest cells: 16, doubled until the index finds RECALL of the RECALL_AT nearest
    documents, over a sample of the queries. Candidates are scored and ordered exactly; only the choice is approximate.

    Args:
      queries_QE, documents_NE: float32. The index refers to the documents and reads them in batches.
      file: where the index is saved. An existing file is loaded, so a search after a restart has the same results.
    """

    def __init__(self, queries_QE: Matrix, documents_NE: Matrix, file: Path, batches: Batches = DEFAULT):
        self.documents_NE, self.batches = documents_NE, batches
        self.index: Any = None
        with exclusive_lock(file.with_name(f".{file.name}.lock")):
            if not file.exists():
                self.index = self._build()
                while self.index.nprobe < self.index.nlist and self.recall(queries_QE, RECALL_AT)["recall"] < RECALL:
                    self.index.nprobe = min(2 * self.index.nprobe, self.index.nlist)
                with atomic_file(file) as part:
                    faiss.write_index(self.index, str(part))
        self.index = faiss.read_index(str(file))

    def _build(self) -> faiss.Index:
        count, width = self.documents_NE.shape
        nlist = min(count, 2 ** round(np.log2(4 * np.sqrt(count))))
        index = faiss.IndexIVFScalarQuantizer(
            faiss.IndexFlatIP(width), width, nlist, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT
        )
        index.cp.min_points_per_centroid = 1  # faiss warns below 39, and a sample may have fewer
        sample = np.random.default_rng(0).choice(count, min(count, 64 * nlist), replace=False)
        index.train(self.documents_NE[np.sort(sample)])
        for first in range(0, count, self.batches.documents):
            index.add(np.ascontiguousarray(self.documents_NE[first : first + self.batches.documents]))
        index.nprobe = min(nlist, 16)
        return index

    def top_k(self, queries_QE: Matrix, k: int, *, progress: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Like ``top_k`` of this module, as found by the index. Missing results have number -1 and score -inf."""
        id_QK = np.full((len(queries_QE), k), -1, np.int64)
        score_QK = np.full((len(queries_QE), k), -np.inf, np.float32)
        with tqdm(total=len(queries_QE), desc="searching", unit=" queries", leave=False, disable=not progress) as bar:
            for start in range(0, len(queries_QE), self.batches.queries):
                queries = np.ascontiguousarray(queries_QE[start : start + self.batches.queries])
                # Fetch twice as many: 8 bits may misorder neighbours with nearly equal scores.
                _, found = self.index.search(queries, 2 * k)
                batch = slice(start, start + len(queries))
                id_QK[batch], score_QK[batch] = _best_of(queries, self.documents_NE, found, k, self.batches)
                bar.update(len(queries))
        return id_QK, score_QK

    def recall(self, queries_QE: Matrix, k: int, sample: int = 1000) -> dict[str, int | float]:
        """Returns the share of the k exact best that the index finds, over a fixed sample of queries, with settings."""
        chosen = np.random.default_rng(0).permutation(len(queries_QE))[:sample]
        queries = queries_QE[np.sort(chosen)]
        exact_QK, _ = top_k(queries, self.documents_NE, k, batches=self.batches)
        found_QK, _ = self.top_k(queries, k)
        hits = sum(len(set(exact) & set(found)) for exact, found in zip(exact_QK.tolist(), found_QK.tolist()))
        return {
            "k": exact_QK.shape[1],
            "recall": round(hits / exact_QK.size, 4),
            "queries": len(queries),
            "nlist": self.index.nlist,
            "nprobe": self.index.nprobe,
        }


def own_ranks(
    queries_QE: Matrix,
    documents_NE: Matrix,
    own_Q: np.ndarray,
    *,
    index: ApproximateIndex | None = None,
    count: Callable[[Matrix, Matrix, np.ndarray], np.ndarray] | None = None,
    batches: Batches = DEFAULT,
    progress: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Ranks each query's own document among all documents.

    Args:
      queries_QE, documents_NE: float32, rows of any length; the documents are distinct.
      own_Q: int64, the number of each query's own document.
      index: an index of the documents. Only the RANK_DEPTH documents that it finds are compared; rank RANK_DEPTH + 1
        means that all of them score higher.
      count: a function to use instead of ``count_above`` of this module, which uses numpy.

    Returns:
      rank, int32 [Q]: 1 + the number of documents that score higher by more than ``rounding``, so that neither the
      document itself nor one with an equal score counts; and the score of the own document, float32 [Q].
    """
    score_Q = pair_scores(queries_QE, np.arange(len(queries_QE)), documents_NE, own_Q, batches)
    longest, starts = longest_vector(documents_NE, batches), range(0, len(queries_QE), batches.queries)
    near_Q = [rounding(queries_QE[first : first + batches.queries], longest) for first in starts]
    limit_Q = score_Q + np.concatenate(near_Q)
    if index is not None:
        _, near_QK = index.top_k(queries_QE, min(RANK_DEPTH, len(documents_NE)), progress=progress)
        return (1 + np.count_nonzero(near_QK > limit_Q[:, None], axis=1)).astype(np.int32), score_Q
    count = count or functools.partial(count_above, batches=batches, progress=progress)
    above_Q = count(queries_QE, documents_NE, limit_Q)
    return (1 + above_Q).astype(np.int32), score_Q


def count_above(
    queries_QE: Matrix,
    documents_NE: Matrix,
    limit_Q: np.ndarray,
    *,
    batches: Batches = DEFAULT,
    progress: bool = False,
) -> np.ndarray:
    """Returns how many documents score above each query's limit, int64 [Q].

    This is a matrix product and not a search, because the rank of every row is required, however low.
    """
    count_Q = np.zeros(len(queries_QE), np.int64)
    with tqdm(total=len(queries_QE), desc="ranking", unit=" queries", leave=False, disable=not progress) as bar:
        for start in range(0, len(queries_QE), batches.queries):
            batch = slice(start, start + batches.queries)
            queries = queries_QE[batch]
            for first in range(0, len(documents_NE), batches.documents):
                score_QN = queries @ documents_NE[first : first + batches.documents].T
                count_Q[batch] += np.count_nonzero(score_QN > limit_Q[batch, None], axis=1)
            bar.update(len(queries))
    return count_Q

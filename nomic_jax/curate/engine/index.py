"""Inner-product search by faiss whose results are one function of the vectors: ties included, batch sizes excluded.

Vectors come as arrays or as ``ShardedArray`` on disk, of which no more than DOCUMENTS_PER_BATCH are in memory at once.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from tqdm import tqdm

from nomic_jax.curate.engine.locks import exclusive_lock
from nomic_jax.curate.engine.sharded_array import Matrix
from nomic_jax.data.formats.writing import atomic_file

QUERIES_PER_BATCH = 4096
DOCUMENTS_PER_BATCH = 8192
PAIRS_PER_BATCH = 4096
GPU_MOST = 2048  # results a query that faiss finds on a GPU
RECALL, RECALL_AT = 0.95, 20  # aimed at by an approximate index
RANK_DEPTH = 100  # ranks that are told apart in an approximate search

# The same dot product of unit vectors comes out of a float32 matrix product about 1e-7 apart, depending on where in the
# matrix it stands. Scores closer than this are not told apart by it.
ROUNDING = 1e-6

# (queries [Q, E], n) -> (ids [Q, n], scores that only order them [Q, n]), best first
Rough = Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]


def pair_scores(queries_QE: Matrix, query_P: np.ndarray, documents_NE: Matrix, document_P: np.ndarray) -> np.ndarray:
    """float32 [P]: the inner product of each pair of a query and a document, given as two lists of row numbers.

    Summed in float64, so that equal vectors score equal wherever they stand.
    """
    score_P = np.empty(len(query_P), np.float32)
    for start in range(0, len(query_P), PAIRS_PER_BATCH):
        pairs = slice(start, start + PAIRS_PER_BATCH)
        # Not einsum: it sums through a buffer that may end within a row, so its last bits depend on the place.
        score_P[pairs] = (queries_QE[query_P[pairs]].astype(np.float64) * documents_NE[document_P[pairs]]).sum(axis=1)
    return score_P


def top_k(queries_QE: Matrix, documents_NE: Matrix, k: int, *, progress: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """The k documents of highest score for each query, exactly, by score and, among equals, by document number.

    faiss searches on a GPU if its GPU build is installed and sees one.

    Args:
      queries_QE, documents_NE: float32, rows of length 1.
      k: lowered to the number of documents if there are fewer.

    Returns:
      Document numbers, int64 [Q, k], and scores, float32 [Q, k].
    """
    k = min(k, len(documents_NE))
    id_QK = np.empty((len(queries_QE), k), np.int64)
    score_QK = np.empty((len(queries_QE), k), np.float32)
    with tqdm(total=len(queries_QE), desc="searching", unit=" queries", leave=False, disable=not progress) as bar:
        for start in range(0, len(queries_QE), QUERIES_PER_BATCH):
            batch = slice(start, start + QUERIES_PER_BATCH)
            id_QK[batch], score_QK[batch] = _search(queries_QE[batch], documents_NE, k, fetch=k + 8)
            bar.update(len(id_QK[batch]))
    return id_QK, score_QK


def _search(queries_QE: np.ndarray, documents_NE: Matrix, k: int, fetch: int) -> tuple[np.ndarray, np.ndarray]:
    fetch = min(fetch, len(documents_NE))
    rough_QF, id_QF = _rough_search(queries_QE, documents_NE, fetch)
    id_QK, score_QK = _best_of(queries_QE, documents_NE, id_QF, k)
    # Of equal scores faiss returns any: where the k-th may tie with documents beyond those fetched, fetch more.
    undecided = rough_QF[:, -1] > score_QK[:, -1] - ROUNDING
    if fetch < len(documents_NE) and undecided.any():
        id_QK[undecided], score_QK[undecided] = _search(queries_QE[undecided], documents_NE, k, 4 * fetch)
    return id_QK, score_QK


def _rough_search(queries_QE: np.ndarray, documents_NE: Matrix, fetch: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores as faiss computes them, float32 [Q, fetch], and ids: the best of every part, put together."""
    best_QF: np.ndarray = np.empty((len(queries_QE), 0), np.float32)
    id_QF: np.ndarray = np.empty((len(queries_QE), 0), np.int64)
    for first in range(0, len(documents_NE), DOCUMENTS_PER_BATCH):
        documents = np.ascontiguousarray(documents_NE[first : first + DOCUMENTS_PER_BATCH])
        score_QF, place_QF = _knn(np.ascontiguousarray(queries_QE), documents, min(fetch, len(documents)))
        best_QF = np.concatenate([best_QF, score_QF], axis=1)
        id_QF = np.concatenate([id_QF, place_QF + first], axis=1)
        if best_QF.shape[1] > fetch:
            order_QF = np.argpartition(-best_QF, fetch - 1, axis=1)[:, :fetch]
            best_QF, id_QF = (np.take_along_axis(x, order_QF, axis=1) for x in (best_QF, id_QF))
    order_QF = np.argsort(-best_QF, axis=1, kind="stable")
    return np.take_along_axis(best_QF, order_QF, axis=1), np.take_along_axis(id_QF, order_QF, axis=1)


def _knn(queries_QE: np.ndarray, documents_NE: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    gpu = _gpu()
    if gpu is not None and k <= GPU_MOST:
        return faiss.knn_gpu(gpu, queries_QE, documents_NE, k, metric=faiss.METRIC_INNER_PRODUCT)
    return faiss.knn(queries_QE, documents_NE, k, metric=faiss.METRIC_INNER_PRODUCT)


@functools.cache
def _gpu():
    """faiss's handle of a GPU, if this build has one (the extra ``faiss-gpu``) and sees one; otherwise None."""
    has_gpu = hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0
    return faiss.StandardGpuResources() if has_gpu else None


def _best_of(queries_QE: np.ndarray, documents_NE: Matrix, id_QF: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k best of the documents found (-1 for none), by exact score, then by number."""
    query_P = np.repeat(np.arange(len(queries_QE)), id_QF.shape[1])
    score_QF = pair_scores(queries_QE, query_P, documents_NE, np.maximum(id_QF, 0).ravel()).reshape(id_QF.shape)
    score_QF = np.where(id_QF < 0, -np.inf, score_QF)
    order_QK = np.lexsort((id_QF, -score_QF), axis=1)[:, :k]
    return np.take_along_axis(id_QF, order_QK, axis=1), np.take_along_axis(score_QF, order_QK, axis=1)


class ApproximateIndex:
    """Inverted lists (IVF) of vectors in 8 bits a component: a quarter of their memory, and a fraction of the work.

    Documents are put into nlist = 4 sqrt(N) cells (as a power of two), by the k-means of at most 64 of them a cell.
    A query looks into the nearest nprobe: 16, doubled until the index finds RECALL of the RECALL_AT nearest of a sample
    of the queries. What it finds is scored exactly and put in order, so only what is found is approximate.

    Args:
      queries_QE, documents_NE: float32, rows of length 1; the documents are kept, and read in parts.
      file: where the index is kept, or was: a search after a restart is the same.
    """

    def __init__(self, queries_QE: Matrix, documents_NE: Matrix, file: Path):
        self.documents_NE = documents_NE
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
        index.cp.min_points_per_centroid = 1  # faiss warns below 39, and a sample may hold fewer
        sample = np.random.default_rng(0).choice(count, min(count, 64 * nlist), replace=False)
        index.train(self.documents_NE[np.sort(sample)])
        for first in range(0, count, DOCUMENTS_PER_BATCH):
            index.add(np.ascontiguousarray(self.documents_NE[first : first + DOCUMENTS_PER_BATCH]))
        index.nprobe = min(nlist, 16)
        return index

    def top_k(self, queries_QE: Matrix, k: int, *, progress: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """As ``top_k`` of this module, of what the index finds; where it finds fewer, number -1 and score -inf."""
        id_QK = np.full((len(queries_QE), k), -1, np.int64)
        score_QK = np.full((len(queries_QE), k), -np.inf, np.float32)
        with tqdm(total=len(queries_QE), desc="searching", unit=" queries", leave=False, disable=not progress) as bar:
            for start in range(0, len(queries_QE), QUERIES_PER_BATCH):
                queries = np.ascontiguousarray(queries_QE[start : start + QUERIES_PER_BATCH])
                # Twice as many: 8 bits put neighbours of nearly the same score into the wrong order.
                _, found = self.index.search(queries, 2 * k)
                batch = slice(start, start + len(queries))
                id_QK[batch], score_QK[batch] = _best_of(queries, self.documents_NE, found, k)
                bar.update(len(queries))
        return id_QK, score_QK

    def recall(self, queries_QE: Matrix, k: int, sample: int = 1000) -> dict[str, int | float]:
        """Share of the k exact best that the index finds, over a fixed sample of queries."""
        chosen = np.random.default_rng(0).permutation(len(queries_QE))[:sample]
        queries = queries_QE[np.sort(chosen)]
        exact_QK, _ = top_k(queries, self.documents_NE, k)
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
    progress: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Where each query's own document stands among all documents.

    Args:
      queries_QE, documents_NE: float32, rows of length 1; the documents are distinct.
      own_Q: int64, each query's document.
      index: of the documents, to look only at the RANK_DEPTH that it finds near a query; a rank of RANK_DEPTH + 1 says
        that all of these score higher.
      count: as ``count_above`` of this module, elsewhere than with numpy.

    Returns:
      rank, int32 [Q]: 1 + the number of documents that score higher (by more than ROUNDING, so that neither the
      document itself nor one of equal score pushes it out); and its score, float32 [Q].
    """
    score_Q = pair_scores(queries_QE, np.arange(len(queries_QE)), documents_NE, own_Q)
    limit_Q = score_Q + np.float32(ROUNDING)
    if index is not None:
        _, near_QK = index.top_k(queries_QE, min(RANK_DEPTH, len(documents_NE)), progress=progress)
        return (1 + np.count_nonzero(near_QK > limit_Q[:, None], axis=1)).astype(np.int32), score_Q
    above_Q = (count or functools.partial(count_above, progress=progress))(queries_QE, documents_NE, limit_Q)
    return (1 + above_Q).astype(np.int32), score_Q


def count_above(queries_QE: Matrix, documents_NE: Matrix, limit_Q: np.ndarray, *, progress: bool = False) -> np.ndarray:
    """int64 [Q]: how many documents score above the query's limit.

    A matrix product and not a search: the rank of every row is wanted, however far down it stands.
    """
    count_Q = np.zeros(len(queries_QE), np.int64)
    with tqdm(total=len(queries_QE), desc="ranking", unit=" queries", leave=False, disable=not progress) as bar:
        for start in range(0, len(queries_QE), QUERIES_PER_BATCH):
            batch = slice(start, start + QUERIES_PER_BATCH)
            queries = queries_QE[batch]
            for first in range(0, len(documents_NE), DOCUMENTS_PER_BATCH):
                score_QN = queries @ documents_NE[first : first + DOCUMENTS_PER_BATCH].T
                count_Q[batch] += np.count_nonzero(score_QN > limit_Q[batch, None], axis=1)
            bar.update(len(queries))
    return count_Q

"""Exact inner-product search whose results are one function of the vectors: ties included, batch sizes excluded."""

import faiss
import numpy as np
from tqdm import tqdm

QUERIES_PER_BATCH = 1024
DOCUMENTS_PER_BATCH = 16384
PAIRS_PER_BATCH = 4096

# The same dot product of unit vectors comes out of a float32 matrix product about 1e-7 apart, depending on where in the
# matrix it stands. Scores closer than this are not told apart by it.
ROUNDING = 1e-6


def pair_scores(
    queries_QE: np.ndarray, query_P: np.ndarray, documents_NE: np.ndarray, document_P: np.ndarray
) -> np.ndarray:
    """float32 [P]: the inner product of each pair of a query and a document, given as two lists of row numbers.

    Summed in float64, so that equal vectors score equal wherever they stand.
    """
    score_P = np.empty(len(query_P), np.float32)
    for start in range(0, len(query_P), PAIRS_PER_BATCH):
        pairs = slice(start, start + PAIRS_PER_BATCH)
        # Not einsum: it sums through a buffer that may end within a row, so its last bits depend on the place.
        score_P[pairs] = (queries_QE[query_P[pairs]].astype(np.float64) * documents_NE[document_P[pairs]]).sum(axis=1)
    return score_P


def top_k(
    queries_QE: np.ndarray, documents_NE: np.ndarray, k: int, *, progress: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """The k documents of highest score for each query, by score and, among equals, by document number.

    Args:
      queries_QE, documents_NE: float32, rows of length 1.
      k: lowered to the number of documents if there are fewer.

    Returns:
      Document numbers, int64 [Q, k], and scores, float32 [Q, k].
    """
    k = min(k, len(documents_NE))
    index = faiss.IndexFlatIP(documents_NE.shape[1])
    index.add(documents_NE)
    id_QK = np.empty((len(queries_QE), k), np.int64)
    score_QK = np.empty((len(queries_QE), k), np.float32)
    with tqdm(total=len(queries_QE), desc="searching", unit=" queries", leave=False, disable=not progress) as bar:
        for start in range(0, len(queries_QE), QUERIES_PER_BATCH):
            batch = slice(start, start + QUERIES_PER_BATCH)
            id_QK[batch], score_QK[batch] = _search(index, queries_QE[batch], documents_NE, k, fetch=k + 8)
            bar.update(len(id_QK[batch]))
    return id_QK, score_QK


def _search(
    index: faiss.IndexFlatIP, queries_QE: np.ndarray, documents_NE: np.ndarray, k: int, fetch: int
) -> tuple[np.ndarray, np.ndarray]:
    fetch = min(fetch, len(documents_NE))
    rough_QF, id_QF = index.search(queries_QE, fetch)
    query_P = np.repeat(np.arange(len(queries_QE)), fetch)
    score_QF = pair_scores(queries_QE, query_P, documents_NE, id_QF.ravel()).reshape(id_QF.shape)
    order_QK = np.lexsort((id_QF, -score_QF), axis=1)[:, :k]
    id_QK = np.take_along_axis(id_QF, order_QK, axis=1)
    score_QK = np.take_along_axis(score_QF, order_QK, axis=1)
    # Of equal scores faiss returns any: where the k-th may tie with documents beyond those fetched, fetch more.
    undecided = rough_QF[:, -1] > score_QK[:, -1] - ROUNDING
    if fetch < len(documents_NE) and undecided.any():
        id_QK[undecided], score_QK[undecided] = _search(index, queries_QE[undecided], documents_NE, k, 4 * fetch)
    return id_QK, score_QK


def own_ranks(
    queries_QE: np.ndarray, documents_NE: np.ndarray, own_Q: np.ndarray, *, progress: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Where each query's own document stands among all documents.

    Args:
      queries_QE, documents_NE: float32, rows of length 1; the documents are distinct.
      own_Q: int64, each query's document.

    Returns:
      rank, int32 [Q]: 1 + the number of documents that score higher (by more than ROUNDING, so that neither the
      document itself nor one of equal score pushes it out); and its score, float32 [Q].
    """
    score_Q = pair_scores(queries_QE, np.arange(len(queries_QE)), documents_NE, own_Q)
    rank_Q = np.ones(len(queries_QE), np.int32)
    with tqdm(total=len(queries_QE), desc="ranking", unit=" queries", leave=False, disable=not progress) as bar:
        for start in range(0, len(queries_QE), QUERIES_PER_BATCH):
            batch = slice(start, start + QUERIES_PER_BATCH)
            limit_Q = score_Q[batch] + np.float32(ROUNDING)
            for first in range(0, len(documents_NE), DOCUMENTS_PER_BATCH):
                score_QN = queries_QE[batch] @ documents_NE[first : first + DOCUMENTS_PER_BATCH].T
                rank_Q[batch] += np.count_nonzero(score_QN > limit_Q[:, None], axis=1).astype(np.int32)
            bar.update(len(limit_Q))
    return rank_Q, score_Q

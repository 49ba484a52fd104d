"""An index of stored vectors for faiss, which ``launch.search`` reads through a memory map.

The file is one of faiss: ``faiss.read_index`` opens it, and its ids are row numbers from 0 in the order of the parts.
For the cosine, it holds vectors of length 1.
"""

import os
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from tqdm import tqdm

from nomic_jax.data.formats.file_systems import is_local
from nomic_jax.evals.tasks.retrieval import top_k
from nomic_jax.extras import needs
from nomic_jax.files.reading import read_json
from nomic_jax.files.writing import atomic_file, write_json
from nomic_jax.inference.similarity import similarity_matrix
from nomic_jax.inference.vectors.stored import StoredVectors
from nomic_jax.inference.vectors.stored_types import INT8

with needs("an index of vectors", "nomic_jax[curate]"):
    import faiss as _faiss

faiss: Any = _faiss  # its types are those of C++, without what its Python adds

KINDS = ("auto", "flat", "ivf", "hnsw")
FLAT_ROWS = 50_000  # up to which an exact search takes some milliseconds
# k-means takes at most this many vectors, and as many cells as an exact search among them is quick.
TRAINING_ROWS, ROWS_PER_CELL, MOST_CELLS, FLAT_CELLS = 1 << 20, 64, 1 << 16, 1 << 12
LINKS, CONSTRUCTION = 32, 100  # of HNSW: neighbours of a vector, candidates when one is added
FIRST_EFFORT, MOST_CANDIDATES = 16, 1 << 12  # nprobe of IVF, efSearch of HNSW
QUERIES, RECALL_AT = 200, 10
ROUNDING = 1e-6  # by which the similarity of the same two vectors may differ, for similarities of about 1


def chosen_kind(rows: int) -> str:
    """Returns what "auto" means: an exact index for few rows, else cells, which are the fastest to build."""
    return "flat" if rows <= FLAT_ROWS else "ivf"


def build(
    stored: StoredVectors,
    similarity: str,
    kind: str = "auto",
    *,
    recall: float = 0.95,
    query_QE: np.ndarray | None = None,
) -> dict[str, Any]:
    """Writes the index of stored vectors and returns what is known of it, which is also written beside it as JSON.

    flat holds float32 and is exact. ivf and hnsw hold 16 bits a number, or 8 of int8 vectors. How many cells (ivf) or
    candidates (hnsw) a query looks at is doubled until it finds ``recall`` of the RECALL_AT most similar vectors. The
    index is in memory while it is built.

    Args:
      similarity: "cosine", "dot" or "euclidean".
      kind: one of KINDS.
      query_QE: float32, the queries for which recall is measured; None for QUERIES of the stored vectors, each of which
        is not counted as a neighbour of itself.

    Returns:
      {kind, similarity, rows, effort, recall, recall_at, queries, exact_ms, index_ms, seconds}. The times are
      milliseconds a query, when all are asked together. recall and times are missing if there are no other vectors.

    Raises:
      ValueError: faiss cannot search by the similarity, or there is no vector.
    """
    if not is_local(stored.place):
        raise ValueError(f"--vectors={stored.place}: an index is read through a memory map; copy them to this machine")
    if similarity not in ("cosine", "dot", "euclidean"):
        raise ValueError(f"there is no index for the similarity {similarity!r} of the model; search without one")
    if not len(stored):
        raise ValueError(f"{stored.place}: has no vectors")
    kind = chosen_kind(len(stored)) if kind == "auto" else kind
    started = time.monotonic()
    index = _untrained(stored, similarity, kind)
    if not index.is_trained:
        count = min(len(stored), TRAINING_ROWS, ROWS_PER_CELL * getattr(index, "nlist", TRAINING_ROWS))
        sample = np.random.default_rng(0).choice(len(stored), count, replace=False)
        print(f"training on {count:,} vectors", flush=True)
        index.train(as_indexed(stored.some(np.sort(sample)), similarity))
    with tqdm(desc="indexing", total=len(stored), unit=" vectors") as bar:
        for _, vectors_NE, _ in stored.batches():
            index.add(as_indexed(vectors_NE, similarity))
            bar.update(len(vectors_NE))
    made = {"kind": kind, "similarity": similarity, "rows": len(stored), "vectors": _version(stored)}
    made |= {"effort": _most_effort(index, len(stored))} | _measured(index, stored, similarity, recall, query_QE)
    made["seconds"] = round(time.monotonic() - started, 1)
    file = stored.index_file
    with atomic_file(file) as part:
        faiss.write_index(index, str(part))
    write_json(f"{file}.json", made)
    return made


def as_indexed(vectors_NE: np.ndarray, similarity: str) -> np.ndarray:
    """Returns vectors as the index compares them: for the cosine, of length 1."""
    if similarity != "cosine":
        return np.ascontiguousarray(vectors_NE, np.float32)
    lengths_N1 = np.linalg.norm(vectors_NE, axis=1, keepdims=True)
    return np.ascontiguousarray(vectors_NE / np.maximum(lengths_N1, 1e-12), np.float32)


def _untrained(stored: StoredVectors, similarity: str, kind: str) -> Any:
    metric = faiss.METRIC_L2 if similarity == "euclidean" else faiss.METRIC_INNER_PRODUCT
    is_int8 = INT8 in stored.record
    if kind == "flat":
        return faiss.IndexFlat(stored.dim, metric)
    if kind == "hnsw":
        bits = faiss.ScalarQuantizer.QT_8bit if is_int8 else faiss.ScalarQuantizer.QT_fp16
        index = faiss.IndexHNSWSQ(stored.dim, bits, LINKS, metric)
        index.hnsw.efConstruction = CONSTRUCTION
        return index
    cells = min(MOST_CELLS, len(stored), 2 ** round(np.log2(4 * np.sqrt(len(stored)))))
    graph = "_HNSW32" if cells > FLAT_CELLS else ""
    index = faiss.index_factory(stored.dim, f"IVF{cells}{graph},{'SQ8' if is_int8 else 'SQfp16'}", metric)
    index.cp.min_points_per_centroid = 1  # faiss warns below 39, and a sample may have fewer
    return index


def _most_effort(index: Any, rows: int) -> int:
    return index.nlist if hasattr(index, "nlist") else min(MOST_CANDIDATES, rows) if hasattr(index, "hnsw") else 0


def _measured(
    index: Any, stored: StoredVectors, similarity: str, recall: float, query_QE: np.ndarray | None
) -> dict[str, Any]:
    """Returns recall, times and the effort that reaches the wanted recall."""
    own_Q = None
    if query_QE is None:
        own_Q = np.sort(np.random.default_rng(1).choice(len(stored), min(QUERIES, len(stored)), replace=False))
        query_QE = stored.some(own_Q)
    k = min(RECALL_AT, len(stored) - (own_Q is not None))
    if not k:
        return {}
    fetched = k + (own_Q is not None)
    started = time.monotonic()
    exact_QK = exact_search(query_QE, _progress(stored), fetched, similarity)
    exact_seconds = time.monotonic() - started
    effort = min(FIRST_EFFORT, _most_effort(index, len(stored)))
    while True:
        started = time.monotonic()
        _, found_QK = index.search(as_indexed(query_QE, similarity), fetched, params=_parameters(index, effort, None))
        index_seconds = time.monotonic() - started
        reached = _recall(stored, similarity, query_QE, exact_QK, found_QK, own_Q)
        if reached >= recall or effort >= _most_effort(index, len(stored)):
            break
        effort = min(2 * effort, _most_effort(index, len(stored)))
    return {
        "effort": effort,
        "recall": round(reached, 4),
        "recall_at": k,
        "queries": len(query_QE),
        "exact_ms": round(1000 * exact_seconds / len(query_QE), 3),
        "index_ms": round(1000 * index_seconds / len(query_QE), 3),
    }


def _progress(stored: StoredVectors) -> Iterator[np.ndarray]:
    with tqdm(desc="searching exactly", total=len(stored), unit=" vectors") as bar:
        for _, vectors_NE, _ in stored.batches():
            yield vectors_NE
            bar.update(len(vectors_NE))


def exact_search(query_QE: np.ndarray, blocks: Iterator[np.ndarray], k: int, similarity: str) -> np.ndarray:
    """Returns the rows of the k most similar vectors [Q, k] of consecutive blocks, best first."""
    return top_k((similarity_matrix(similarity, query_QE, vectors_NE) for vectors_NE in blocks), k)


def _recall(
    stored: StoredVectors,
    similarity: str,
    query_QE: np.ndarray,
    exact_QK: np.ndarray,
    found_QK: np.ndarray,
    own_Q: np.ndarray | None,
) -> float:
    """Returns how many of the vectors found are as similar as the exact ones; of equal vectors, any counts."""
    rows = np.unique([exact_QK, np.where(found_QK < 0, exact_QK, found_QK)])
    score_QR = similarity_matrix(similarity, query_QE, stored.some(rows))
    hits = wanted = 0
    for i, (exact, found) in enumerate(zip(exact_QK, found_QK)):
        own = -1 if own_Q is None else own_Q[i]
        k = len(exact) - (own_Q is not None)
        lowest = score_QR[i, np.searchsorted(rows, exact[exact != own][:k])].min()
        found = found[(found != own) & (found >= 0)][:k]
        found_scores = score_QR[i, np.searchsorted(rows, found)]
        hits += int(np.count_nonzero(found_scores >= lowest - ROUNDING * max(1, abs(lowest))))
        wanted += k
    return hits / wanted


def _parameters(index: Any, effort: int, allowed: Any) -> Any:
    """Returns how faiss searches: how much it looks at, and which rows it may return."""
    chosen = {} if allowed is None else {"sel": allowed}
    if hasattr(index, "nlist"):
        return faiss.SearchParametersIVF(nprobe=effort, **chosen)
    if hasattr(index, "hnsw"):
        return faiss.SearchParametersHNSW(efSearch=effort, **chosen)
    return faiss.SearchParameters(**chosen)


def _version(stored: StoredVectors) -> dict[str, int]:
    """Returns what changes when vectors are added or replaced."""
    return {"rows": len(stored), "parts": len(stored.files), "bytes": sum(map(os.path.getsize, stored.files))}


class Index:
    """The index of stored vectors, memory-mapped.

    Attributes:
      made: what ``build`` returned.

    Raises:
      FileNotFoundError: the vectors have no index.
      ValueError: the index is of other vectors.
    """

    def __init__(self, stored: StoredVectors):
        file = stored.index_file
        self.made = read_json(f"{file}.json")
        if self.made["vectors"] != _version(stored):
            raise ValueError(
                f"{file}: is the index of {self.made['rows']:,} other vectors than those of {stored.place}; run "
                f"nomic-jax index again, or search with --exact"
            )
        # Releases before 1.11 map only the lists of ivf, and read the others.
        self._index = faiss.read_index(str(file), getattr(faiss, "IO_FLAG_MMAP_IFC", faiss.IO_FLAG_MMAP))

    def search(self, query_QE: np.ndarray, k: int, allowed_N: np.ndarray | None = None) -> np.ndarray:
        """Returns the rows of the k vectors that are found [Q, k], best first, -1 where there are fewer.

        Args:
          allowed_N: bool, the rows that may be found. The fewer these are, the more cells or candidates are looked at.
        """
        effort, selector = self.made["effort"], None
        if allowed_N is not None:
            selector = faiss.IDSelectorBitmap(np.packbits(allowed_N, bitorder="little"))
            share = max(1, int(np.count_nonzero(allowed_N))) / len(allowed_N)
            effort = min(_most_effort(self._index, len(allowed_N)), int(np.ceil(effort / share)))
        parameters = _parameters(self._index, effort, selector)
        return self._index.search(as_indexed(query_QE, self.made["similarity"]), k, params=parameters)[1]

"""Searches stored vectors: through their index if they have one, else all of them."""

import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from nomic_jax.evals.tasks.retrieval import search, top_k
from nomic_jax.inference.similarity import similarity_matrix
from nomic_jax.inference.vectors.filters import matching
from nomic_jax.inference.vectors.stored import StoredVectors
from nomic_jax.run.pretrained import at_step

if TYPE_CHECKING:
    from nomic_jax.inference.embedder import Embedder
    from nomic_jax.inference.vectors.index import Index

IN_MEMORY = 1 << 30  # bytes of vectors that are kept for further queries
EXACT_ROWS = 50_000  # up to which the rows of a filter are compared one by one


class VectorSearch:
    """The search of stored vectors by a similarity.

    Args:
      similarity: "cosine", "dot", "euclidean" or "manhattan".
      filters: conditions that rows must fulfil; see ``filters.matching``.
      exact: do not use the index.

    Attributes:
      how: which search it is, in words.
    """

    def __init__(self, stored: StoredVectors, similarity: str, filters: Sequence[str] = (), exact: bool = False):
        self.stored, self.similarity = stored, similarity
        self.allowed_N = matching(stored, filters) if filters else None
        self.rows = len(stored) if self.allowed_N is None else int(np.count_nonzero(self.allowed_N))
        self._index = None if exact else self._opened()
        self._held: tuple[np.ndarray, np.ndarray] | None = None
        chosen = "" if self.allowed_N is None else f" (the filter leaves these of {len(stored):,})"
        self.how = f"{self.rows:,} vectors{chosen}, compared one by one"
        if self._index is not None:
            made = self._index.made
            recall = (
                f", which finds {made['recall']:.1%} of the nearest {made['recall_at']}" if "recall" in made else ""
            )
            self.how = f"{self.rows:,} vectors{chosen}, through the index ({made['kind']}{recall})"

    def _opened(self) -> "Index | None":
        if (self.allowed_N is not None and self.rows <= EXACT_ROWS) or not self.stored.index_file.exists():
            return None
        from nomic_jax.inference.vectors.index import Index  # faiss, which an exact search does not need

        index = Index(self.stored)
        return index if index.made["similarity"] == self.similarity else None

    def search(self, query_E: np.ndarray, k: int) -> tuple[list[int], np.ndarray]:
        """Returns the rows of the k most similar vectors that are found, best first, and their similarities."""
        query_1E, k = query_E[None], min(k, self.rows)
        if not k:
            return [], np.empty(0, np.float32)
        if self._index is None:
            found_K = self._exact(query_1E, k)
        else:
            found_K = self._index.search(query_1E, k, self.allowed_N)[0]
        # The index compares rounded vectors. Its ids are -1 where it finds fewer.
        found_K = np.sort(found_K[found_K >= 0])
        score_K = similarity_matrix(self.similarity, query_1E, self._vectors(found_K))[0]
        order_K = np.argsort(-score_K, kind="stable")
        return found_K[order_K].tolist(), score_K[order_K]

    def _exact(self, query_1E: np.ndarray, k: int) -> np.ndarray:
        if 4 * self.rows * self.stored.dim > IN_MEMORY:
            return top_k(self._scores(query_1E), k)[0]
        if self._held is None:
            if self.allowed_N is None:
                self._held = np.arange(len(self.stored)), self.stored.vectors()
            else:
                rows_N = np.flatnonzero(self.allowed_N)
                self._held = rows_N, self.stored.some(rows_N)
        rows_N, vectors_NE = self._held
        return rows_N[search(query_1E, vectors_NE, k, functools.partial(similarity_matrix, self.similarity))[0]]

    def _scores(self, query_1E: np.ndarray) -> Iterator[np.ndarray]:
        for first, vectors_NE, _ in self.stored.batches():
            score_1N = similarity_matrix(self.similarity, query_1E, vectors_NE)
            if self.allowed_N is not None:
                score_1N = np.where(self.allowed_N[first : first + len(vectors_NE)], score_1N, -np.inf)
            yield score_1N

    def _vectors(self, rows: np.ndarray) -> np.ndarray:
        if self._held is None:
            return self.stored.some(rows)
        return self._held[1][np.searchsorted(self._held[0], rows)]


def open_model(stored: StoredVectors, model: str | None = None, step: str = "") -> "Embedder":
    """Opens the model that made the vectors, for queries.

    Args:
      model: where it is now; None for where it was.
      step: of a run; see ``at_step``.

    Raises:
      ValueError: it is another model.
    """
    from nomic_jax.inference.embedder import Embedder

    settings = stored.record["settings"]
    found = at_step(model or stored.record["model"], step)
    embedder = Embedder.from_pretrained(found, dtype=settings["dtype"], max_length=settings["max_length"])
    for part, value in embedder.identity.items():
        if settings.get(f"{part} of --model", value) != value:
            raise ValueError(
                f"{stored.place}: its vectors are of another model than {found} (its {part} differs); name the model "
                f"with --model, or embed again"
            )
    embedder.truncate_dim = settings["truncate_dim"] or embedder.truncate_dim
    return embedder

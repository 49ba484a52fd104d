"""Tasks that embed distinct texts, and that find the nearest documents of each query."""

import functools
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np

from nomic_jax.curate.engine.array_task import ArrayTask
from nomic_jax.curate.engine.embedding import Encoder, encode_checked, texts_per_file
from nomic_jax.curate.engine.index import ApproximateIndex, top_k
from nomic_jax.curate.engine.sharded_array import ShardedArray
from nomic_jax.curate.engine.text_store import TextFile
from nomic_jax.curate.mine.corpus import Pairs
from nomic_jax.files.writing import write_json

RESULTS_AT_ONCE = 1 << 24  # results of a search that are in memory
NEAR = np.dtype([("document", np.int64), ("score", np.float32)])


class EmbeddingTask(ArrayTask):
    """A task that embeds texts, for a ``SearchTask``. Each block is a file of float32 [``texts_per_file``, E]."""

    is_last = False

    def __init__(self, texts: TextFile, role: Literal["query", "document"], work: Path, progress: bool):
        name = "queries" if role == "query" else "documents"
        super().__init__(f"embedding {name}", work, progress)
        self.texts, self.role, self.folder = texts, role, work / name
        self.per_file = texts_per_file(len(texts))

    def __len__(self) -> int:
        return -(-len(self.texts) // self.per_file)

    def file(self, block: int) -> Path:
        return ShardedArray.file(self.folder, block)

    def make(self, block: int, encoder: Encoder | None) -> np.ndarray:
        assert encoder is not None
        start = block * self.per_file
        texts = [self.texts[i] for i in range(start, min(start + self.per_file, len(self.texts)))]
        return encode_checked(getattr(encoder, self.role), texts, encoder.has_unit_length)


class SearchTask(ArrayTask):
    """A task that finds the k nearest documents of each query that can be its negatives.

    Each block is a file of NEAR [``per_file``, k]. Document -1 means that there are fewer documents, or that an
    approximate search found fewer.
    """

    def __init__(
        self,
        pairs: Pairs,
        work: Path,
        k: int,
        approximate_above: int | None,
        progress: bool,
        per_file: int = 4096,
    ):
        super().__init__("searching", work, progress)
        self.queries, self.documents, self.per_file = len(pairs.queries), len(pairs.documents), per_file
        self.k = min(k, self.documents)
        self.is_approximate = approximate_above is not None and self.documents > approximate_above
        # Earlier versions kept the k nearest documents, positives included, in near-K.
        self.folder = work / f"candidates-{self.k}-{'approximate' if self.is_approximate else 'exact'}"

    def __len__(self) -> int:
        return -(-self.queries // self.per_file)

    def __getstate__(self) -> dict[str, Any]:
        cached = ("pairs", "query_QE", "document_DE", "index", "near")
        return {name: value for name, value in self.__dict__.items() if name not in cached}

    def file(self, block: int) -> Path:
        return ShardedArray.file(self.folder, block)

    @functools.cached_property
    def pairs(self) -> Pairs:
        return Pairs(self.work / "pairs")

    @functools.cached_property
    def query_QE(self) -> ShardedArray:
        return ShardedArray(self.work / "queries", self.queries, texts_per_file(self.queries))

    @functools.cached_property
    def document_DE(self) -> ShardedArray:
        return ShardedArray(self.work / "documents", self.documents, texts_per_file(self.documents))

    @functools.cached_property
    def near(self) -> ShardedArray:
        """The candidates of all queries, NEAR [Q, k]."""
        return ShardedArray(self.folder, self.queries, self.per_file)

    @functools.cached_property
    def index(self) -> ApproximateIndex:
        return ApproximateIndex(self.query_QE, self.document_DE, self.work / "index.faiss")

    def make(self, block: int, encoder: Encoder | None) -> np.ndarray:
        start = block * self.per_file
        queries = self.query_QE[start : start + self.per_file]
        near = np.full((len(queries), self.k), np.array((-1, -np.inf), NEAR))
        # The k nearest that are left without a query's positives are among the k + positives nearest. Queries that need
        # about as many are searched together: most have one positive, a label that serves as a query has thousands.
        related_Q = np.array([self.pairs.count_related(start + place) for place in range(len(queries))])
        fetch_Q = np.minimum(self.k + 2 ** np.ceil(np.log2(related_Q)).astype(np.int64), self.documents)
        for fetch in np.unique(fetch_Q).tolist():
            places = np.flatnonzero(fetch_Q == fetch)
            for part in np.array_split(places, -(-len(places) * fetch // RESULTS_AT_ONCE)):
                for place, id_F, score_F in zip(part.tolist(), *self._search(queries[part], fetch)):
                    kept = np.flatnonzero((id_F >= 0) & self.pairs.can_be_negative(id_F, start + place))[: self.k]
                    near["document"][place, : len(kept)], near["score"][place, : len(kept)] = id_F[kept], score_F[kept]
        return near

    def _search(self, queries_QE: np.ndarray, fetch: int) -> tuple[np.ndarray, np.ndarray]:
        if self.is_approximate:
            return self.index.top_k(queries_QE, fetch, progress=self.progress)
        return top_k(queries_QE, self.document_DE, fetch, progress=self.progress)

    def recall(self) -> str | dict[str, Any]:
        """Returns the recall of an approximate search, which is measured once; "exact" for an exact search."""
        if not self.is_approximate:
            return "exact"
        file = self.folder / "recall.json"
        if not file.exists():
            write_json(file, self.index.recall(self.query_QE, self.k))
        return json.loads(file.read_text(encoding="utf-8"))

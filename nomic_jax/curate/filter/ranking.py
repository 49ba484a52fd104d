"""Ranks each pair's own document among the documents of its block."""

from pathlib import Path

import numpy as np

from nomic_jax.curate.engine.array_task import ArrayTask
from nomic_jax.curate.engine.embedding import Encoder, embed_texts
from nomic_jax.curate.engine.index import RECALL_AT, ApproximateIndex, own_ranks
from nomic_jax.curate.engine.row_blocks import CountedRows, equal_blocks
from nomic_jax.curate.engine.text_store import distinct_texts
from nomic_jax.curate.filter.vectors import write_vectors
from nomic_jax.files.folders import remove_folder
from nomic_jax.files.writing import write_json

SCORES = np.dtype([("rank", np.int32), ("score", np.float32)])


class RankingTask(ArrayTask):
    """A task that ranks each pair's own document among the distinct documents of its block.

    A block has N pairs, and is a file of SCORES [N]. Equal documents (up to surrounding whitespace) count as one, so
    they share a rank and do not compete with each other. Memory holds the texts of one block; its embeddings are in
    files. ``vectors`` is a folder that receives a parquet of each block's pairs and their embeddings; None for none.
    """

    def __init__(
        self,
        rows: CountedRows,
        work: Path,
        columns: tuple[str, str],
        *,
        block_size: int,
        approximate_above: int | None,
        vectors: Path | None = None,
        progress: bool,
    ):
        super().__init__("ranking", work, progress)
        self.rows, self.columns = rows, columns
        self.approximate_above = approximate_above
        self.vectors = vectors
        self.blocks = equal_blocks(len(rows), block_size)

    def __len__(self) -> int:
        return len(self.blocks)

    def file(self, block: int) -> Path:
        return self.work / f"{block:05d}.scores.npy"

    def recall_file(self, block: int) -> Path:
        return self.work / f"{block:05d}.recall.json"

    def make(self, block: int, encoder: Encoder | None) -> np.ndarray:
        assert encoder is not None
        folder, label = self.work / f"{block:05d}", f"block {block}"
        queries, documents = [], []
        for row in self.rows.block(*self.blocks[block]):
            queries.append(row[self.columns[0]])
            documents.append(row[self.columns[1]])
        texts, own_N = distinct_texts(documents)
        if self.vectors is None:
            del documents
        options = {"has_unit_length": encoder.has_unit_length, "progress": self.progress}
        query_NE = embed_texts(
            queries, encoder.query, folder / "queries", label=f"{label}: embedding queries", **options
        )
        document_DE = embed_texts(
            texts, encoder.document, folder / "documents", label=f"{label}: embedding documents", **options
        )
        index = None
        if self.approximate_above is not None and len(texts) > self.approximate_above:
            index = ApproximateIndex(query_NE, document_DE, folder / "index.faiss")
            write_json(self.recall_file(block), index.recall(query_NE, RECALL_AT))
        scores = np.empty(len(queries), SCORES)
        scores["rank"], scores["score"] = own_ranks(
            query_NE, document_DE, own_N, index=index, count=encoder.count_above, progress=self.progress
        )
        if self.vectors is not None:
            write_vectors(
                self.vectors / f"{block:05d}.parquet",
                self.columns,
                (queries, documents),
                ((query_NE, np.arange(len(queries))), (document_DE, own_N)),
            )
        return scores

    def tidy(self, block: int) -> None:
        # The embeddings (6 GB for a million pairs of width 768) are not needed after the ranks are saved.
        remove_folder(self.work / f"{block:05d}")

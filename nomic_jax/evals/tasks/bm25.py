"""BM25 on a retrieval task: word matching, the baseline for embedding models."""

import logging
from collections.abc import Iterator

import numpy as np

from nomic_jax.evals.tasks.retrieval import DEPTH, RetrievalTask, top_k


def run(task: RetrievalTask) -> Iterator[tuple[str, float]]:
    """Returns (metric, mean over the queries) of BM25.

    The settings are those of bm25s: Lucene's variant, k1 1.5, b 0.75, lowercase, English stop words.

    Raises:
      ModuleNotFoundError: bm25s is not installed.
    """
    try:
        import bm25s
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("BM25 needs the package bm25s: pip install nomic_jax[eval]") from error
    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it logs every index that it builds

    def tokens(texts: tuple[str, ...]) -> list[list[str]]:
        return bm25s.tokenize(list(texts), return_ids=False, show_progress=False)

    index = bm25s.BM25()
    index.index(tokens(task.documents), show_progress=False)
    ranking = [
        # get_scores rejects a query of stop words only; such a query matches nothing.
        top_k([(index.get_scores(words) if words else np.zeros(len(task.documents)))[None]], DEPTH)
        for words in tokens(task.queries)
    ]
    return task.score(np.concatenate(ranking))

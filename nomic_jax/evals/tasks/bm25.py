"""BM25 on a retrieval task: word matching, the baseline for embedding models."""

import logging
from collections.abc import Iterator, Sequence

import numpy as np

from nomic_jax.data.words import is_unspaced, words_of
from nomic_jax.evals.tasks.retrieval import DEPTH, RetrievalTask, top_k
from nomic_jax.extras import needs


def run(task: RetrievalTask) -> Iterator[tuple[str, float]]:
    """Returns (metric, mean over the queries) of BM25. Raises MissingPackage: bm25s is not installed."""
    return task.score(rank(task))


def rank(task: RetrievalTask) -> np.ndarray:
    """Returns document indices [Q, K], best first, as ``RetrievalTask.rank`` does.

    The settings are those of bm25s: Lucene's variant, k1 1.5, b 0.75, lowercase, English stop words, words of at least
    two letters. The words are those of ``nomic_jax.data.words``: bm25s itself cuts at combining marks, and takes a
    sentence in a script without spaces for a word. Such scripts are split into characters.

    Raises:
      MissingPackage: bm25s is not installed.
    """
    with needs("BM25", "nomic_jax[report]"):
        import bm25s
    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it logs every index that it builds

    index = bm25s.BM25()
    index.index(tokens(task.documents), show_progress=False)
    ranking = [
        # get_scores rejects a query of stop words only; such a query matches nothing.
        top_k([(index.get_scores(words) if words else np.zeros(len(task.documents)))[None]], DEPTH)
        for words in tokens(task.queries)
    ]
    return np.concatenate(ranking)


def tokens(texts: Sequence[str]) -> list[list[str]]:
    """Returns the words of each text that BM25 compares; for English text those of ``bm25s.tokenize``."""
    from bm25s.stopwords import STOPWORDS_EN

    stop_words = frozenset(STOPWORDS_EN)
    return [
        [word for word in words_of(text) if (len(word) > 1 or is_unspaced(word)) and word not in stop_words]
        for text in texts
    ]

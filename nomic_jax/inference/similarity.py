"""Similarities between embeddings, under the names of sentence-transformers."""

from collections.abc import Callable

import numpy as np


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def _distance(order: int) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    return lambda a, b: -np.linalg.norm(a - b, ord=order, axis=-1)


# Name -> function of vectors [..., E] -> [...].
SIMILARITIES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "cosine": lambda a, b: (_unit(a) * _unit(b)).sum(-1),
    "dot": lambda a, b: (a * b).sum(-1),
    "euclidean": _distance(2),
    "manhattan": _distance(1),
}


def pairwise_similarity(name: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns the similarities of vectors [N, E] at the same places, [N]; of two vectors, a scalar array."""
    return np.asarray(SIMILARITIES[name](a, b))


def similarity_matrix(name: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns the similarities of all vectors of [N, E] with all of [M, E], [N, M]; a vector counts as one row."""
    a, b = np.atleast_2d(a), np.atleast_2d(b)
    if name in ("cosine", "dot"):
        return _unit(a) @ _unit(b).T if name == "cosine" else a @ b.T
    return np.array([SIMILARITIES[name](x, b) for x in a], np.float32).reshape(len(a), len(b))

"""Similarities between embeddings, under the names of sentence-transformers."""

import functools
from collections.abc import Callable

import numpy as np


def _cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (a, b))
    return a @ b.T


def _negative_distance(a: np.ndarray, b: np.ndarray, order: int) -> np.ndarray:
    return -np.stack([np.linalg.norm(b - x, ord=order, axis=1) for x in a])


SIMILARITIES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "cosine": _cosine,
    "dot": lambda a, b: a @ b.T,
    "euclidean": functools.partial(_negative_distance, order=2),
    "manhattan": functools.partial(_negative_distance, order=1),
}

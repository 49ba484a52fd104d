"""The interface of evaluations: ``run(embed)`` yields (name, value).

The table of prompts by type of task is here too. Local tasks, mteb and LoCo share it.
"""

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import numpy as np

from nomic_jax.data.prompts import prompt_for

# (texts, name of a prompt or role, "" for no prompt) -> embeddings [N, E]. Retrieval compares them by inner product;
# classification and clustering use them unchanged.
Embed = Callable[[list[str], str], np.ndarray]
# (a [A, E], b [B, E]) -> similarities [A, B]; higher is closer.
Similarity = Callable[[np.ndarray, np.ndarray], np.ndarray]

# mteb's task type, or the side of a text -> nomic's prompt. The task type has priority, so that both sides of a
# reranking task are "classification", as in the paper. All retrieval tasks use the prompts of the sides.
PROMPTS = {
    "query": "search_query",
    "document": "search_document",
    "Clustering": "clustering",
    "BitextMining": "classification",
    "Classification": "classification",
    "MultilabelClassification": "classification",
    "PairClassification": "classification",
    "Regression": "classification",
    "Reranking": "classification",
    "STS": "classification",
    "Summarization": "classification",
    "ZeroShotClassification": "classification",
}


class TaskError(ValueError):
    """A task cannot be used. The message names the file or data set and what is wrong with it."""


class Evaluation(Protocol):
    """An evaluation that a training run or ``launch.evaluate`` computes."""

    @property
    def name(self) -> str: ...

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of the metrics, the main metric first."""
        ...

    def run(self, embed: Embed) -> Iterable[tuple[str, float]]:
        """Yields (metric, value), in the order of ``metrics``."""
        ...


class Encoders(Protocol):
    """A model at every requested length. Suites use a model only through this interface.

    Attributes:
      model: the model as named by the user: a folder, a hub name, or "bm25".
      batch_size: number of texts in a batch.
    """

    model: str
    batch_size: int

    def at(self, max_length: int | None) -> Any:
        """Returns the Embedder. Raises ValueError if the model does not support ``max_length`` tokens."""
        ...

    def embed(self, max_length: int | None, normalize: bool) -> Embed: ...

    def for_mteb(self, max_length: int, dim: int | None, name: str) -> Any:
        """Returns the model in the form that ``mteb.evaluate`` takes."""
        ...


def embed_with(embedder: Any, normalize: bool, batch_size: int = 64) -> Embed:
    """Returns the function with which tasks embed texts, by the rule of ``nomic_jax.data.prompts`` for prompts."""

    def embed(texts: list[str], prompt: str) -> np.ndarray:
        try:
            prefix = prompt_for(embedder.prompts, prompt)
        except ValueError as error:
            raise TaskError(f"{error}. See task.json in --help") from error
        return embedder.encode(texts, prompt=prefix, batch_size=batch_size, normalize_embeddings=normalize)

    return embed


def embedded(embed: Embed, texts: list[str], prompt: str) -> np.ndarray:
    """Returns embeddings, float32 [N, E]. Raises ValueError for a wrong shape, NaN or infinity."""
    x_NE = np.asarray(embed(texts, prompt), np.float32)
    if x_NE.ndim != 2 or len(x_NE) != len(texts):
        raise ValueError(f"embed returned shape {x_NE.shape} for {len(texts)} texts; expected [{len(texts)}, E]")
    if not np.isfinite(x_NE).all():
        raise ValueError(f"embed returned NaN or infinity under the prompt {prompt!r}")
    return x_NE


def inner_product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The similarity of "dot", and of "cosine" between vectors of length 1."""
    return a @ b.T


def unit_length(x_NE: np.ndarray) -> np.ndarray:
    return x_NE / np.maximum(np.linalg.norm(x_NE, axis=1, keepdims=True), 1e-12)


class TruncatedEmbeddings:
    """Embeddings truncated to fewer components (Matryoshka). Every text is encoded only once for all sizes."""

    def __init__(self, normalize: bool):
        self.normalize = normalize
        self._whole: dict[tuple[str, int], np.ndarray] = {}

    def to(self, dim: int, embed: Embed) -> Embed:
        """Returns ``embed`` truncated to ``dim`` components. The vectors of ``embed`` must not be normalised."""

        def truncated(texts: list[str], prompt: str) -> np.ndarray:
            key = (prompt, hash(tuple(texts)))
            if key not in self._whole:
                self._whole[key] = embedded(embed, texts, prompt)
            x_NE = self._whole[key]
            if dim > x_NE.shape[1]:
                raise TaskError(f"the embeddings have {x_NE.shape[1]} components; {dim} cannot be kept")
            return unit_length(x_NE[:, :dim]) if self.normalize else x_NE[:, :dim]

        return truncated

    def forget(self) -> None:
        self._whole.clear()

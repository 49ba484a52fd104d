"""What every evaluation is: ``run(embed)`` yields (name, value), and nothing else is asked of it.

The one table of prompts by type of task stands here too, for local tasks, mteb and LoCo alike.
"""

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import numpy as np

# (texts, name of a prompt) -> embeddings [N, E]. Retrieval compares them by inner product; classification and
# clustering take them as they are.
Embed = Callable[[list[str], str], np.ndarray]

# mteb's task type, or the side of a text -> nomic's prompt. The type goes first, so that both sides of a reranking
# task are "classification", as in the paper; the sides are left for retrieval of every kind.
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
    """A task that cannot be used; the message names the file or data set and what is wrong with it."""


class Evaluation(Protocol):
    """What a training run, or ``launch.evaluate``, computes figures with."""

    @property
    def name(self) -> str: ...

    @property
    def metrics(self) -> tuple[str, ...]:
        """Their names, the main one first."""
        ...

    def run(self, embed: Embed) -> Iterable[tuple[str, float]]:
        """(metric, value), in that order."""
        ...


class Encoders(Protocol):
    """A model at every length that is asked for; what turns it into figures knows nothing else of it.

    Attributes:
      model: what the user calls it: a folder, a name of the hub, or "bm25".
      batch_size: texts computed together.
    """

    model: str
    batch_size: int

    def at(self, max_length: int | None) -> Any:
        """The Embedder. Raises ValueError if the model does not take so many tokens."""
        ...

    def embed(self, max_length: int | None, normalize: bool) -> Embed: ...

    def for_mteb(self, max_length: int, dim: int | None, name: str) -> Any:
        """What ``mteb.evaluate`` takes for a model."""
        ...


def embedded(embed: Embed, texts: list[str], prompt: str) -> np.ndarray:
    """float32 [N, E]; ValueError for a wrong shape, NaN or infinity."""
    x_NE = np.asarray(embed(texts, prompt), np.float32)
    if x_NE.ndim != 2 or len(x_NE) != len(texts):
        raise ValueError(f"embed gave shape {x_NE.shape} for {len(texts)} texts; expected [{len(texts)}, E]")
    if not np.isfinite(x_NE).all():
        raise ValueError(f"embed gave NaN or infinity under the prompt {prompt!r}")
    return x_NE


def unit_length(x_NE: np.ndarray) -> np.ndarray:
    return x_NE / np.maximum(np.linalg.norm(x_NE, axis=1, keepdims=True), 1e-12)


class TruncatedEmbeddings:
    """Embeddings cut to fewer components (Matryoshka); every text is encoded once for all numbers of them."""

    def __init__(self, normalize: bool):
        self.normalize = normalize
        self._whole: dict[tuple[str, int], np.ndarray] = {}

    def to(self, dim: int, embed: Embed) -> Embed:
        """``embed``, whose vectors must not be normalised before they are cut, with ``dim`` components."""

        def cut(texts: list[str], prompt: str) -> np.ndarray:
            key = (prompt, hash(tuple(texts)))
            if key not in self._whole:
                self._whole[key] = embedded(embed, texts, prompt)
            x_NE = self._whole[key]
            if dim > x_NE.shape[1]:
                raise TaskError(f"the embeddings have {x_NE.shape[1]} components; {dim} cannot be kept")
            return unit_length(x_NE[:, :dim]) if self.normalize else x_NE[:, :dim]

        return cut

    def forget(self) -> None:
        self._whole.clear()

"""Computes embeddings with any encoder and saves them at regular intervals."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from nomic_jax.curate.engine.sharded_array import Matrix, ShardedArray, cached_array

TEXTS_PER_FILE = 2048  # minimum: one to two minutes of a base-size teacher on a CPU

Encode = Callable[[list[str]], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Encoder:
    """The teacher.

    Attributes:
      query, document: texts -> float32 [N, E]. They are compared by inner product.
      identity: the settings that the embeddings depend on, such as weights and prompts; see ``locked_settings``.
      count_above: (queries, documents, limits [Q]) -> the number of documents that score above each query's limit,
        int [Q], computed on the encoder's devices; None if those are the CPUs that numpy uses.
      has_unit_length: whether every vector has length 1, so that the inner product is the cosine. False for a model
        that was trained for the inner product of vectors of any length.
    """

    query: Encode
    document: Encode
    identity: Mapping[str, Any]
    count_above: Callable[[Matrix, Matrix, np.ndarray], np.ndarray] | None = None
    has_unit_length: bool = True


@dataclasses.dataclass(frozen=True)
class Scorer:
    """The teacher of ``nomic_jax.curate.score``, which gives scores and no vectors: a cross-encoder, or an embedder.

    Attributes:
      score: (queries, documents) -> the score of each pair, float32 [N].
      identity: the settings that the scores depend on, such as weights and prompts; see ``locked_settings``.
    """

    score: Callable[[list[str], list[str]], np.ndarray]
    identity: Mapping[str, Any]


def texts_per_file(count: int) -> int:
    """Returns how many of ``count`` texts a file holds: a 64th, as a power of two, within 2048 to 16384.

    The encoder sorts the texts of a file by length, so larger files need less padding. The number depends only on
    ``count``, so that every process and every restart finds the same files.
    """
    return min(max(TEXTS_PER_FILE, 1 << (count // 64).bit_length()), 8 * TEXTS_PER_FILE)


def embed_texts(
    texts: Sequence[str],
    encode: Encode,
    folder: Path,
    *,
    label: str,
    has_unit_length: bool = True,
    progress: bool = True,
) -> ShardedArray:
    """Embeds texts into files of ``texts_per_file`` rows in ``folder``, float32 [N, E]. Existing files are reused.

    Raises:
      ValueError: see ``encode_checked``.
    """
    per_file = texts_per_file(len(texts))
    with tqdm(total=len(texts), desc=label, unit=" texts", leave=False, disable=not progress) as bar:
        for number, start in enumerate(range(0, len(texts), per_file)):
            shard = list(texts[start : start + per_file])
            cached_array(
                ShardedArray.file(folder, number), functools.partial(encode_checked, encode, shard, has_unit_length)
            )
            bar.update(len(shard))
    return ShardedArray(folder, len(texts), per_file)


def encode_checked(encode: Encode, texts: list[str], has_unit_length: bool = True) -> np.ndarray:
    """Returns the embeddings of the texts, float32 [N, E].

    Raises:
      ValueError: the encoder does not return a vector of length 1 (or of any length above 0) for every text.
    """
    vectors = np.asarray(encode(texts), np.float32)
    if vectors.ndim != 2 or len(vectors) != len(texts):
        raise ValueError(f"the encoder returned an array of shape {vectors.shape} for {len(texts)} texts")
    # A NaN or zero vector ties with every document, so its row would pass every filter.
    lengths = np.linalg.norm(vectors, axis=1)
    is_right = np.abs(lengths - 1) < 1e-3 if has_unit_length else (lengths > 0) & np.isfinite(lengths)
    wrong = np.flatnonzero(~is_right)
    if len(wrong):
        text, length = texts[wrong[0]], lengths[wrong[0]]
        expected = "1" if has_unit_length else "a finite length above 0"
        raise ValueError(f"the encoder gave the text {text[:80]!r} a vector of length {length}; expected {expected}")
    return vectors

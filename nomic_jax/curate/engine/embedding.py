"""Texts into vectors, saved every so often, through whatever encoder comes in."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from nomic_jax.curate.engine.sharded_array import Matrix, ShardedArray, cached_array

TEXTS_PER_FILE = 2048  # at least: a minute or two of a base-size teacher on a CPU

Encode = Callable[[list[str]], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Encoder:
    """The teacher.

    Attributes:
      query, document: texts -> float32 [N, E], each row of length 1.
      identity: what the embeddings depend on, such as weights and prompts; see ``locked_settings``.
      count_above: (queries, documents, limits [Q]) -> how many documents score above each query's limit, int [Q], on
        the encoder's devices; None where those are the processors that numpy uses.
    """

    query: Encode
    document: Encode
    identity: Mapping[str, Any]
    count_above: Callable[[Matrix, Matrix, np.ndarray], np.ndarray] | None = None


def texts_per_file(count: int) -> int:
    """Of ``count`` texts, how many are embedded between two saves: a 64th, as a power of two, but 2048 to 16384.

    The encoder sorts so many by length, so of many texts it pads few. The number depends on nothing else, so that every
    process and every restart finds the same files.
    """
    return min(max(TEXTS_PER_FILE, 1 << (count // 64).bit_length()), 8 * TEXTS_PER_FILE)


def embed_texts(
    texts: Sequence[str], encode: Encode, folder: Path, *, label: str, progress: bool = True
) -> ShardedArray:
    """Embeddings [N, E], float32, in files of ``texts_per_file`` in ``folder``; those found there are not made again.

    Raises:
      ValueError: the encoder returns something else than a vector of length 1 for every text.
    """
    per_file = texts_per_file(len(texts))
    with tqdm(total=len(texts), desc=label, unit=" texts", leave=False, disable=not progress) as bar:
        for number, start in enumerate(range(0, len(texts), per_file)):
            shard = list(texts[start : start + per_file])
            cached_array(ShardedArray.file(folder, number), functools.partial(encode_checked, encode, shard))
            bar.update(len(shard))
    return ShardedArray(folder, len(texts), per_file)


def encode_checked(encode: Encode, texts: list[str]) -> np.ndarray:
    """float32 [N, E].

    Raises:
      ValueError: the encoder returns something else than a vector of length 1 for every text.
    """
    vectors = np.asarray(encode(texts), np.float32)
    if vectors.ndim != 2 or len(vectors) != len(texts):
        raise ValueError(f"the encoder returned an array of shape {vectors.shape} for {len(texts)} texts")
    # A NaN or a zero vector ties with everything, so its row would pass every filter.
    lengths = np.linalg.norm(vectors, axis=1)
    wrong = np.flatnonzero(~(np.abs(lengths - 1) < 1e-3))
    if len(wrong):
        text, length = texts[wrong[0]], lengths[wrong[0]]
        raise ValueError(f"the encoder gave the text {text[:80]!r} a vector of length {length}; expected 1")
    return vectors

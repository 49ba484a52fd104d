"""Pads rows of different lengths to arrays of few shapes, because every new shape costs a compilation."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

LENGTHS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)


def padded_length(longest: int, max_length: int) -> int:
    """Returns the smallest of LENGTHS that holds ``longest`` tokens, at most ``max_length``."""
    return min(next((length for length in LENGTHS if length >= longest), max_length), max_length)


def pad_right(rows: Sequence[np.ndarray], length: int, pad_id: int) -> np.ndarray:
    """Returns the rows padded on the right, int32 [len(rows), length]."""
    lengths = np.array([len(ids) for ids in rows], np.int64)
    return pad_flat(np.concatenate(rows) if len(rows) else np.zeros(0, np.int32), lengths, length, pad_id)


def pad_flat(ids: np.ndarray, lengths: np.ndarray, length: int, pad_id: int) -> np.ndarray:
    """Returns concatenated texts padded on the right, int32 [len(lengths), length]."""
    out = np.full((len(lengths), length), pad_id, np.int32)
    out[np.arange(length) < lengths[:, None]] = ids
    return out


def hash_texts(ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Returns 64-bit hashes of concatenated texts, uint32 [texts, 2]. Texts with equal ids have equal hashes.

    A text's hash is the sum of the hashes (splitmix64) of each token with its position, hashed once more. It is
    returned as two halves because JAX has no uint64 by default.
    """
    ends = np.cumsum(lengths)
    position = np.arange(len(ids)) - np.repeat(ends - lengths, lengths)
    hashed = mix_bits(ids.astype(np.uint64) << np.uint64(32) | position.astype(np.uint64))
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(hashed)])
    hashes = mix_bits(sums[ends] - sums[ends - lengths] + lengths.astype(np.uint64))
    return np.ascontiguousarray(hashes.astype("<u8")).view("<u4").reshape(-1, 2)


def mix_bits(x: np.ndarray) -> np.ndarray:
    """Returns 64 bits that depend on all bits of each uint64 (splitmix64)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


class Shape(NamedTuple):
    """The shape of a padded batch."""

    rows: int
    length: int


def length_sorted_batches(
    lengths: np.ndarray,
    *,
    max_length: int,
    batch_size: int,
    texts_per_device: Callable[[int], int],
    devices: int,
) -> Iterator[tuple[np.ndarray, Shape]]:
    """Yields (indices of the texts, shape to pad them to) of every batch.

    The longest texts come first: neighbours have similar lengths, and a lack of memory shows at once. The shapes are
    few: lengths from LENGTHS, and row counts that are the maximum that fits or a power of two, rounded up to a multiple
    of the devices.

    Args:
      lengths: tokens of each text, at most ``max_length``.
      batch_size: maximum number of texts in a batch, over all devices.
      texts_per_device: padded length -> maximum number of texts of a batch on one device; at least 1.
    """
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        length = padded_length(int(lengths[order[start]]), max_length)
        fitting = 1 << (texts_per_device(length).bit_length() - 1)
        most = min(batch_size, fitting * devices)
        rows = order[start : start + most]
        size = min(most, 1 << (len(rows) - 1).bit_length())
        yield rows, Shape(-(-size // devices) * devices, length)
        start += len(rows)

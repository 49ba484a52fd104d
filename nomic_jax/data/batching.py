"""Rows of different lengths into arrays of few shapes: every new shape costs a compilation."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

LENGTHS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)


def padded_length(longest: int, max_length: int) -> int:
    """The smallest of LENGTHS that holds ``longest`` tokens, at most ``max_length``."""
    return min(next((length for length in LENGTHS if length >= longest), max_length), max_length)


def pad_right(rows: Sequence[np.ndarray], length: int, pad_id: int) -> np.ndarray:
    """int32 [len(rows), length]."""
    out = np.full((len(rows), length), pad_id, np.int32)
    for i, ids in enumerate(rows):
        out[i, : len(ids)] = ids
    return out


class Shape(NamedTuple):
    """Of a padded batch."""

    rows: int
    length: int


def length_sorted_batches(
    lengths: np.ndarray, *, max_length: int, batch_size: int, tokens_per_device: int, devices: int
) -> Iterator[tuple[np.ndarray, Shape]]:
    """(indices of the texts, shape to pad them to) of every batch.

    Longest first: neighbours have similar lengths, and memory runs out at once if it does. The shapes are few: lengths
    of the menu, and row counts that are the most that fit or a power of two, as multiples of the devices.

    Args:
      lengths: tokens of each text, none above ``max_length``.
      batch_size: most texts of a batch, over all devices.
      tokens_per_device: most tokens of a batch on one device, padding included; a text is never split.
    """
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        length = padded_length(int(lengths[order[start]]), max_length)
        fitting = 1 << (max(1, tokens_per_device // length).bit_length() - 1)
        most = min(batch_size, fitting * devices)
        rows = order[start : start + most]
        size = min(most, 1 << (len(rows) - 1).bit_length())
        yield rows, Shape(-(-size // devices) * devices, length)
        start += len(rows)

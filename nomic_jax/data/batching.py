"""Rows of different lengths into arrays of few shapes: every new shape costs a compilation."""

from collections.abc import Sequence

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

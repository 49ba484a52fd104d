"""Packs texts into rows for inference, in calls of few shapes, because every new shape costs a compilation."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from nomic_jax.data.batches.packing import pack
from nomic_jax.data.batches.shapes import Shape
from nomic_jax.data.tokens.store import flat_indices

MAX_SEGMENTS = 128  # texts of a row; cuDNN stores something for each of them (``nomic_jax.model.attention``)
# Shortest text, in tokens, of which as many as fill a row find a place in it.
_TOKENS_OF_SEGMENT = 8
# A less preferred row length is chosen if it computes at most this share of the tokens: each is compiled.
_WORTH_A_SHAPE = 0.95
# The number of rows in a call is one of so many, for each length.
_NUMBERS_OF_ROWS = 8


class Call(NamedTuple):
    """Texts that are computed together; arrays have one element for each text.

    Attributes:
      texts: indices of the texts.
      row, segment, offset: the row of the text, its number in the row (from 0) and the place of its first token.
      shape: rows and tokens of a row.
    """

    texts: np.ndarray
    row: np.ndarray
    segment: np.ndarray
    offset: np.ndarray
    shape: Shape

    def fill(self, ids: Sequence[np.ndarray], pad_id: int) -> dict[str, np.ndarray]:
        """Returns ``ids`` and ``segment`` (1, 2, ...; 0 for padding), int32 of ``shape``, of the texts' token ids."""
        lengths = np.array([len(ids[text]) for text in self.texts])
        token = flat_indices(self.row * self.shape.length + self.offset, lengths)
        batch = {"ids": np.full(self.shape, pad_id, np.int32), "segment": np.zeros(self.shape, np.int32)}
        batch["ids"].reshape(-1)[token] = np.concatenate([ids[text] for text in self.texts])
        batch["segment"].reshape(-1)[token] = np.repeat(self.segment + 1, lengths)
        return batch


def max_segments(row_length: int) -> int:
    """Returns the number of texts for which a row has places."""
    return min(MAX_SEGMENTS, max(1, row_length // _TOKENS_OF_SEGMENT))


def packed_calls(
    lengths: np.ndarray,
    *,
    row_lengths: Sequence[int],
    preferred: Sequence[int],
    largest: int,
    rows_per_device: Callable[[int], int],
    devices: int,
) -> Iterator[Call]:
    """Yields the calls that compute all texts. Those of the longest texts come first: a lack of memory shows at once.

    Texts are packed in rows of one length: a preferred one, or another one up to ``largest`` that leaves less padding.
    A text longer than that has a row of its own, in the shortest length that holds it.

    Args:
      lengths: tokens of each text, at least 1.
      row_lengths: the allowed lengths of rows, ascending; the last one holds the longest text.
      preferred: some of them, the best one first.
      largest: one of them.
      rows_per_device: row length -> maximum number of rows in a call on one device; at least 1.
    """
    length_of_text = np.array(row_lengths)[np.searchsorted(row_lengths, lengths)]
    long = lengths > largest
    for length in sorted(set(length_of_text[long].tolist()), reverse=True):
        texts = np.flatnonzero(long & (length_of_text == length))
        zeros = np.zeros_like(texts)
        yield from _in_calls(texts, np.arange(len(texts)), zeros, zeros, length, rows_per_device(length), devices)
    texts = np.flatnonzero(~long)
    if len(texts):
        fitting = [length for length in row_lengths if max(lengths[texts]) <= length <= largest]
        fitting.sort(key=lambda length: (preferred.index(length) if length in preferred else len(preferred), -length))
        length, (row, segment, offset, _) = _best_rows(lengths[texts], fitting, devices)
        yield from _in_calls(texts, row, segment, offset, length, rows_per_device(length), devices)


def _best_rows(lengths: np.ndarray, row_lengths: Sequence[int], devices: int):
    """Returns (row length, what ``pack`` returns) with the fewest computed tokens; see _WORTH_A_SHAPE."""
    best: tuple = (math.inf,)
    for row_length in row_lengths:
        packed = pack(lengths, row_length, max_segments(row_length))
        tokens = -(-packed[3] // devices) * devices * row_length
        if tokens <= _WORTH_A_SHAPE * best[0]:
            best = tokens, row_length, packed
        if tokens * _WORTH_A_SHAPE <= lengths.sum():
            break  # no other can be worth it
    return best[1:]


def _in_calls(
    texts: np.ndarray,
    row: np.ndarray,
    segment: np.ndarray,
    offset: np.ndarray,
    length: int,
    most: int,
    devices: int,
) -> Iterator[Call]:
    """Yields the calls of rows of one length, all in one shape: as few as possible, of hardly more rows than needed."""
    order = np.argsort(row, kind="stable")
    rows = -(-(int(row.max()) + 1) // devices)
    calls = -(-rows // most)
    if rows < _WORTH_A_SHAPE * calls * most:
        step = -(-most // _NUMBERS_OF_ROWS)
        most = min(most, -(-rows // (calls * step)) * step)
    per_call = most * devices
    for first in range(0, int(row.max()) + 1, per_call):
        part = order[slice(*np.searchsorted(row[order], [first, first + per_call]))]
        yield Call(texts[part], row[part] - first, segment[part], offset[part], Shape(per_call, length))

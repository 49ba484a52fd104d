"""Streams of batches.

A stream is a pure function of the step: the place in the data is the step number, resuming costs nothing, and the rows
of a step are the same for any number of devices, processes and threads.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from nomic_jax.data.batches.packing import Layout
from nomic_jax.data.tokens.store import TokenStore


class Batch(NamedTuple):
    """One process's share of a global batch.

    Attributes:
      arrays: what the stage's loss takes; the first axis of each is rows.
      source: the name of the source that all rows come from.
      real_tokens, padded_tokens: of the global batch: texts' own tokens, and those plus padding, and with chunks plus
        what the other devices could do while they wait for the one with most of them.
      token_pairs: of the global batch: the sum of texts' squared lengths, what attention has to do.
    """

    arrays: dict[str, np.ndarray]
    source: str
    real_tokens: int
    padded_tokens: int
    token_pairs: int


class Stream(Protocol):
    """An endless sequence of global batches, with random access.

    Attributes:
      fingerprint: of rows, tokenizer, prefixes and every setting that decides what a step sees. A run refuses to resume
        on a stream with another one.
      steps_per_epoch: after so many steps the rows come again, in another order.
      rows: rows of all sources.
      stores: the tokens of each source.
      layout: the chunks that texts lie in, or the rows of documents told apart by segment ids; else None.
    """

    stores: Sequence[TokenStore]
    layout: Layout | None
    fingerprint: str
    steps_per_epoch: int
    rows: int

    def batch(self, step: int, shard: int, shard_count: int) -> Batch:
        """The ``shard``-th of ``shard_count`` equal parts of the batch of a step."""
        ...

    def row_numbers(self, step: int) -> dict[str, list[int]]:
        """Source -> its rows in the batch of a step; a row of masked-LM is ``seq_len`` tokens, counted from 0."""
        ...


def share(size: int, shard: int, shard_count: int) -> slice:
    """The rows of a global batch of ``size`` that belong to a shard."""
    if size % shard_count:
        raise ValueError(f"a batch of {size} rows cannot be dealt to {shard_count} processes evenly")
    part = size // shard_count
    return slice(shard * part, (shard + 1) * part)

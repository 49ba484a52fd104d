"""Streams of batches.

A stream is a pure function of the step. The position in the data is the step number, so resuming costs nothing. The
rows of a step are the same for any number of devices, processes and threads.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from nomic_jax.data.batches.packing import Layout
from nomic_jax.data.tokens.store import TokenStore


class Batch(NamedTuple):
    """One process's share of a global batch.

    Attributes:
      arrays: inputs of the stage's loss; the first axis of each is rows.
      source: name of the source of all rows.
      real_tokens: tokens of the texts of the global batch.
      padded_tokens: real_tokens plus padding. With chunks, also the tokens that devices could compute while they wait
        for the device with the most tokens.
      token_pairs: sum of the squared text lengths of the global batch; the work of attention is proportional to it.
    """

    arrays: dict[str, np.ndarray]
    source: str
    real_tokens: int
    padded_tokens: int
    token_pairs: int


class Stream(Protocol):
    """An endless sequence of global batches, with random access.

    Attributes:
      fingerprint: digest of rows, tokenizer, prefixes and every setting that affects the data of a step. A run does not
        resume on a stream with another fingerprint.
      steps_per_epoch: number of steps after which the rows repeat, in another order.
      rows: number of rows of all sources.
      shuffle: version of the permutation that orders the rows (``nomic_jax.data.batches.permutation``).
      stores: token store of each source.
      layout: the chunks that hold the texts, or the rows of documents separated by segment ids; otherwise None.
    """

    stores: Sequence[TokenStore]
    layout: Layout | None
    fingerprint: str
    steps_per_epoch: int
    rows: int
    shuffle: int

    def batch(self, step: int, shard: int, shard_count: int) -> Batch:
        """Returns part ``shard``, from 0, of ``shard_count`` equal parts of a step's batch."""
        ...

    def row_numbers(self, step: int) -> dict[str, list[int]]:
        """Returns source -> its rows in a step's batch. A row of masked-LM is ``seq_len`` tokens, counted from 0."""
        ...


def share(size: int, shard: int, shard_count: int) -> slice:
    """Returns the rows of a global batch of ``size`` rows that belong to a shard."""
    if size % shard_count:
        raise ValueError(f"a batch of {size} rows cannot be divided evenly among {shard_count} processes")
    part = size // shard_count
    return slice(shard * part, (shard + 1) * part)

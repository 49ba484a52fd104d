"""Contrastive batches: every batch holds rows of one source, queries and documents padded on the right."""

import hashlib
from collections.abc import Sequence
from typing import Literal

import numpy as np

from nomic_jax.data.batching import pad_right, padded_length
from nomic_jax.data.loader import Batch, share, shuffled
from nomic_jax.data.tokenizer import Tokenizer, truncate
from nomic_jax.data.tokens import TokenStore


class PairStream:
    """Pairs, or triplets when ``num_negatives`` is given; sources are visited in proportion to their rows.

    In an epoch every source gives its full batches (rows // batch_size), all of them in one shuffled order; rows are
    shuffled within their source. The negatives of a row are drawn anew at every visit.

    Arrays of a batch (b rows, M negatives, Lq and Ld from a short menu of lengths):
      query_ids [b, Lq], query_length [b], document_ids [b, 1 + M, Ld], document_length [b, 1 + M]: document 0 of each
      row is the positive. query_hash [b, 2] and document_hash [b, 1 + M, 2], uint32: equal where the token ids that the
      model sees are equal.
    """

    def __init__(
        self,
        stores: Sequence[TokenStore],
        tokenizer: Tokenizer,
        *,
        batch_size: int,
        query_length: int,
        document_length: int,
        num_negatives: int = 0,
        too_few_negatives: Literal["error", "random"] = "error",
        seed: int = 0,
    ):
        self.stores: Sequence[TokenStore] = list(stores)
        self.batch_size, self.seed, self.num_negatives = batch_size, seed, num_negatives
        self.query_length, self.document_length = query_length, document_length
        self.pad_id = tokenizer.special_id("[PAD]")
        batches = [len(store) // batch_size for store in self.stores]
        for store, count in zip(self.stores, batches):
            if count == 0:
                raise ValueError(
                    f"source {store.name!r} has {len(store)} rows, fewer than config.batch_size {batch_size}; "
                    f"lower the batch size or leave the source out"
                )
            if num_negatives and too_few_negatives == "error":
                _check_negatives(store, num_negatives)
        self.batch_ends = np.cumsum(batches)
        self.steps_per_epoch = int(self.batch_ends[-1])
        self.rows = sum(len(store) for store in self.stores)
        settings = (batch_size, query_length, document_length, num_negatives, too_few_negatives, seed)
        fingerprints = tuple(store.fingerprint for store in self.stores)
        self.fingerprint = hashlib.sha256(repr(settings + fingerprints).encode()).hexdigest()

    def rows_of_step(self, step: int) -> tuple[int, np.ndarray]:
        """(index of the source, its row numbers [batch_size]) of a step."""
        epoch, slot = divmod(step, self.steps_per_epoch)
        slot = shuffled(slot, self.steps_per_epoch, self.seed, epoch)
        source = int(np.searchsorted(self.batch_ends, slot, side="right"))
        first = (slot - (int(self.batch_ends[source - 1]) if source else 0)) * self.batch_size
        size = len(self.stores[source])
        return source, np.array(
            [shuffled(first + i, size, self.seed + 1 + source, epoch) for i in range(self.batch_size)], np.int64
        )

    def batch(self, step: int, shard: int = 0, shard_count: int = 1) -> Batch:
        source, rows = self.rows_of_step(step)
        store = self.stores[source]
        # For all rows, not this process's alone: every process must arrive at the same shapes.
        candidates = np.stack([self._candidates(store, row, step) for row in rows])
        query_lengths = np.minimum(store.columns["query"].lengths(rows), self.query_length)
        document_lengths = np.minimum(_candidate_lengths(store, candidates), self.document_length)
        Lq = padded_length(int(query_lengths.max()), self.query_length)
        Ld = padded_length(int(document_lengths.max()), self.document_length)

        part = share(self.batch_size, shard, shard_count)
        own = candidates[part]
        queries = [truncate(store.columns["query"][row], Lq) for row in rows[part]]
        documents = [truncate(_candidate_ids(store, candidate), Ld) for candidate in own.ravel()]
        arrays = {
            "query_ids": pad_right(queries, Lq, self.pad_id),
            "query_length": query_lengths[part].astype(np.int32),
            "query_hash": _hashes(queries),
            "document_ids": pad_right(documents, Ld, self.pad_id).reshape(*own.shape, Ld),
            "document_length": document_lengths[part].astype(np.int32),
            "document_hash": _hashes(documents).reshape(*own.shape, 2),
        }
        return Batch(
            arrays,
            store.name,
            real_tokens=int(query_lengths.sum() + document_lengths.sum()),
            padded_tokens=self.batch_size * Lq + candidates.size * Ld,
        )

    def _candidates(self, store: TokenStore, row: int, step: int) -> np.ndarray:
        """What a query is compared with, [1 + M]: r < rows is document r, and rows + n is text n of the negatives."""
        if not self.num_negatives:
            return np.array([row])
        rng = np.random.default_rng([self.seed, step, row])
        mined = np.arange(store.negative_rows[row], store.negative_rows[row + 1])
        drawn = len(store) + rng.permutation(mined)[: self.num_negatives]
        # A filler that happens to be the row's own positive is masked by the loss, like any duplicate of it.
        fillers = rng.integers(0, len(store), self.num_negatives - len(drawn))
        return np.concatenate([[row], drawn, fillers])


def _candidate_lengths(store: TokenStore, candidates: np.ndarray) -> np.ndarray:
    lengths = store.columns["document"].lengths(np.minimum(candidates, len(store) - 1))
    if (candidates >= len(store)).any():
        of_negatives = store.columns["negatives"].lengths(np.maximum(candidates - len(store), 0))
        lengths = np.where(candidates < len(store), lengths, of_negatives)
    return lengths


def _candidate_ids(store: TokenStore, candidate: int) -> np.ndarray:
    if candidate < len(store):
        return store.columns["document"][candidate]
    return store.columns["negatives"][candidate - len(store)]


def _check_negatives(store: TokenStore, needed: int) -> None:
    counts = np.diff(store.negative_rows)
    short = np.flatnonzero(counts < needed)
    if len(short):
        raise ValueError(
            f"source {store.name!r}: {len(short)} of {len(store)} rows have fewer than {needed} negatives, first row "
            f"{short[0]} with {counts[short[0]]}; mine more, lower config.data.num_negatives, or set "
            f'config.data.too_few_negatives="random" to fill up with other rows\' documents'
        )


def _hashes(rows: Sequence[np.ndarray]) -> np.ndarray:
    """uint32 [len(rows), 2]: 64 bits of each id sequence, as two halves because JAX has no uint64 by default."""
    digests = b"".join(hashlib.blake2b(ids.astype(np.uint32).tobytes(), digest_size=8).digest() for ids in rows)
    return np.frombuffer(digests, np.uint32).reshape(len(rows), 2)

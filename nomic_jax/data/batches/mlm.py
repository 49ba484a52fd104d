"""Masked-LM batches: packed rows of exactly ``seq_len`` tokens, of which 30 % (by default) are predicted."""

import hashlib
from collections.abc import Sequence

import numpy as np

from nomic_jax.data.batches.packing import Layout
from nomic_jax.data.batches.permutation import VERSION, fingerprinted, shuffled
from nomic_jax.data.batches.shapes import Shape
from nomic_jax.data.batches.stream import Batch, share
from nomic_jax.data.tokens.store import TokenStore, check_tokenizer
from nomic_jax.data.tokens.tokenizer import Tokenizer


class MlmStream:
    """Concatenates documents and cuts them into rows. Only the tokens after a source's last full row are dropped.

    Masking is as in BERT: a fixed share of a row's tokens is chosen, never special tokens. Of these, 80 % become
    [MASK], 10 % become a random token and 10 % stay. A fixed share, instead of an independent choice per token, keeps
    the expectation and bounds the predictions per row, so that the head computes only the predictions. The choice is a
    function of (seed, epoch, row).

    Arrays of a batch: ``ids`` [B, L], ``position`` [B, P] and ``target`` [B, P] of the tokens to predict (target -1:
    unused slot; no position of a row repeats), and with ``document_mask`` also ``segment`` [B, L], the document of each
    token.
    """

    def __init__(
        self,
        stores: Sequence[TokenStore],
        tokenizer: Tokenizer,
        *,
        batch_size: int,
        seq_len: int,
        mask_rate: float = 0.3,
        document_mask: bool = False,
        seed: int = 0,
        shuffle: int = VERSION,
    ):
        self.stores: Sequence[TokenStore] = list(stores)
        check_tokenizer(self.stores, tokenizer)
        self.texts = [store.columns["text"] for store in self.stores]
        # All rows are full, so there is only one shape.
        self.layout = Layout((Shape(1, seq_len),), self._max_documents(seq_len)) if document_mask else None
        self.row_ends = np.cumsum([len(texts.ids) // seq_len for texts in self.texts])
        self.rows = int(self.row_ends[-1])
        if self.rows < batch_size:
            raise ValueError(
                f"the data gives {self.rows} rows of {seq_len} tokens, but a batch takes {batch_size}; "
                f"add text, or lower config.batch_size or config.data.seq_len"
            )
        self.tokenizer = tokenizer
        self.batch_size, self.seq_len, self.seed, self.shuffle = batch_size, seq_len, seed, shuffle
        self.mask_rate, self.document_mask = mask_rate, document_mask
        self.steps_per_epoch = self.rows // batch_size
        settings = (batch_size, seq_len, mask_rate, document_mask, seed)
        rest = (*(store.fingerprint for store in stores), *fingerprinted(shuffle))
        self.fingerprint = hashlib.sha256(repr(settings + rest).encode()).hexdigest()
        self._mask_id = tokenizer.special_id("mask")
        self._special_ids = tokenizer.special_ids

    def rows_of_step(self, step: int, shard: int = 0, shard_count: int = 1) -> np.ndarray:
        """Returns the row numbers of a shard of a step's batch, counted over all sources."""
        epoch, slot = divmod(step, self.steps_per_epoch)
        first, own = slot * self.batch_size, share(self.batch_size, shard, shard_count)
        return shuffled(range(first + own.start, first + own.stop), self.rows, self.seed, epoch, self.shuffle)

    def row_numbers(self, step: int) -> dict[str, list[int]]:
        numbers: dict[str, list[int]] = {}
        for row in self.rows_of_step(step).tolist():
            source, row_of_source = self._locate(row)
            numbers.setdefault(self.stores[source].name, []).append(row_of_source)
        return numbers

    def batch(self, step: int, shard: int = 0, shard_count: int = 1) -> Batch:
        epoch = step // self.steps_per_epoch
        rows = self.rows_of_step(step, shard, shard_count).tolist()
        masked = [self._masked_row(row, epoch) for row in rows]
        arrays = {name: np.stack([row[name] for row in masked]) for name in masked[0]}
        tokens = self.batch_size * self.seq_len
        # With a document mask there are fewer pairs; they are not counted exactly.
        return Batch(arrays, "text", tokens, tokens, token_pairs=tokens * self.seq_len)

    def _max_documents(self, seq_len: int) -> int:
        """Returns the maximum number of documents in a row, including one continued from the previous row."""
        ends = [np.searchsorted(x.offsets, np.arange(0, len(x.ids) + 1, seq_len)) for x in self.texts]
        return 1 + max(int(np.diff(end).max(initial=0)) for end in ends)

    def _locate(self, row: int) -> tuple[int, int]:
        """Returns (index of the source, row within the source) of a row counted over all sources."""
        source = int(np.searchsorted(self.row_ends, row, side="right"))
        return source, row - (int(self.row_ends[source - 1]) if source else 0)

    def _masked_row(self, row: int, epoch: int) -> dict[str, np.ndarray]:
        source, row_of_source = self._locate(row)
        start = row_of_source * self.seq_len
        ids_L = self.texts[source].ids[start : start + self.seq_len].astype(np.int32)
        rng = np.random.default_rng([self.seed, epoch, row])
        maskable = np.flatnonzero(~np.isin(ids_L, self._special_ids))
        chosen = np.sort(rng.permutation(maskable)[: round(self.mask_rate * len(maskable))])
        capacity = predictions_per_row(self.seq_len, self.mask_rate)
        # Unused slots take tokens that were not chosen, so that no position repeats.
        unused = np.setdiff1d(np.arange(self.seq_len), chosen, assume_unique=True)[: capacity - len(chosen)]
        position_P, target_P = np.concatenate([chosen, unused]).astype(np.int32), np.full(capacity, -1, np.int32)
        target_P[: len(chosen)] = ids_L[chosen]
        out = {"position": position_P, "target": target_P}
        if self.document_mask:
            offsets = self.texts[source].offsets
            first = int(np.searchsorted(offsets, start, side="right"))
            end = int(np.searchsorted(offsets, start + self.seq_len, side="left"))
            # A document without tokens has no number.
            starts = np.unique(np.asarray(offsets[first:end])) - start
            out["segment"] = 1 + np.searchsorted(starts, np.arange(self.seq_len), side="right").astype(np.int32)
        uniform = rng.random(len(chosen))
        replacement = np.where(uniform < 0.8, self._mask_id, rng.integers(0, self.tokenizer.vocab_size, len(chosen)))
        ids_L[chosen] = np.where(uniform < 0.9, replacement, ids_L[chosen])
        return out | {"ids": ids_L}


def predictions_per_row(seq_len: int, mask_rate: float) -> int:
    """Returns P, the slots for predictions in a row."""
    return max(1, round(mask_rate * seq_len))

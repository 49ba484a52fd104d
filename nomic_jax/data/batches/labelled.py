"""Batches of labelled texts, or pairs of texts, for finetuning a classifier."""

import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import tokenizers

from nomic_jax.data.batches.packing import Layout
from nomic_jax.data.batches.permutation import VERSION, fingerprinted, shuffled
from nomic_jax.data.batches.shapes import pad_right, padded_length
from nomic_jax.data.batches.stream import Batch, share
from nomic_jax.data.formats.reading import read_rows
from nomic_jax.data.formats.row_checks import BadRow, number_of
from nomic_jax.data.tokens.store import TokenStore
from nomic_jax.data.tokens.tokenizer import Tokenizer

ROWS_PER_CALL = 10_000
_LARGEST = float(np.finfo(np.float32).max)


class LabelledRows(TokenStore):
    """The rows of one task, in memory. GLUE's largest task has 25 million tokens.

    Attributes:
      ids: token ids of each row, cut to ``seq_len``: [CLS] text [SEP], or [CLS] first [SEP] second [SEP].
      first_length: int32, tokens of each row that have token type 0: all, or those up to the first [SEP] of a pair.
      labels: int32 in 0 ... num_labels - 1, or float32 where num_labels is 1.
    """

    def __init__(
        self, files: str, columns: Sequence[str], num_labels: int, tokenizer: Tokenizer, seq_len: int, name: str = ""
    ):
        """Reads the rows.

        Raises:
          BadRow: a column is missing or is not text, a label is not valid for the task, or there are no rows.
          FileNotFoundError: no file matches.
        """
        check = functools.partial(_check_label, num_labels=num_labels)
        kinds = dict.fromkeys(columns, str)
        rows = list(read_rows(files, kinds, others=("label",), allow_empty=True, further_check=check))
        if not rows:
            raise BadRow(f"{files}: no rows")
        self.ids, self.first_length = encode_rows(
            tokenizer, [[row[column] for column in columns] for row in rows], seq_len
        )
        kind = np.float32 if num_labels == 1 else np.int32
        self.labels = np.array([number_of(row["label"]) for row in rows], kind)
        self.name, self.rows = name or "labelled", len(rows)
        content = hashlib.sha256(repr((num_labels, seq_len, tokenizer.sha256)).encode())
        for ids in self.ids:
            content.update(len(ids).to_bytes(4, "little") + ids.tobytes())
        content.update(self.first_length.tobytes() + self.labels.tobytes())
        self.fingerprint = content.hexdigest()
        self.columns = {}
        self.manifest = {"source": {"query_prefix": "", "document_prefix": ""}, "tokenizer": tokenizer.sha256}


class LabelledStream:
    """All rows, in a new order every epoch; rows that do not fill a last batch are dropped.

    Arrays of a batch: ``ids`` [B, L], padded on the right to a length of a short menu; ``length`` [B]; ``first_length``
    [B], the tokens of token type 0; ``label`` [B].
    """

    layout: Layout | None = None

    def __init__(
        self,
        rows: LabelledRows,
        tokenizer: Tokenizer,
        *,
        batch_size: int,
        seq_len: int,
        seed: int = 0,
        shuffle: int = VERSION,
    ):
        if len(rows) < batch_size:
            raise ValueError(f"{rows.name} has {len(rows)} rows, fewer than config.batch_size {batch_size}")
        self.stores: Sequence[TokenStore] = [rows]
        self.labelled, self.rows = rows, len(rows)
        self.lengths = np.array([len(ids) for ids in rows.ids], np.int32)
        self.pad_id = tokenizer.special_id("pad")
        self.batch_size, self.seq_len, self.seed, self.shuffle = batch_size, seq_len, seed, shuffle
        self.steps_per_epoch = len(rows) // batch_size
        settings = (batch_size, seq_len, seed, rows.fingerprint, *fingerprinted(shuffle))
        self.fingerprint = hashlib.sha256(repr(settings).encode()).hexdigest()

    def rows_of_step(self, step: int) -> np.ndarray:
        """Returns the row numbers [batch_size] of a step."""
        epoch, slot = divmod(step, self.steps_per_epoch)
        first = slot * self.batch_size
        return shuffled(range(first, first + self.batch_size), self.rows, self.seed, epoch, self.shuffle)

    def row_numbers(self, step: int) -> dict[str, list[int]]:
        return {self.labelled.name: self.rows_of_step(step).tolist()}

    def batch(self, step: int, shard: int = 0, shard_count: int = 1) -> Batch:
        rows = self.rows_of_step(step)
        # The longest of all rows decides, so that every process gets the same shape.
        L = padded_length(int(self.lengths[rows].max()), self.seq_len)
        own = rows[share(self.batch_size, shard, shard_count)]
        arrays = {
            "ids": pad_right([self.labelled.ids[row] for row in own], L, self.pad_id),
            "length": self.lengths[own],
            "first_length": self.labelled.first_length[own],
            "label": self.labelled.labels[own],
        }
        lengths = self.lengths[rows].astype(np.int64)
        return Batch(arrays, self.labelled.name, int(lengths.sum()), self.batch_size * L, int((lengths**2).sum()))


def encode_rows(
    tokenizer: Tokenizer, rows: Sequence[Sequence[str]], max_length: int
) -> tuple[list[np.ndarray], np.ndarray]:
    """Returns the int32 ids of texts or pairs, and the number of tokens of each that have token type 0.

    They are truncated as in transformers: always from the longer text of a pair.
    """
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())  # truncation is a setting of the backend
    backend.enable_truncation(max_length, strategy="longest_first")
    inputs: Iterator[Any] = iter([row[0] if len(row) == 1 else tuple(row) for row in rows])
    ids: list[np.ndarray] = []
    first_length: list[int] = []
    while group := list(islice(inputs, ROWS_PER_CALL)):
        for encoding in backend.encode_batch_fast(group):
            ids.append(np.array(encoding.ids, np.int32))
            first_length.append(encoding.type_ids.count(0))
    return ids, np.array(first_length, np.int32)


def _check_label(row: Mapping[str, Any], where: str, num_labels: int) -> None:
    label = number_of(row.get("label"))
    if num_labels == 1:
        if not isinstance(label, int | float) or isinstance(label, bool) or not abs(label) <= _LARGEST:
            raise BadRow(f"{where}: the label is {label!r}; write a number")
    elif not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < num_labels:
        raise BadRow(
            f"{where}: the label is {label!r}; write 0 to {num_labels - 1} (rows without a label cannot be used)"
        )

"""Contrastive batches. Every batch holds queries and documents of one source, padded on the right or in chunks."""

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from nomic_jax.data.batches.mixing import Mixing, Sampling
from nomic_jax.data.batches.packing import (
    LENGTH_STEP,
    Layout,
    bucketed_layout,
    fill_chunks,
    number_compiled,
    packed_layout,
    plan_chunks,
    segments_for,
)
from nomic_jax.data.batches.permutation import VERSION, fingerprinted
from nomic_jax.data.batches.shapes import hash_texts, pad_flat, padded_length
from nomic_jax.data.batches.stream import Batch, share
from nomic_jax.data.batches.text_pairs import PairedTexts, around, dropout_seeds
from nomic_jax.data.source_loss import INFONCE, SourceLoss
from nomic_jax.data.tokens.store import RaggedTokens, TokenStore, check_tokenizer, flat_indices
from nomic_jax.data.tokens.tokenizer import Tokenizer

SCORES_LOOKED_AT = 1000  # rows of each source with a teacher's scores
LAYOUT_SAMPLE = 10_000  # rows of each source whose lengths determine the buckets
MARGIN = 5.0  # standard deviations: a larger batch comes once in 3 million steps
MAX_CHUNK_TOKENS = 16_384  # fills a GPU; larger chunks have coarser buckets, hence more padding
FILLED = 0.97  # share of the tokens of a packed row that are text, see benchmarks/results/padding.md


def make_layout(
    kind: str,
    stores: Sequence[TokenStore],
    *,
    query_length: int,
    document_length: int,
    documents_per_row: int,
    rows_per_device: int,
    chunk_tokens: int = 0,
    kept_chunks: float = 0.0,
    on_cpu: bool = False,
) -> Layout | None:
    """Returns the layout of a batch's texts; None for "padded", which pads all texts to the longest of the batch.

    Without ``chunk_tokens``, a chunk has an eighth of a device's tokens in an average batch, so that its last chunk
    leaves little room empty, and at most MAX_CHUNK_TOKENS. ``kept_chunks`` is that of ``embed_chunks``.

    With ``on_cpu``, packed rows are only as long as the longest text there is, because attention computes whole rows,
    and all batches have one number of chunks: a compilation takes as long as several steps, an empty chunk no time.
    """
    if kind == "padded":
        return None
    sources = sample_lengths(stores, query_length, document_length)
    lengths = np.concatenate([column for source in sources for column in (source.query, source.document)])
    tokens, most = tokens_per_device(sources, documents_per_row, rows_per_device)
    longest = max(query_length, document_length)
    if on_cpu and kind == "packed":
        longest = min(longest, -(-_longest_text(stores) // LENGTH_STEP) * LENGTH_STEP)
    layout = layout_for(kind, lengths, longest, tokens, chunk_tokens, kept_chunks)
    if on_cpu and layout is not None and layout.packed:
        count = most_chunks(most, layout.tokens, with_parts=len(layout.shapes) > 1)
        layout = dataclasses.replace(layout, least_chunks=count)
    return layout


def _longest_text(stores: Sequence[TokenStore]) -> int:
    columns = [column for store in stores for column in store.columns.values() if len(column)]
    return max(int(column.lengths(np.arange(len(column))).max()) for column in columns)


def most_chunks(tokens: float, size: int, *, with_parts: bool) -> int:
    """The number of packed chunks of ``size`` tokens that a program for so many tokens of text has.

    With parts of chunks (``nomic_jax.data.batches.packing.packed_layout``), up to three quarters take the place of the
    last one.
    """
    return number_compiled(math.ceil(tokens / FILLED / size) + 2 * with_parts)


class SourceLengths(NamedTuple):
    """Tokens of a sample of a source's texts, cut to the lengths of the run, and the number of its rows.

    Rows of one text count as queries, with a document of 0 tokens.
    """

    query: np.ndarray
    document: np.ndarray
    rows: int


def sample_lengths(stores: Sequence[TokenStore], query_length: int, document_length: int) -> list[SourceLengths]:
    def lengths(store: TokenStore, column: str, longest: int) -> np.ndarray:
        return np.minimum(store.columns[column].lengths(np.arange(min(len(store), LAYOUT_SAMPLE))), longest)

    def of_store(store: TokenStore) -> SourceLengths:
        if "text" in store.columns:
            return SourceLengths(lengths(store, "text", document_length), np.zeros(1, np.int64), len(store))
        query, document = lengths(store, "query", query_length), lengths(store, "document", document_length)
        return SourceLengths(query, document, len(store))

    return [of_store(store) for store in stores]


def tokens_per_device(
    sources: Sequence[SourceLengths], documents_per_row: int, rows_per_device: int
) -> tuple[float, float]:
    """Returns the tokens of a device's texts in a batch: in the mean, and in the largest batch that is to be expected.

    All rows of a batch are of one source. The largest batch is that of the source with the longest rows, with MARGIN
    standard deviations of a sum of rows. Both are estimates from a sample.
    """
    mean, most = 0.0, 0.0
    for query, document, rows in sources:
        of_row = float(query.mean() + documents_per_row * document.mean())
        deviation = float(np.sqrt(rows_per_device * (query.var() + documents_per_row * document.var())))
        limit = float(query.max() + documents_per_row * document.max())
        mean += rows / sum(source.rows for source in sources) * of_row
        most = max(most, min(of_row * rows_per_device + MARGIN * deviation, limit * rows_per_device))
    return mean * rows_per_device, most


def layout_for(
    kind: str,
    lengths: np.ndarray,
    longest: int,
    tokens_per_device: float,
    chunk_tokens: int = 0,
    kept_chunks: float = 0.0,
) -> Layout | None:
    """Returns the layout as ``make_layout`` does, for texts of the given lengths, none above ``longest``."""
    if kind == "padded":
        return None
    budget = max(chunk_tokens or min(int(tokens_per_device / 8), MAX_CHUNK_TOKENS), longest)
    if kind == "packed":
        # A chunk that is kept is computed in the largest shape.
        parts = (1,) if kept_chunks == 1 else (1, 4)
        return packed_layout(longest, budget, segments=segments_for(lengths, longest), parts=parts)
    return bucketed_layout(lengths, longest, budget, parts=(1, 4))


class PairStream:
    """Pairs, or triplets if ``num_negatives`` is given; ``sampling`` decides how often a source is visited.

    By default every source gives its full batches (rows // batch_size) in an epoch, all in one shuffled order. Rows are
    shuffled within their source. The negatives of a row are sampled anew at every visit.

    Without a layout, a batch has the arrays (b rows, M negatives, Lq and Ld from a short menu of lengths):
      query_ids [b, Lq], query_length [b], document_ids [b, 1 + M, Ld], document_length [b, 1 + M]: document 0 of each
      row is the positive. query_hash [b, 2] and document_hash [b, 1 + M, 2], uint32: equal where the token ids that the
      model sees are equal. in_batch_negatives [b]: false for the sources in ``own_candidates_only``, whose queries are
      compared only with their own row.
    A source in ``losses`` whose loss compares with numbers has them in an array with the name of the loss: [b], or
      [b, 1 + M] for those of a teacher, or [b, texts, T] for a teacher's vectors, T = 0 if the guide computes them. Its
      other options are in ``temperature`` and ``infonce_weight``, [b] each.
    Rows of texts with the losses "spans" and "simcse" become pairs (``nomic_jax.data.batches.text_pairs``); for the
      latter, the seeds of dropout are in ``dropout``, one of each chunk, or of each row of the global batch.
    Rows of a source without negatives have M = 0. Rows of one text are queries, of ``document_length``, without
    documents.
    With a layout, the texts are in chunks (``nomic_jax.data.batches.packing.fill_chunks``), and the rows of query_hash,
      document_hash and in_batch_negatives are in the order of the plan, device by device.
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
        own_candidates_only: frozenset[str] = frozenset(),
        losses: Mapping[str, SourceLoss] | None = None,
        sampling: Sampling | None = None,
        layout: Layout | None = None,
        devices: int = 1,
        seed: int = 0,
        shuffle: int = VERSION,
    ):
        sampling = sampling or Sampling()
        self.stores: Sequence[TokenStore] = list(stores)
        check_tokenizer(self.stores, tokenizer)
        self.batch_size, self.seed, self.num_negatives = batch_size, seed, num_negatives
        self.query_length, self.document_length = query_length, document_length
        self.pad_id = tokenizer.special_id("pad")
        self.losses = {name: loss for name, loss in (losses or {}).items() if loss != INFONCE}
        for store in self.stores:
            # Documents of other rows have no score.
            by_teacher = self._loss_of(store).numbers == "scores"
            if num_negatives and "negatives" in store.columns and (too_few_negatives == "error" or by_teacher):
                _check_negatives(store, num_negatives, may_fill_up=not by_teacher)
            if by_teacher and store.scores is not None:
                starts = np.arange(min(len(store), SCORES_LOOKED_AT) + 1)
                starts = (starts + store.negative_rows[: len(starts)]).tolist()
                own = [np.array(store.scores[first:last]) for first, last in itertools.pairwise(starts)]
                self._loss_of(store).warn_of_scale(store.name, own)
        self._around = {
            store.name: (around(tokenizer, source["query_prefix"]), around(tokenizer, source["document_prefix"]))
            for store in self.stores
            if self._loss_of(store).name == "spans" and (source := store.manifest["source"])
        }
        self.shuffle = shuffle
        self.mixing = Mixing(self.stores, batch_size, seed, sampling, shuffle)
        self.steps_per_epoch = self.mixing.steps_per_epoch
        self.rows = sum(len(store) for store in self.stores)
        self.own_candidates_only = own_candidates_only
        self.layout, self.devices = layout, devices
        apart = (*sorted(own_candidates_only), *sorted(map(repr, self.losses.items())))
        settings = (batch_size, query_length, document_length, num_negatives, too_few_negatives, seed, sampling, *apart)
        rest = (*(store.fingerprint for store in self.stores), *fingerprinted(shuffle))
        self.fingerprint = hashlib.sha256(repr(settings + rest).encode()).hexdigest()

    def rows_of_step(self, step: int) -> tuple[int, np.ndarray]:
        """Returns (index of the source, its row numbers [batch_size]) of a step."""
        return self.mixing.rows_of_step(step)

    def row_numbers(self, step: int) -> dict[str, list[int]]:
        source, rows = self.rows_of_step(step)
        return {self.stores[source].name: rows.tolist()}

    def batch(self, step: int, shard: int = 0, shard_count: int = 1) -> Batch:
        source, rows = self.rows_of_step(step)
        store = self.stores[source]
        is_twice = self._loss_of(store).name == "simcse"
        if store.name in self._around or is_twice:
            store = PairedTexts(store, self._around.get(store.name), self.seed, step)
        # For all rows, not only this process's, so that every process gets the same shapes.
        candidates = self._candidates(store, rows, step)
        of_query, longest = self._queries(store, as_document=is_twice)
        query_lengths = np.minimum(of_query.lengths(rows), longest)
        document_lengths = np.minimum(_candidate_lengths(store, candidates), self.document_length)
        real_tokens = int(query_lengths.sum() + document_lengths.sum())
        token_pairs = int((query_lengths.astype(np.int64) ** 2).sum() + (document_lengths.astype(np.int64) ** 2).sum())
        plan, own_devices = None, slice(0, 1)
        own = np.arange(self.batch_size)[share(self.batch_size, shard, shard_count)]
        if self.layout is not None:
            plan = plan_chunks(query_lengths, document_lengths, self.layout, self.devices)
            own_devices = share(self.devices, shard, shard_count)
            own = plan.rows[own_devices].ravel()  # device by device
        queries, query_length = of_query.gather(rows[own], longest)
        documents, document_length = _gather_candidates(store, candidates[own].ravel(), self.document_length)
        arrays = {
            "query_hash": hash_texts(queries, query_length),
            "document_hash": hash_texts(documents, document_length).reshape(own.size, candidates.shape[1], 2),
            "in_batch_negatives": np.full(own.size, store.name not in self.own_candidates_only),
            **self._targets(store, rows[own], candidates[own]),
        }
        if self.layout is not None and plan is not None:
            lengths = plan.length[own_devices]
            starts = (np.cumsum(lengths) - lengths.ravel()).reshape(lengths.shape)
            ids = np.empty(int(lengths.sum()), np.int32)
            b = plan.rows.shape[1]  # a device's queries come before its documents
            ids[flat_indices(starts[:, :b].ravel(), query_length)] = queries
            ids[flat_indices(starts[:, b:].ravel(), document_length)] = documents
            arrays |= fill_chunks(plan, self.layout, own_devices, ids, lengths.ravel(), self.pad_id)
            if is_twice:
                chunks = plan.shape.shape[1]
                places = range(own_devices.start * chunks, own_devices.stop * chunks)
                arrays["dropout"] = dropout_seeds(self.seed, step, places)
            return Batch(arrays, store.name, real_tokens, plan.waited_tokens, token_pairs)
        Lq = padded_length(int(query_lengths.max()), longest)
        Ld = padded_length(int(document_lengths.max(initial=1)), self.document_length)
        shape = (own.size, candidates.shape[1])
        if is_twice:
            arrays["dropout"] = dropout_seeds(self.seed, step, range(own[0], own[-1] + 1))
        arrays |= {
            "query_ids": pad_flat(queries, query_length, Lq, self.pad_id),
            "query_length": query_length.astype(np.int32),
            "document_ids": pad_flat(documents, document_length, Ld, self.pad_id).reshape(*shape, Ld),
            "document_length": document_length.astype(np.int32).reshape(shape),
        }
        padded_tokens = self.batch_size * Lq + candidates.size * Ld
        return Batch(arrays, store.name, real_tokens, padded_tokens, token_pairs)

    def _queries(self, store: TokenStore, as_document: bool) -> tuple[RaggedTokens, int]:
        """Returns the first texts of the rows, and their maximum number of tokens."""
        if "text" in store.columns:
            return store.columns["text"], self.document_length
        return store.columns["query"], self.document_length if as_document else self.query_length

    def _loss_of(self, store: TokenStore) -> SourceLoss:
        return self.losses.get(store.name, INFONCE)

    def _targets(self, store: TokenStore, rows: np.ndarray, candidates: np.ndarray) -> dict[str, np.ndarray]:
        """Returns what the loss of the source takes besides embeddings; {} for InfoNCE with the settings of the run."""
        loss = self._loss_of(store)
        options = {"temperature": loss.temperature, "infonce_weight": loss.infonce_weight}
        arrays = {name: np.full(rows.size, value, np.float32) for name, value in options.items() if value}
        if loss.numbers == "vectors":
            nothing = np.zeros((rows.size, 1 + candidates.shape[1], 0), np.float32)
            return arrays | {loss.name: nothing if store.vectors is None else np.array(store.vectors[rows])}
        if loss.numbers == "none" or store.scores is None:
            return arrays
        if loss.numbers == "scores":
            # The scores of row r begin after those of r documents and of the negatives of earlier rows.
            negative = rows[:, None] + 1 + candidates - len(store)
            rows = np.where(candidates < len(store), candidates + store.negative_rows[rows][:, None], negative)
        return arrays | {loss.name: loss.scaled(store.scores[rows].astype(np.float32)).astype(np.float32)}

    def _candidates(self, store: TokenStore, rows: np.ndarray, step: int) -> np.ndarray:
        """Returns each query's candidates, [B, 1 + M]: r < rows is document r, rows + n is text n of the negatives."""
        if "text" in store.columns:
            return np.zeros((len(rows), 0), np.int64)
        if not self.num_negatives or "negatives" not in store.columns:
            return rows[:, None]
        return np.stack([self._candidates_of_row(store, row, step) for row in rows.tolist()])

    def _candidates_of_row(self, store: TokenStore, row: int, step: int) -> np.ndarray:
        rng = np.random.default_rng([self.seed, step, row])
        mined = np.arange(store.negative_rows[row], store.negative_rows[row + 1])
        sampled = len(store) + rng.permutation(mined)[: self.num_negatives]
        # If a filler is the row's own positive, the loss masks it like any duplicate of the positive.
        fillers = rng.integers(0, len(store), self.num_negatives - len(sampled))
        return np.concatenate([[row], sampled, fillers])


def _candidate_lengths(store: TokenStore, candidates: np.ndarray) -> np.ndarray:
    if not candidates.size:
        return np.zeros(candidates.shape, np.int64)
    lengths = store.columns["document"].lengths(np.minimum(candidates, len(store) - 1))
    if (candidates >= len(store)).any():
        of_negatives = store.columns["negatives"].lengths(np.maximum(candidates - len(store), 0))
        lengths = np.where(candidates < len(store), lengths, of_negatives)
    return lengths


def _gather_candidates(store: TokenStore, candidates: np.ndarray, max_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (concatenated ids, lengths) of candidates [N], documents and negatives mixed."""
    if not candidates.size:
        return np.zeros(0, np.int32), np.zeros(0, np.int64)
    is_document = candidates < len(store)
    if is_document.all():
        return store.columns["document"].gather(candidates, max_length)
    parts = {
        "document": (is_document, candidates[is_document]),
        "negatives": (~is_document, candidates[~is_document] - len(store)),
    }
    gathered = {column: store.columns[column].gather(texts, max_length) for column, (_, texts) in parts.items()}
    lengths = np.empty(len(candidates), np.int64)
    for column, (where, _) in parts.items():
        lengths[where] = gathered[column][1]
    ids = np.empty(int(lengths.sum()), np.int32)
    starts = np.cumsum(lengths) - lengths
    for column, (where, _) in parts.items():
        ids[flat_indices(starts[where], lengths[where])] = gathered[column][0]
    return ids, lengths


def _check_negatives(store: TokenStore, needed: int, *, may_fill_up: bool) -> None:
    counts = np.diff(store.negative_rows)
    short = np.flatnonzero(counts < needed)
    if len(short):
        filling_up = 'set config.data.too_few_negatives="random" to fill up with other rows\' documents'
        others = filling_up if may_fill_up else "leave these rows out: other rows' documents have no score"
        raise ValueError(
            f"source {store.name!r}: {len(short)} of {len(store)} rows have fewer than {needed} negatives, first row "
            f"{short[0]} with {counts[short[0]]}; mine more, lower config.data.num_negatives, or {others}"
        )

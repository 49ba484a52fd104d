"""The outline of a run's batches: the shapes that its stream would make, from the lengths of texts alone."""

from typing import NamedTuple

import numpy as np

from nomic_jax.data.batches.mlm import predictions_per_row
from nomic_jax.data.batches.packing import Layout, fill_chunks, plan_chunks
from nomic_jax.data.batches.pairs import layout_for
from nomic_jax.data.batches.shapes import Shape, padded_length
from nomic_jax.data.batches.stream import Batch
from nomic_jax.train.config import LabelledData, MlmData, PairData, TrainConfig
from nomic_jax.train.objectives.chunks import KEPT_CHUNKS, RECOMPUTED_CHUNKS
from nomic_jax.train.planning.kernels import Loops
from nomic_jax.train.planning.lengths import Lengths


class Outline(NamedTuple):
    """Attributes:
    batch: a global batch. Only shapes and types of its arrays, and its counts, mean something.
    layout: of its chunks, as of ``Stream.layout``.
    chunks: [devices, chunks], the shape of each chunk; ``len(layout.shapes)`` for empty ones; None without chunks.
    """

    batch: Batch
    layout: Layout | None
    chunks: np.ndarray | None

    def loops(self, config: TrainConfig) -> Loops:
        """What the compiled program does not say. The device with the most tokens counts: the others wait for it."""
        batch = self.batch
        if self.layout is None or self.chunks is None:
            return Loops(pairs_per_token=batch.token_pairs / batch.padded_tokens)
        tokens = np.array([shape.rows * shape.length for shape in self.layout.shapes] + [0])[self.chunks]
        busiest = self.chunks[np.argmax(tokens.sum(axis=1))]
        with_text = busiest[busiest < len(self.layout.shapes)]
        kept = min(round(config.kept_chunks * len(busiest)), len(with_text))
        recomputed = with_text[kept:]
        counts = np.bincount(recomputed, minlength=len(self.layout.shapes))
        # A kept chunk is computed in the largest shape.
        computed = kept * self.layout.tokens + tokens[np.argmax(tokens.sum(axis=1))][kept:].sum()
        return Loops(
            {KEPT_CHUNKS: kept, RECOMPUTED_CHUNKS: len(recomputed)},
            tuple(counts / max(len(recomputed), 1)) if len(counts) > 1 else (),
            batch.token_pairs / len(self.chunks) / computed,
        )


def outline(config: TrainConfig, lengths: Lengths, devices: int) -> Outline:
    """The outline of a batch of texts of these lengths, which are drawn with repetition if they are too few."""
    data = config.data
    if isinstance(data, MlmData):
        return _masked_rows(config, data, lengths)
    if isinstance(data, LabelledData):
        return _labelled(config, data, lengths)
    return _pairs(config, data, lengths, devices)


def _masked_rows(config: TrainConfig, data: MlmData, lengths: Lengths) -> Outline:
    B, L, P = config.batch_size, data.seq_len, predictions_per_row(data.seq_len, data.mask_rate)
    arrays = {"ids": _array(B, L), "position": _array(B, P), "target": _array(B, P)}
    layout, pairs = None, B * L * L
    if data.document_mask:
        arrays["segment"] = _array(B, L)
        ends = np.cumsum(lengths.document[:, 0])
        cut = np.searchsorted(ends, np.arange(0, ends[-1] + 1, L))
        layout = Layout((Shape(1, L),), 1 + int(np.diff(cut).max(initial=0)))
        # Each document in its parts, as if it began a row.
        whole, rest = np.divmod(lengths.document[:, 0], L)
        pairs = int(B * L * float(np.sum(whole * L**2 + rest**2)) / float(ends[-1]))
    return Outline(Batch(arrays, "text", B * L, B * L, pairs), layout, None)


def _labelled(config: TrainConfig, data: LabelledData, lengths: Lengths) -> Outline:
    B = config.batch_size
    texts = np.minimum(_drawn(lengths, B)[1][:, 0], data.seq_len)
    L = padded_length(int(texts.max()), data.seq_len)
    label = np.float32 if data.num_labels == 1 else np.int32
    arrays = {"ids": _array(B, L), "length": _array(B), "first_length": _array(B), "label": _array(B, dtype=label)}
    return Outline(Batch(arrays, lengths.name, int(texts.sum()), B * L, int((texts**2).sum())), None, None)


def _pairs(config: TrainConfig, data: PairData, lengths: Lengths, devices: int) -> Outline:
    query, document = _drawn(lengths, config.batch_size)
    query, document = np.minimum(query, data.query_length), np.minimum(document, data.document_length)
    B, C = document.shape
    arrays = {
        "query_hash": _array(B, 2, dtype=np.uint32),
        "document_hash": _array(B, C, 2, dtype=np.uint32),
        "in_batch_negatives": _array(B, dtype=np.bool_),
    }
    texts = np.concatenate([query, document.ravel()])
    real, pairs = int(texts.sum()), int((texts**2).sum())
    layout = layout_for(
        data.layout,
        texts,
        max(data.query_length, data.document_length),
        real / devices,
        data.chunk_tokens,
        config.kept_chunks,
    )
    if layout is None:
        Lq = padded_length(int(query.max()), data.query_length)
        Ld = padded_length(int(document.max()), data.document_length)
        arrays |= {"query_ids": _array(B, Lq), "query_length": _array(B)}
        arrays |= {"document_ids": _array(B, C, Ld), "document_length": _array(B, C)}
        return Outline(Batch(arrays, lengths.name, real, B * (Lq + C * Ld), pairs), None, None)
    plan = plan_chunks(query, document, layout, devices)
    arrays |= fill_chunks(plan, layout, slice(0, devices), np.zeros(real, np.int32), plan.length.ravel(), pad_id=0)
    return Outline(Batch(arrays, lengths.name, real, plan.waited_tokens, pairs), layout, plan.shape)


def _drawn(lengths: Lengths, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Queries and documents of ``count`` rows."""
    rng = np.random.default_rng(0)
    rows = np.arange(count) if len(lengths.document) == count else rng.integers(0, len(lengths.document), count)
    return lengths.query[rows] if len(lengths.query) else lengths.query, lengths.document[rows]


def _array(*shape: int, dtype: type = np.int32) -> np.ndarray:
    """An array that takes no memory."""
    return np.broadcast_to(np.zeros((), dtype), shape)

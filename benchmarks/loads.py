"""The batches that benchmarks run on: made-up tokens that are distributed as in text. Needs only numpy.

The frequencies of the ids follow Zipf's law, texts are "[CLS] words [SEP]" with the lengths of real pairs, and 30 % of
a masked-LM row are [MASK]. Speed depends on it: the gradient of a word's embedding is a sum over its occurrences.
"""

import dataclasses

import numpy as np

from nomic_jax.data.batches.packing import Layout, fill_chunks, plan_chunks
from nomic_jax.data.batches.pairs import layout_for
from nomic_jax.data.batches.stream import Batch
from nomic_jax.data.batches.typical_lengths import DOCUMENT_TOKENS, LONGEST, QUANTILES, QUERY_TOKENS, scaled

VOCABULARY = (1000, 30_000)  # range of the ids of words, the commonest first
CLS_ID, SEP_ID, MASK_ID = 101, 102, 103
MASK_RATE = 0.3


def pair_lengths(rng: np.random.Generator, count: int, tokens_per_pair: float) -> tuple[np.ndarray, np.ndarray]:
    """Lengths in tokens of queries [count] and documents [count]; their mean sum is ``tokens_per_pair`` to 0.1 %.

    Queries have the measured lengths; those of documents are scaled and cut at 2048 tokens.
    """
    query = np.round(np.interp(rng.random(count), QUANTILES, QUERY_TOKENS)).astype(np.int64)
    document_mean = tokens_per_pair - float(query.mean())
    return query, scaled(rng, count, DOCUMENT_TOKENS, document_mean, LONGEST)


def zipf_ids(rng: np.random.Generator, count: int) -> np.ndarray:
    """``count`` ids of words, int32: the word of rank r is 1 / r times as frequent as the commonest, which is 9 %."""
    first, end = VOCABULARY
    cumulative = np.cumsum(1.0 / np.arange(1, end - first + 1))
    return (first + np.searchsorted(cumulative, cumulative[-1] * rng.random(count), side="right")).astype(np.int32)


def text_ids(rng: np.random.Generator, lengths: np.ndarray) -> list[np.ndarray]:
    """The ids of texts of these numbers of tokens, each at least 2: [CLS], words by Zipf's law, [SEP]."""
    ends = np.cumsum(lengths)
    ids = zipf_ids(rng, ends[-1])
    ids[ends - lengths], ids[ends - 1] = CLS_ID, SEP_ID
    return np.split(ids, ends[:-1])


@dataclasses.dataclass(frozen=True)
class Load:
    """A batch of a stage.

    Attributes:
      arrays: the arguments of the stage's loss.
      real_tokens: tokens of all texts.
      padded_tokens: tokens that are computed, padding included.
      token_pairs: sum of the squared lengths of the texts.
      layout: layout of the chunks of pairs; None for padded pairs and for masked-LM.
      queries, documents: token ids of each text.
    """

    stage: str
    rows: int
    arrays: dict[str, np.ndarray]
    real_tokens: int
    padded_tokens: int
    token_pairs: int
    layout: Layout | None = None
    queries: tuple[np.ndarray, ...] = ()
    documents: tuple[np.ndarray, ...] = ()

    @property
    def batch(self) -> Batch:
        return Batch(self.arrays, self.stage, self.real_tokens, self.padded_tokens, self.token_pairs)


def mlm_load(rows: int, length: int) -> Load:
    """Rows of ``length`` tokens, cut from consecutive texts; 30 % of each, all words, are [MASK] and predicted."""
    rng = np.random.default_rng(0)
    tokens = rows * length
    lengths = np.interp(rng.random(1 + tokens // DOCUMENT_TOKENS[0]), QUANTILES, DOCUMENT_TOKENS).astype(np.int64)
    texts = text_ids(rng, lengths[: 1 + np.searchsorted(np.cumsum(lengths), tokens)])
    ids = np.concatenate(texts)[:tokens].reshape(rows, length)
    is_word = ids >= VOCABULARY[0]
    position = np.stack([rng.permutation(np.flatnonzero(row))[: round(MASK_RATE * length)] for row in is_word])
    position = np.sort(position, axis=1).astype(np.int32)
    target = np.take_along_axis(ids, position, 1)
    np.put_along_axis(ids, position, MASK_ID, 1)
    arrays = {"ids": ids, "position": position, "target": target}
    return Load("mlm", rows, arrays, ids.size, ids.size, rows * length**2)


def pair_load(
    stage: str,
    query_length: np.ndarray,
    document_length: np.ndarray,
    *,
    layout: str,
    longest: int,
    chunk_tokens: int = 0,
    devices: int = 1,
) -> Load:
    """Pairs or triplets, arranged in a batch as in training.

    Args:
      query_length, document_length: tokens, [b] and [b, C], the positive first.
      layout, chunk_tokens: see ``nomic_jax.train.config.PairData``.
      longest: both of its lengths, query_length and document_length.
      devices: the number of devices that share the batch; the rows of ``arrays`` are in the order of the plan.
    """
    rng = np.random.default_rng(0)
    b, C = document_length.shape
    query_length, document_length = np.minimum(query_length, longest), np.minimum(document_length, longest)
    lengths = np.concatenate([query_length, document_length.ravel()])
    texts = text_ids(rng, lengths)
    hashes = rng.integers(0, 1 << 32, (b * (1 + C), 2), dtype=np.uint32)
    arrays = {
        "query_hash": hashes[:b],
        "document_hash": hashes[b:].reshape(b, C, 2),
        "in_batch_negatives": np.ones(b, bool),
    }
    shape_of_chunks = layout_for(layout, lengths, longest, lengths.sum() / devices, chunk_tokens)
    if shape_of_chunks is None:
        arrays |= {
            "query_ids": padded(texts[:b]),
            "query_length": query_length.astype(np.int32),
            "document_ids": padded(texts[b:]).reshape(b, C, -1),
            "document_length": document_length.astype(np.int32),
        }
        padded_tokens = arrays["query_ids"].size + arrays["document_ids"].size
    else:
        plan = plan_chunks(query_length, document_length, shape_of_chunks, devices)
        in_order = [text for rows in plan.rows for text in _texts_of(rows, texts, b, C)]
        ids = np.concatenate(in_order)
        arrays |= fill_chunks(plan, shape_of_chunks, slice(0, devices), ids, plan.length.ravel(), pad_id=0)
        padded_tokens = plan.waited_tokens
    return Load(
        stage,
        b,
        arrays,
        int(lengths.sum()),
        padded_tokens,
        int((lengths**2).sum()),
        shape_of_chunks,
        tuple(texts[:b]),
        tuple(texts[b:]),
    )


def _texts_of(rows: np.ndarray, texts: list[np.ndarray], b: int, C: int) -> list[np.ndarray]:
    """The texts of one device: the queries of its rows, then their documents."""
    return [texts[row] for row in rows] + [texts[b + row * C + i] for row in rows for i in range(C)]


def padded(texts: list[np.ndarray] | tuple[np.ndarray, ...]) -> np.ndarray:
    ids = np.zeros((len(texts), max(map(len, texts))), np.int32)
    for row, text in zip(ids, texts):
        row[: len(text)] = text
    return ids

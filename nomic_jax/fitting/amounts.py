"""How much to train on a user's own pairs, by their number, their lengths, the model and the device.

The values depend on nothing else, so that the same command trains the same model on the same kind of device.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax

from nomic_jax.fitting.rows import DataError
from nomic_jax.inference.embedder import Embedder

MINUTES = 5.0
# FLOP/s of training that a minute is reckoned with: about what MiniLM reaches on 2 cores, and an H100 in bfloat16.
RATES = {"cpu": 7e10}
RATE_OF_OTHERS = 1e14
LEAST_PAIRS, LEAST_DOCUMENTS = 20, 10  # in all; below, the pairs of a batch have hardly other documents to learn from
LEAST_TRAINED = 500  # pairs that a large model on a small machine sees, however long it takes
MOST_EPOCHS = 3.0
LEAST_STEPS = 15
MOST_QUERIES = 300  # held out by default: the interval of nDCG@10 is then about .03 wide on either side
LENGTHS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512)  # tokens
COVERED = 0.95  # share of the texts that a length holds whole


class Amounts(NamedTuple):
    """Settings of a run. ``seconds`` is what its steps take by RATES."""

    pairs: int
    epochs: float
    batch_size: int
    lr: float
    query_length: int
    document_length: int
    seconds: float


def held_out_queries(pairs: int) -> int:
    """A tenth, at least 20 of them, at most MOST_QUERIES and a quarter of the pairs."""
    return min(max(pairs // 10, 20), MOST_QUERIES, pairs // 4)


def check_enough(files: str, columns: Sequence[str], pairs: int, queries: int, documents: int) -> None:
    """Raises DataError if there is too little to train on, and says of what."""
    if pairs < LEAST_PAIRS:
        raise DataError(
            f"{files}: has {pairs} different pairs with a text in {columns[0]!r} and {columns[1]!r}; at least "
            f"{LEAST_PAIRS} are needed, and a few hundred to change a model: a query learns from the documents of "
            f"other pairs, and a part is held out to see the effect"
        )
    for column, count, side in zip(columns, (queries, documents), ("query", "document")):
        if count < LEAST_DOCUMENTS:
            raise DataError(
                f"{files}: column {column!r}, the {side}, has only {count} different texts in {pairs:,} pairs; at "
                f"least {LEAST_DOCUMENTS} are needed, because each {side} is told apart from those of other pairs. "
                f"Name another column with --columns, or, for a few classes, train a classifier: nomic-jax train "
                f"--config=glue"
            )


def lengths_of(embedder: Embedder, texts: Sequence[str], prefix: str) -> tuple[int, float]:
    """Returns the tokens that hold COVERED of the texts, and their mean when they are cut there."""
    tokens = sorted(len(ids) for ids in embedder.tokenizer.encode([prefix + text for text in texts]))
    needed = tokens[min(len(tokens) - 1, math.ceil(COVERED * len(tokens)))]
    length = min(next((length for length in LENGTHS if length >= needed), LENGTHS[-1]), embedder.max_length)
    return length, sum(min(count, length) for count in tokens) / len(tokens)


def most_pairs(flops_per_pair: float, minutes: float, epochs: float | None) -> int:
    """Returns how many pairs can be trained on in that time."""
    return max(LEAST_TRAINED, int(minutes * 60 * _rate() / flops_per_pair / (epochs or 1.0)))


def amounts_for(
    pairs: int,
    lengths: tuple[int, int],
    flops_per_pair: float,
    *,
    minutes: float,
    epochs: float | None,
    batch_size: int | None,
    lr: float | None,
) -> Amounts:
    """Returns the settings for this number of training pairs; those that are given count."""
    seen = minutes * 60 * _rate() / flops_per_pair
    epochs = epochs or min(MOST_EPOCHS, max(1.0, seen // pairs))
    # The other documents of a batch are the negatives, so it is as large as leaves some steps to warm up and decay.
    size = batch_size or next((size for size in (64, 32, 16) if pairs * epochs / size >= LEAST_STEPS), 8)
    seconds = epochs * pairs * flops_per_pair / _rate()
    return Amounts(pairs, float(epochs), min(size, pairs), lr or 2e-5, *lengths, seconds)


def flops_per_pair(embedder: Embedder, query_tokens: float, document_tokens: float) -> float:
    """Returns the FLOPs of training on a pair: the forward pass, and twice as many for the backward pass."""
    encoder = embedder.config.encoder
    forward = sum(each * encoder.forward_flops_per_token(int(each)) for each in (query_tokens, document_tokens))
    return 3 * forward


def _rate() -> float:
    return RATES.get(jax.default_backend(), RATE_OF_OTHERS)

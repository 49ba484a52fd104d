"""Texts without pairs as pairs of a query and its document.

spans   two spans of the text, drawn anew at every visit: independent cropping (arXiv:2112.09118). Each has a share of
        the text's tokens, uniform in SHARES, and begins anywhere; the two may overlap
simcse  the text twice; dropout makes the embeddings differ (arXiv:2104.08821)
"""

from typing import NamedTuple

import numpy as np

from nomic_jax.data.batches.shapes import mix_bits
from nomic_jax.data.prompts import prompt_text
from nomic_jax.data.tokens.store import RaggedTokens, TokenStore, flat_indices
from nomic_jax.data.tokens.tokenizer import Tokenizer

SHARES = (0.05, 0.5)
SHORTEST = 8  # tokens of a span, or all of a shorter text


class Around(NamedTuple):
    """Ids around a span: special tokens and prefix before it, special tokens after it.

    Attributes:
      skipped: the numbers of special tokens at the beginning and at the end of a text.
    """

    before: np.ndarray
    after: np.ndarray
    skipped: tuple[int, int]


def around(tokenizer: Tokenizer, prefix: str) -> Around:
    """The ids around the spans of a source whose texts were tokenised without a prefix."""
    plain, prompt = tokenizer.encode(["", prompt_text(prefix)], spelled_as_text=True)
    after = tokenizer.suffix
    return Around(prompt[: len(prompt) - after], plain[len(plain) - after :], (len(plain) - after, after))


class DrawnSpans:
    """One span of each text. Row r is that of text r; lengths and tokens are as those of ``RaggedTokens``."""

    def __init__(self, texts: RaggedTokens, around: Around, key: tuple[int, int, int]):
        """Args:
        texts: tokens of whole texts, without a prefix.
        key: seed, step and number of the span, which decide what is drawn.
        """
        self.texts, self.around, self.key = texts, around, key

    def __len__(self) -> int:
        return len(self.texts)

    def _drawn(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns (first token among the ids of all texts, number of tokens) of each span."""
        first, last = self.around.skipped
        inner = np.maximum(self.texts.lengths(rows) - first - last, 0)
        share, place = (self._uniform(rows, draw) for draw in (0, 1))
        wanted = np.round((SHARES[0] + share * (SHARES[1] - SHARES[0])) * inner).astype(np.int64)
        length = np.minimum(np.maximum(wanted, SHORTEST), inner)
        offset = (place * (inner - length + 1)).astype(np.int64)
        return np.asarray(self.texts.offsets[rows]) + first + offset, length

    def _uniform(self, rows: np.ndarray, draw: int) -> np.ndarray:
        """Returns numbers in [0, 1), a function of the key, the row and ``draw``."""
        bits = np.zeros(len(rows), np.uint64)
        for value in (*self.key, draw, rows):
            bits = mix_bits(bits ^ np.asarray(value).astype(np.uint64))
        return (bits >> np.uint64(11)) * 2.0**-53

    def lengths(self, rows: np.ndarray) -> np.ndarray:
        _, length = self._drawn(rows.ravel())
        return (length + len(self.around.before) + len(self.around.after)).reshape(rows.shape)

    def gather(self, rows: np.ndarray, max_length: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns (int32 ids of the spans with what is around them, concatenated; length of each). Spans are cut."""
        start, length = self._drawn(rows)
        before, after = self.around.before, self.around.after
        length = np.minimum(length, max(max_length - len(before) - len(after), 0))
        inner = np.asarray(self.texts.ids)[flat_indices(start, length)].astype(np.int32)
        ends = np.cumsum(length)
        parts = [part for begin, end in zip(ends - length, ends) for part in (before, inner[begin:end], after)]
        return np.concatenate(parts).astype(np.int32), length + len(before) + len(after)


class PairedTexts(TokenStore):
    """A store of texts as one of pairs."""

    def __init__(self, store: TokenStore, around: tuple[Around, Around] | None, seed: int, step: int):
        """Args:
        store: of texts.
        around: what is around the two spans of each text; None for each text twice.
        seed, step: decide which spans are drawn.
        """
        self.name, self.rows, self.scores, self.vectors = store.name, store.rows, None, None
        texts = store.columns["text"]
        self.columns = {"query": texts, "document": texts}
        if around is not None:
            spans = (DrawnSpans(texts, ids, (seed, step, number)) for number, ids in enumerate(around))
            self.columns = dict(zip(self.columns, spans))  # type: ignore[arg-type]


def dropout_seeds(seed: int, step: int, places: range) -> np.ndarray:
    """Returns uint32 seeds of the dropout at some places of a step: chunks, or rows."""
    bits = np.zeros(len(places), np.uint64)
    for value in (seed, step, np.arange(places.start, places.stop)):
        bits = mix_bits(bits ^ np.asarray(value).astype(np.uint64))
    return bits.astype(np.uint32)

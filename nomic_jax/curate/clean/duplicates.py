"""Near-duplicates: MinHash signatures and locality-sensitive hashing by rensa, each find checked by exact Jaccard."""

import math
from array import array
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from nomic_jax.curate.clean.words import word_ngrams, words_of

SHINGLE = 3  # words: one changed word in 30 still leaves a similarity of 0.8
CERTAINTY = 0.99  # with which a pair at the threshold is found
MOST_PERMUTATIONS = 128


class NearDuplicates:
    """Texts kept so far, to be asked for one that is nearly the same.

    Similarity is the Jaccard index of the sets of SHINGLE-word runs. Memory holds about 2 KB for each text (for a
    threshold of 0.8); the texts themselves are in ``file``, which is removed at the end.

    Args:
      threshold: the similarity from which on a text is a near-duplicate, above 0 and at most 1.

    Raises:
      ModuleNotFoundError: rensa is not installed.
    """

    def __init__(self, threshold: float, file: Path):
        try:
            import rensa
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError('near-duplicates need rensa: pip install "nomic_jax[clean]"') from error
        if not 0 < threshold <= 1:
            raise ValueError(f"the threshold of near-duplicates is {threshold}; write a similarity such as 0.8")
        self.threshold = threshold
        bands, rows = bands_and_rows(threshold)
        self.permutations = bands * rows
        self._signatures = rensa.RMinHash.from_token_sets
        self._lsh = rensa.RMinHashLSH(threshold, self.permutations, bands)
        file.parent.mkdir(parents=True, exist_ok=True)
        self._texts, self._path = file.open("w+b"), file
        self._ends, self._rows = array("q"), array("q")

    def __enter__(self) -> "NearDuplicates":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._texts.close()
        self._path.unlink(missing_ok=True)

    def check(self, texts: Sequence[str], rows: Sequence[int]) -> list[int | None]:
        """For each text, the row of a text kept before it that it nearly equals; None for one that is kept now."""
        shingles = [word_ngrams(words_of(text), SHINGLE) for text in texts]
        signatures = self._signatures(shingles, self.permutations, 0)
        return [self._check(*one) for one in zip(texts, rows, map(frozenset, shingles), signatures)]

    def _check(self, text: str, row: int, shingles: frozenset[str], signature) -> int | None:
        if not shingles:  # no word at all, such as a smiley: nothing to compare
            return None
        for candidate in sorted(self._lsh.query(signature)):
            other = frozenset(word_ngrams(words_of(self._read(candidate)), SHINGLE))
            shared = len(shingles & other)
            if shared >= self.threshold * (len(shingles) + len(other) - shared):
                return self._rows[candidate]
        self._lsh.insert(len(self._ends), signature)
        self._texts.seek(0, 2)
        self._texts.write(text.encode())
        self._ends.append(self._texts.tell())
        self._rows.append(row)
        return None

    def _read(self, number: int) -> str:
        start = self._ends[number - 1] if number else 0
        self._texts.seek(start)
        return self._texts.read(self._ends[number] - start).decode()


def bands_and_rows(threshold: float) -> tuple[int, int]:
    """Of the signature: the longest rows of as many bands as find a pair at the threshold with CERTAINTY.

    A pair of similarity s agrees in one of b bands of r rows with probability 1 - (1 - s^r)^b (Leskovec, Rajaraman and
    Ullman, Mining of Massive Datasets, 3.4.2). Longer rows mean fewer candidates to compare in vain, and less memory.
    """
    best = (MOST_PERMUTATIONS, 1)
    for rows in range(1, MOST_PERMUTATIONS + 1):
        miss = 1 - threshold**rows
        bands = max(1, math.ceil(math.log(1 - CERTAINTY) / math.log(miss))) if miss > 0 else 1
        if bands * rows > MOST_PERMUTATIONS:
            break
        best = (bands, rows)
    return best

"""Near-duplicates: MinHash and locality-sensitive hashing by rensa, with an exact Jaccard check of every candidate."""

import math
from array import array
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from nomic_jax.data.words import word_ngrams, words_of
from nomic_jax.files.writing import open_new

SHINGLE = 3  # words; one changed word in 30 leaves a similarity of 0.8
CERTAINTY = 0.99  # probability of finding a pair at the threshold
MOST_PERMUTATIONS = 128


class NearDuplicates:
    """The texts kept so far, which are searched for near-duplicates of new texts.

    Similarity is the Jaccard index of the sets of SHINGLE-word runs. Memory holds about 2 KB per text (for a threshold
    of 0.8). The texts themselves are in ``file``, which is deleted at the end.

    Args:
      threshold: the minimum similarity of near-duplicates, above 0 and at most 1.

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
        self._texts, self._path = open_new(file), file
        self._ends, self._rows = array("q"), array("q")

    def __enter__(self) -> "NearDuplicates":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._texts.close()
        self._path.unlink(missing_ok=True)

    def check(self, texts: Sequence[str], rows: Sequence[int]) -> list[int | None]:
        """Returns for each text the row of a kept near-duplicate. If there is none, returns None and keeps the text."""
        shingles = [word_ngrams(words_of(text), SHINGLE) for text in texts]
        signatures = self._signatures(shingles, self.permutations, 0)
        return [self._check(*arguments) for arguments in zip(texts, rows, map(frozenset, shingles), signatures)]

    def _check(self, text: str, row: int, shingles: frozenset[str], signature) -> int | None:
        if not shingles:  # no words, for example only a smiley: nothing to compare
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
    """Returns (bands, rows per band) of the signature: the most rows that find a pair at the threshold with CERTAINTY.

    A pair of similarity s agrees in one of b bands of r rows with probability 1 - (1 - s^r)^b (Leskovec, Rajaraman and
    Ullman, Mining of Massive Datasets, 3.4.2). More rows mean fewer false candidates and less memory.
    """
    best = (MOST_PERMUTATIONS, 1)
    for rows in range(1, MOST_PERMUTATIONS + 1):
        miss = 1 - threshold**rows
        bands = max(1, math.ceil(math.log(1 - CERTAINTY) / math.log(miss))) if miss > 0 else 1
        if bands * rows > MOST_PERMUTATIONS:
            break
        best = (bands, rows)
    return best

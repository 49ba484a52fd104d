"""Near-duplicates: MinHash by rensa and locality-sensitive hashing, with an exact Jaccard check of the candidates."""

import itertools
import math
from array import array
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np

from nomic_jax.curate.clean.repeated import is_among
from nomic_jax.data.words import ngram_hashes, text_form, word_ngrams, words_of
from nomic_jax.extras import needs
from nomic_jax.files import system
from nomic_jax.files.writing import named_errors, open_new

SHINGLE = 3  # words; one changed word in 30 leaves a similarity of 0.8
CERTAINTY = 0.99  # probability of finding a pair at the threshold
MOST_PERMUTATIONS = 128
MOST_IN_BUCKET = 64
WORK_FILES = (".texts.part", ".runs.part")
MOST_COMPARED = 128


class Near(NamedTuple):
    """A kept near-duplicate: the number of its row and its texts."""

    row: int
    texts: list[str]


class Compared(NamedTuple):
    """What ``NearDuplicates`` compares of N rows.

    Attributes:
      signatures: MinHash of each row, uint32 [N, P].
      keys: a number for each of the B bands of each signature, uint64 [N, B]; equal bands have equal numbers.
      runs: for each row and column, the runs of words as sorted, distinct numbers, int64.
    """

    signatures: np.ndarray
    keys: np.ndarray
    runs: list[list[np.ndarray]]


class Signer:
    """Computes what is compared of a row. Rows are independent: any process may do it.

    Args:
      threshold: the minimum similarity of near-duplicates, above 0 and at most 1.

    Raises:
      MissingPackage: rensa is not installed.
    """

    def __init__(self, threshold: float):
        with needs("finding near-duplicates", "nomic_jax[clean]"):
            import rensa
        if not 0 < threshold <= 1:
            raise ValueError(f"the threshold of near-duplicates is {threshold}; write a similarity such as 0.8")
        self.bands, self.rows_per_band = bands_and_rows(threshold)
        self.length = self.bands * self.rows_per_band
        self._digests = rensa.RMinHash.digests_from_token_sets

    def __call__(self, texts: Sequence[Sequence[str]]) -> Compared:
        """Args: for each row, the texts of its columns."""
        words = [[words_of(text) for text in own] for own in texts]
        runs = [[word_ngrams(found, SHINGLE) for found in own] for own in words]
        # Runs of several columns are one set. Where each column is at least as similar as the threshold, so is the set.
        # The last column, usually the longest, goes without its number, which saves time.
        sets = [[f"{column} {run}" for column, found in enumerate(own[:-1]) for run in found] + own[-1] for own in runs]
        signatures = np.array(self._digests(sets, self.length, 0), np.uint32).reshape(len(texts), self.length)
        numbers = [[np.unique(np.array(ngram_hashes(found, SHINGLE), np.int64)) for found in own] for own in words]
        return Compared(signatures, self._keys(signatures), numbers)

    def _keys(self, signatures: np.ndarray) -> np.ndarray:
        bands = signatures.reshape(len(signatures), self.bands, self.rows_per_band).astype(np.uint64)
        keys = np.tile(np.arange(1, self.bands + 1, dtype=np.uint64), (len(signatures), 1))
        for i in range(self.rows_per_band):
            keys = (keys ^ bands[:, :, i]) * np.uint64(0x9E3779B97F4A7C15)
            keys ^= keys >> np.uint64(29)
        return keys


class NearDuplicates:
    """The rows kept so far, which are searched for near-duplicates of new rows.

    The similarity of two texts is the Jaccard index of their sets of SHINGLE-word runs. Two rows are near-duplicates if
    the texts of every column are at least as similar as the threshold. Texts without words must be equal.

    Work on a row is bounded, so that rows made from one template do not take quadratic time: a bucket of the hash
    tables holds the first MOST_IN_BUCKET rows, and of all candidates the MOST_COMPARED with the most similar signatures
    are compared. A pair at the threshold is found with CERTAINTY. Among rows of one template that are nearly as
    similar to each other (.67 at a threshold of .8), fewer are found: .97 among 1,500 rows, .92 among 6,000.

    Memory holds about 2.5 KB per row (for a threshold of 0.8). Texts and runs are in WORK_FILES in ``folder``. They are
    deleted at the end.

    Args:
      threshold: the minimum similarity of near-duplicates, above 0 and at most 1.
      repeated: for each band, the keys that several rows have (sorted), if they are known. Rows without one are not
        kept in memory. The result is the same, because no row is compared with them.

    Raises:
      MissingPackage: rensa is not installed.
    """

    def __init__(self, threshold: float, folder: Path, repeated: Sequence[np.ndarray] | None = None):
        self.threshold, self._signer, self._repeated = threshold, Signer(threshold), repeated
        self._buckets: dict[int, int | list[int]] = {}
        self._signatures = np.empty((1024, self._signer.length), np.uint32)
        self._rows = array("q")
        self._texts, self._runs = (_Records(folder / name) for name in WORK_FILES)

    def __enter__(self) -> "NearDuplicates":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._texts.close()
        self._runs.close()

    def check(
        self, texts: Sequence[Sequence[str]], rows: Sequence[int], compared: Compared | None = None
    ) -> list[Near | None]:
        """Returns for each row a kept near-duplicate. If there is none, returns None and keeps the row.

        Args:
          texts: for each row, the texts of its columns.
          compared: what a ``Signer`` of the same threshold returned for the texts. [computed here]
        """
        signatures, keys, runs = compared or self._signer(texts)
        if self._repeated is None:
            keys_of_rows = keys.tolist()
        else:
            is_repeated = np.stack([is_among(own, known) for own, known in zip(keys.T, self._repeated)], axis=1)
            keys_of_rows = [own[chosen].tolist() for own, chosen in zip(keys, is_repeated)]
        return [self._check(*arguments) for arguments in zip(texts, rows, runs, signatures, keys_of_rows)]

    def _check(
        self, texts: Sequence[str], row: int, runs: list[np.ndarray], signature: np.ndarray, keys: list[int]
    ) -> Near | None:
        if not keys or not any(map(len, runs)):  # without words, for example only a smiley: nothing to compare
            return None
        if candidates := self._candidates(signature, keys):
            first = self._first_near(texts, runs, candidates)
            if first is not None:
                return Near(self._rows[first], self._texts_of(first))
        number = len(self._rows)
        for key in keys:
            held = self._buckets.get(key)
            if held is None:
                self._buckets[key] = number
            elif isinstance(held, int):
                self._buckets[key] = [held, number]
            elif len(held) < MOST_IN_BUCKET:
                held.append(number)
        if number == len(self._signatures):
            self._signatures = np.concatenate([self._signatures, np.empty_like(self._signatures)])
        self._signatures[number] = signature
        self._texts.add([text.encode("utf-8", "surrogatepass") for text in texts])
        self._runs.add([found.tobytes() for found in runs])
        self._rows.append(row)
        return None

    def _candidates(self, signature: np.ndarray, keys: list[int]) -> list[int]:
        found: set[int] = set()
        for key in keys:
            held = self._buckets.get(key)
            if isinstance(held, int):
                found.add(held)
            elif held:
                found.update(held)
        if len(found) <= MOST_COMPARED:
            return sorted(found)
        numbers = np.array(sorted(found))
        agreeing = (self._signatures[numbers] == signature).sum(axis=1)
        return sorted(numbers[np.argsort(-agreeing, kind="stable")[:MOST_COMPARED]].tolist())

    def _first_near(self, texts: Sequence[str], runs: list[np.ndarray], candidates: list[int]) -> int | None:
        """Returns the first of the candidates that is a near-duplicate."""
        found = [self._runs[candidate] for candidate in candidates]
        is_near = np.ones(len(candidates), bool)
        for column, own in enumerate(runs):
            others = [np.frombuffer(candidate[column], np.int64) for candidate in found]
            size = np.array([len(other) for other in others])
            shared = _shared(own, others)
            is_near &= shared >= self.threshold * (len(own) + size - shared)
            if not len(own):
                for i in np.flatnonzero(is_near):
                    is_near[i] = text_form(texts[column]) == text_form(self._texts_of(candidates[i])[column])
        return candidates[int(is_near.argmax())] if is_near.any() else None

    def _texts_of(self, candidate: int) -> list[str]:
        return [text.decode("utf-8", "surrogatepass") for text in self._texts[candidate]]


def _shared(own: np.ndarray, others: list[np.ndarray]) -> np.ndarray:
    """Returns how many values each set has in common with ``own``. The sets are sorted arrays."""
    if not len(own):
        return np.zeros(len(others), np.int64)
    joined = np.concatenate(others)
    is_shared = own[np.minimum(np.searchsorted(own, joined), len(own) - 1)] == joined
    ends = np.cumsum([0, *map(len, others)])
    return np.diff(np.concatenate([[0], np.cumsum(is_shared)])[ends])


class _Records:
    """Lists of bytes in a file, read by number. All lists have the same length. The file is deleted on ``close``."""

    def __init__(self, path: Path):
        self._path, self._file = path, open_new(path)
        self._ends = array("q", [0])
        self._length = 1

    def add(self, values: list[bytes]) -> None:
        self._length = len(values)
        with named_errors(self._path):
            self._file.write(b"".join(values))
        for value in values:
            self._ends.append(self._ends[-1] + len(value))

    def __getitem__(self, number: int) -> list[bytes]:
        ends = self._ends[number * self._length : (number + 1) * self._length + 1]
        with named_errors(self._path):
            self._file.flush()
        content = system.read_at(self._file.fileno(), ends[-1] - ends[0], ends[0])
        return [content[start - ends[0] : end - ends[0]] for start, end in itertools.pairwise(ends)]

    def close(self) -> None:
        self._file.close()
        self._path.unlink(missing_ok=True)


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

"""Overlap of training texts with evaluation tasks, found by shared runs of words."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from nomic_jax.curate.clean.repeated import is_among
from nomic_jax.data.words import ngram_hashes, word_ngrams, words_of

NGRAM = 13  # Brown et al. 2020 (GPT-3), appendix C
Part = Literal["queries", "documents"]
PARTS: tuple[Part, ...] = ("queries", "documents")


@dataclasses.dataclass(frozen=True)
class EvaluationTexts:
    """The texts of one task."""

    queries: Sequence[str]
    documents: Sequence[str]


class Contamination:
    """Finds runs of n words that a training text shares with a query or document of an evaluation task.

    A text of fewer than n words is one run: it matches only a text that consists of the same words.
    Memory: about 100 bytes per word of the evaluation texts.
    """

    def __init__(self, tasks: Mapping[str, EvaluationTexts], n: int = NGRAM):
        if n < 1:
            raise ValueError(f"the n-grams have {n} words; write a number of at least 1, such as {NGRAM}")
        self.tasks, self.n = tasks, n
        self._task_parts = [(name, part) for name in tasks for part in PARTS]
        # Hash of an n-gram -> bits of the tasks and parts that have it. Hashes need a third of the memory of words.
        self._bits: dict[int, int] = {}
        for bit, (name, part) in enumerate(self._task_parts):
            for text in getattr(tasks[name], part):
                for gram in self._runs(text):
                    self._bits[gram] = self._bits.get(gram, 0) | 1 << bit
        self._met: set[int] = set()
        self._rows = [0] * len(self._task_parts)
        self._examples: list[dict[str, Any] | None] = [None] * len(self._task_parts)

    @functools.cached_property
    def runs(self) -> np.ndarray:
        """The numbers of all runs of the evaluation texts, sorted int64, for ``shared_runs``."""
        return np.sort(np.fromiter(self._bits, np.int64, len(self._bits)))

    def check(self, texts: Sequence[str], row: int, shared: Iterable[int]) -> set[tuple[str, Part]]:
        """Returns and counts the tasks and parts that the texts of a row overlap with.

        Args:
          shared: the ``shared_runs`` of the texts with ``runs``.
        """
        found = 0
        for run in shared:
            bits = self._bits[run]
            self._met.add(run)
            for bit in range(len(self._task_parts)):
                if bits >> bit & 1 and self._examples[bit] is None:
                    self._examples[bit] = {"row": row, "words": self._words_of(run, texts)}
            found |= bits
        bits_found = [bit for bit in range(len(self._task_parts)) if found >> bit & 1]
        for bit in bits_found:
            self._rows[bit] += 1
        return {self._task_parts[bit] for bit in bits_found}

    def report(self) -> list[dict[str, Any]]:
        """Returns for each task and part the numbers of overlapping training rows and evaluation texts."""
        lines = []
        for (name, part), rows, example in zip(self._task_parts, self._rows, self._examples):
            texts = getattr(self.tasks[name], part)
            met = sum(any(run in self._met for run in self._runs(text)) for text in texts)
            share = round(met / max(1, len(texts)), 4)
            line = {"task": name, "part": part, "texts": len(texts), "texts_met": met, "share_met": share}
            lines.append(line | {"training_rows": rows, "example": example})
        return lines

    def _runs(self, text: str) -> list[int]:
        return ngram_hashes(words_of(text), self.n)

    def _words_of(self, run: int, texts: Sequence[str]) -> str:
        for text in texts:
            if run in (numbers := self._runs(text)):
                return word_ngrams(words_of(text), self.n)[numbers.index(run)]
        raise ValueError("the run is of other texts")


def shared_runs(texts: Iterable[str], runs: np.ndarray, n: int) -> list[int]:
    """Returns the runs of n words of the texts that are in ``runs`` (sorted), in their order; see ``ngram_hashes``."""
    if not len(runs):  # saves the time for the words
        return []
    own = np.array([run for text in texts for run in ngram_hashes(words_of(text), n)], np.int64)
    return own[is_among(own, runs)].tolist()

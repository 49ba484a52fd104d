"""Retrieval from long documents: passages at known depths in filler text, in documents of several lengths.

Made from a retrieval task, so that queries and passages are real, and scored as one. What varies is where a passage is
and how much else its document holds, as with the needles of LongEmbed (Zhu et al. 2024, arXiv:2404.12096). For each
length there is a folder of the task, beside one of the passages alone:

    NAME-alone/, NAME-512/, ..., NAME-8192/      queries, corpus, qrels.jsonl and task.json (``tasks.retrieval``)
      qrels.jsonl          also {"depth", "tokens", "tokens_before", "passage_tokens"} of each passage
      long_context.json    {"passages": NAME, "length": tokens or null, "depths": [...]}

Only the length changes: each query has the same passage, depth and filler in all of them. The filler of a document is
the beginning of that of the longer ones, and that of another document is other text.
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from nomic_jax.data.formats.reading import read_rows
from nomic_jax.data.formats.writing import write_rows
from nomic_jax.data.tokens.tokenizer import Tokenizer
from nomic_jax.data.words import text_form, word_ngrams, words_of
from nomic_jax.evals.tasks.contract import TaskError
from nomic_jax.evals.tasks.files import find_file
from nomic_jax.evals.tasks.retrieval import RetrievalTask
from nomic_jax.files.reading import read_json
from nomic_jax.files.writing import write_json

LENGTHS = (512, 1024, 2048, 4096, 8192)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
FILE = "long_context.json"
ALONE = "alone"
RUN = 13  # words that a filler text shares with no answer: Brown et al. 2020 (GPT-3), appendix C
PROMPT_TOKENS = 16  # left free in a document, so that a model's prompt pushes nothing of it out
CHARACTERS_PER_TOKEN = 8  # more than any tokenizer has on average of natural text or code
BETWEEN = "\n\n"


class Answer(NamedTuple):
    """A query and the passage that answers it."""

    query: str
    passage: str


class Placed(NamedTuple):
    """A document with a passage in it.

    Attributes:
      text: the filler before the passage, the passage, the filler after it.
      tokens: of the document, with special tokens.
      tokens_before: of the filler before the passage, without special tokens.
    """

    text: str
    tokens: int
    tokens_before: int


@dataclasses.dataclass(frozen=True)
class Filler:
    """Text that can be cut before each of its words.

    Attributes:
      text: of several texts, one after the other.
      characters, tokens: before each word, and of the whole text [W + 1]; see ``Tokenizer.word_starts``.
    """

    text: str
    characters: np.ndarray
    tokens: np.ndarray

    def around(self, room: int, depth: float) -> tuple[str, str]:
        """Returns the first ``room`` tokens or fewer, as what is before and after a passage at that depth."""
        end = int(np.searchsorted(self.tokens, room, side="right")) - 1
        cut = int(np.abs(self.tokens[: end + 1] - depth * self.tokens[end]).argmin())
        middle, last = self.characters[cut], self.characters[end]
        return self.text[:middle].strip(), self.text[middle:last].strip()


def place(filler: Filler, passage: str, length: int, depth: float, tokenizer: Tokenizer) -> Placed:
    """Puts a passage into filler text.

    Args:
      length: tokens that the document has at most, special tokens included; it lacks less than a word of them.
      depth: share of the filler that comes before the passage, 0 to 1; exact but for half a word.
    """
    special = _count(tokenizer, "")
    room = length - _count(tokenizer, passage)
    while True:
        before, after = filler.around(room, depth)
        text = BETWEEN.join(part for part in (before, passage, after) if part)
        tokens = _count(tokenizer, text)
        if tokens <= length:
            return Placed(text, tokens, _count(tokenizer, before) - special)
        room -= tokens - length  # tokenizers with tokens for line ends


def write_tasks(
    task: RetrievalTask,
    filler: Iterable[str],
    output: Path,
    tokenizer: Tokenizer,
    *,
    name: str,
    lengths: Sequence[int] = LENGTHS,
    depths: Sequence[float] = DEPTHS,
    queries: int = 100,
    seed: int = 0,
) -> dict[str, Any]:
    """Writes the folders of the tasks and returns counts. They depend only on the arguments.

    Args:
      task: where queries and passages are from.
      filler: texts for the rest of the documents. Those that share RUN words in a row with a chosen query, or with a
        document that is relevant to one, or that hold all words of a shorter one, are left out.
      tokenizer: counts the tokens.
      name: first part of the names of the folders.
      lengths: tokens of the documents.
      depths: the i-th query's passage is at the i-th of them, and so on from the first again.
      queries: at most so many, chosen at random.

    Raises:
      TaskError: no query can be used, or there is too little filler; the message says how much is needed.
    """
    lengths = sorted(lengths)
    answers, blocked = _choose(task, (lengths[0] - PROMPT_TOKENS) // 2, queries, tokenizer, seed)
    needed = len(answers) * lengths[-1]
    texts = _sampled(filler, needed * CHARACTERS_PER_TOKEN, seed)
    fillers = _fillers(texts, _Leaks(blocked), len(answers), lengths[-1], tokenizer)
    corpora: dict[int, list[Placed]] = {length: [] for length in lengths}
    found = 0
    for i, (answer, one) in enumerate(zip(answers, tqdm(fillers, "documents", total=len(answers)), strict=False)):
        found += int(one.tokens[-1])
        if one.tokens[-1] < lengths[-1]:
            raise TaskError(
                f"the filler has some {found:,} tokens that can be used; {len(answers):,} documents of {lengths[-1]:,} "
                f"tokens need {needed:,}. Give more text with --filler, or lower --queries or --lengths"
            )
        for length in lengths:
            depth = depths[i % len(depths)]
            corpora[length].append(place(one, answer.passage, length - PROMPT_TOKENS, depth, tokenizer))
    alone = [Placed(answer.passage, _count(tokenizer, answer.passage), 0) for answer in answers]
    described = {"passages": name, "depths": list(depths)}
    written: list[tuple[int | None, list[Placed]]] = [(None, alone), *corpora.items()]
    for tokens, corpus in written:
        folder = output / f"{name}-{tokens or ALONE}"
        _write_task(folder, task, answers, corpus, depths, tokenizer)
        write_json(folder / FILE, described | {"length": tokens})
    return {"queries": len(answers), "filler_tokens": found, "tokens": {n: _mean(corpora[n]) for n in lengths}}


class Placement(NamedTuple):
    """Where the answers of a generated task are.

    Attributes:
      passages: name of the task that the queries and passages are from.
      length: tokens of the documents; None for the passages alone.
      depths: of every query's passage, in the order of ``RetrievalTask.queries``.
    """

    passages: str
    length: int | None
    depths: tuple[float, ...]

    @classmethod
    def read(cls, folder: Path) -> "Placement | None":
        """Returns what ``write_tasks`` wrote; None for another task.

        Raises:
          TaskError: a file has been changed so that it cannot be used.
        """
        if not (folder / FILE).is_file():
            return None
        given = read_json(folder / FILE)
        if not isinstance(given, dict) or not isinstance(given.get("passages"), str):
            raise TaskError(f"{folder / FILE}: expected what nomic-jax long-context wrote; make the task again")
        length = given.get("length")
        if not isinstance(length, int | None) or isinstance(length, bool):
            raise TaskError(f"{folder / FILE}: length is {length!r}; expected a number of tokens, or null")
        qrels = find_file(folder, "qrels")
        depths: dict[str, float] = {}
        for row in read_rows(str(qrels), {"query_id": str}) if qrels else ():
            if not isinstance(row.get("depth"), int | float):
                raise TaskError(f"{qrels}: query {row['query_id']!r} has no depth; make the task again")
            depths[row["query_id"]] = float(row["depth"])
        return cls(given["passages"], length, tuple(depths.values()))

    def by_depth(self, value_Q: np.ndarray) -> dict[str, float]:
        """Returns depth -> mean of the values of its queries."""
        depth_Q = np.array(self.depths)
        return {f"{depth:g}": float(np.mean(value_Q[depth_Q == depth])) for depth in sorted(set(self.depths))}


def _choose(
    task: RetrievalTask, longest: int, most: int, tokenizer: Tokenizer, seed: int
) -> tuple[list[Answer], list[str]]:
    """Returns queries with the passage of each, none of which answers another, and texts that no filler may hold."""
    answers: list[Answer] = []
    blocked: list[str] = []
    taken: set[str] = set()
    for query in sorted(range(len(task.queries)), key=lambda i: _key(seed, task.queries[i])):
        relevant = sorted(task.relevance[query].items(), key=lambda item: (-item[1], item[0]))
        texts = [task.documents[i].strip() for i, _ in relevant]
        forms = {text_form(text) for text in (task.queries[query], *texts)}
        if not texts or not texts[0] or taken & forms or _count(tokenizer, texts[0]) > longest:
            continue
        taken |= forms
        blocked += [task.queries[query], *texts]
        answers.append(Answer(task.queries[query], texts[0]))
        if len(answers) == most:
            break
    if len(answers) < 2:
        raise TaskError(
            f"{task.name}: of {len(task.queries):,} queries, {len(answers)} have a passage of their own with at most "
            f"{longest:,} tokens (half of the shortest documents); two at least are needed"
        )
    return answers, blocked


class _Leaks:
    """Finds texts that hold an answer: RUN of its words in a row, or all of them if it has fewer."""

    def __init__(self, answers: Iterable[str]):
        self._runs: dict[int, set[str]] = {}
        for answer in answers:
            words = words_of(answer)
            if n := min(len(words), RUN):
                self._runs.setdefault(n, set()).update(word_ngrams(words, n))

    def hold(self, text: str) -> bool:
        words = words_of(text)
        return any(not runs.isdisjoint(word_ngrams(words, n)) for n, runs in self._runs.items() if len(words) >= n)


def _sampled(texts: Iterable[str], characters: int, seed: int) -> list[str]:
    """Returns different texts in random order: all, or so many that they have that many characters."""
    # Of texts that arrive one by one, those with the lowest keys are kept: only they are in memory.
    kept: dict[bytes, str] = {}
    size = 0
    for text in tqdm(texts, "filler", unit=" texts", delay=2, leave=False):
        key = _key(seed, text)
        if text.strip() and key not in kept:
            kept[key] = text.strip()
            size += len(text)
        if size > 2 * characters:
            ordered = dict(sorted(kept.items()))
            kept, size = {}, 0
            for key, each in ordered.items():
                kept[key] = each
                size += len(each)
                if size >= characters:
                    break
    return [text for _, text in sorted(kept.items())]


def _fillers(texts: Iterable[str], leaks: _Leaks, count: int, length: int, tokenizer: Tokenizer) -> Iterator[Filler]:
    """Yields ``count`` fillers of ``length`` tokens, or fewer and a last one that is too short."""
    remaining = (text for text in texts if not leaks.hold(text))
    for _ in range(count):
        parts: list[str] = []
        characters: list[np.ndarray] = []
        tokens: list[np.ndarray] = []
        size = start = 0
        while size < length and (text := next(remaining, None)) is not None:
            at, before = tokenizer.word_starts(text)
            parts.append(text)
            # The end of a text is where the next one begins, but for the line ends between them.
            characters.append(start + at[:-1])
            tokens.append(size + before[:-1])
            start, size = start + len(text) + len(BETWEEN), size + int(before[-1])
        yield Filler(BETWEEN.join(parts), np.concatenate([*characters, [start]]), np.concatenate([*tokens, [size]]))
        if size < length:
            return


def _write_task(
    folder: Path,
    task: RetrievalTask,
    answers: Sequence[Answer],
    corpus: Sequence[Placed],
    depths: Sequence[float],
    tokenizer: Tokenizer,
) -> None:
    qrels = [
        {
            "query_id": f"q{i}",
            "document_id": f"d{i}",
            "score": 1,
            "depth": depths[i % len(depths)],
            "tokens": placed.tokens,
            "tokens_before": placed.tokens_before,
            "passage_tokens": _count(tokenizer, answer.passage) - _count(tokenizer, ""),
        }
        for i, (answer, placed) in enumerate(zip(answers, corpus, strict=True))
    ]
    write_rows(folder / "queries.jsonl", ({"_id": f"q{i}", "text": each.query} for i, each in enumerate(answers)))
    write_rows(folder / "corpus.jsonl", ({"_id": f"d{i}", "text": each.text} for i, each in enumerate(corpus)))
    write_rows(folder / "qrels.jsonl", qrels)
    prompts = {"query_prompt": task.query_prompt or None, "document_prompt": task.document_prompt or None}
    write_json(folder / "task.json", prompts)


def _count(tokenizer: Tokenizer, text: str) -> int:
    """The number of tokens, special tokens included."""
    return len(tokenizer.encode([text])[0])


def _mean(corpus: Sequence[Placed]) -> float:
    return float(np.mean([placed.tokens for placed in corpus]))


def _key(seed: int, text: str) -> bytes:
    return hashlib.sha256(f"{seed} {text}".encode()).digest()

"""Splits pairs before training: a held-out retrieval task, and a share of the remaining pairs for finetuning."""

import hashlib
import heapq
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from nomic_jax.data.formats.writing import write_rows
from nomic_jax.data.words import text_form
from nomic_jax.files.writing import write_json

Row = Mapping[str, Any]


class HeldOut(NamedTuple):
    """Attributes:
    rows: the held-out rows.
    groups: the forms (``text_form``) of the values of the group column in these rows.
    texts: the forms of the queries and documents of these rows.
    """

    rows: list[Row]
    groups: set[str]
    texts: set[str]


class Split(NamedTuple):
    """A split of the rows of a source. It does not depend on the order of the rows.

    Attributes:
      columns: the query column and the document column.
      group: the column to group by. Rows with equal values stay together, and so do near-identical neighbours.
      seed: another seed gives another split.
      labelled_share: the share of the groups outside the held-out set that is set aside for finetuning.
    """

    columns: tuple[str, str]
    group: str
    seed: int = 0
    labelled_share: float = 0.15

    def hold_out(self, rows: Callable[[], Iterable[Row]], queries: int, documents: int) -> HeldOut:
        """Takes whole groups, in random order, until they have these numbers of distinct queries and documents.

        If the source has fewer, all groups are held out. Memory grows with the held-out rows, not with the input.

        Args:
          rows: iterates over all rows. It is called again if the first sample of groups was not large enough.
        """
        sample_size, held = 4 * max(queries, documents), list[Row]()
        while True:
            first = heapq.nsmallest(sample_size, rows(), key=lambda row: sampling_key(self.seed, self._group(row)))
            groups = [list(group) for _, group in groupby(first, key=self._group)]
            if len(first) == sample_size:
                groups.pop()  # the last group may be incomplete
            held = []
            for group in groups:
                if self._is_enough(held, queries, documents):
                    break
                held += group
            if len(first) < sample_size or self._is_enough(held, queries, documents):
                return HeldOut(held, {self._group(row) for row in held}, set(self._texts(held)))
            sample_size *= 2

    def _is_enough(self, rows: Sequence[Row], queries: int, documents: int) -> bool:
        return all(
            len({row[column] for row in rows}) >= count
            for column, count in zip(self.columns, (queries, documents), strict=True)
        )

    def _texts(self, rows: Iterable[Row]) -> Iterable[str]:
        return (text_form(row[column]) for row in rows for column in self.columns)

    def _group(self, row: Row) -> str:
        return text_form(row[self.group])

    def is_for_training(self, row: Row, held: HeldOut) -> bool:
        """Returns whether the row is not held out and shares no text with a held-out row."""
        return self._group(row) not in held.groups and held.texts.isdisjoint(self._texts([row]))

    def is_labelled(self, row: Row) -> bool:
        """Returns whether a training row is set aside for finetuning."""
        return self.is_sampled(row, "labelled", self.labelled_share)

    def is_sampled(self, row: Row, purpose: str, share: float) -> bool:
        """Returns whether the row's group is in a random share of all groups; each purpose has its own sample."""
        return int.from_bytes(sampling_key(self.seed, f"{purpose} {self._group(row)}")[:4]) < share * 2**32

    def write_task(
        self,
        folder: Path,
        held: HeldOut,
        queries: int,
        query_prompt: str,
        document_prompt: str,
        further: Iterable[str] = (),
    ) -> tuple[int, int]:
        """Writes a task with at most ``queries`` held-out queries and all held-out documents; returns both counts.

        Args:
          further: documents that are relevant for none of the queries, which make the search harder.
        """
        query, document = self.columns
        documents = dict.fromkeys([*(row[document] for row in held.rows), *further])
        document_ids = {text: f"d{i}" for i, text in enumerate(documents)}
        relevant: dict[str, set[str]] = {}
        for row in held.rows:
            relevant.setdefault(row[query], set()).add(document_ids[row[document]])
        # The groups may have more queries than requested. Sampling again takes queries from many groups.
        chosen = sorted(relevant, key=lambda text: sampling_key(0, text))[:queries]
        query_ids = {text: f"q{i}" for i, text in enumerate(chosen)}
        qrels = [
            {"query_id": query_id, "document_id": document_id, "score": 1}
            for text, query_id in query_ids.items()
            for document_id in sorted(relevant[text])
        ]
        write_rows(folder / "queries.jsonl", ({"_id": i, "text": text} for text, i in query_ids.items()))
        write_rows(folder / "corpus.jsonl", ({"_id": i, "text": text} for text, i in document_ids.items()))
        write_rows(folder / "qrels.jsonl", qrels)
        write_json(folder / "task.json", {"query_prompt": query_prompt, "document_prompt": document_prompt})
        return len(query_ids), len(document_ids)


def sampling_key(seed: int, text: str) -> bytes:
    """Returns a pseudo-random sort key that depends only on the seed and the text."""
    return hashlib.sha256(f"{seed} {text}".encode()).digest()

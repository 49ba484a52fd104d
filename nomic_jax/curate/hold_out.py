"""Pairs set aside before training: a retrieval task of them, and of the rest a share for finetuning."""

import hashlib
import heapq
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from nomic_jax.data.formats.writing import write_json, write_rows

Row = Mapping[str, Any]


class HeldOut(NamedTuple):
    """Attributes:
    rows: what is held out.
    groups: values of the group column of these.
    texts: their queries and documents.
    """

    rows: list[Row]
    groups: set[str]
    texts: set[str]


class Split(NamedTuple):
    """How the rows of a source are divided, by what each row holds alone.

    Attributes:
      columns: of query and document.
      group: column whose equal values stay together, so that near-identical neighbours do.
      seed: draws another split.
      labelled_share: of the groups that are not held out, set aside for finetuning.
    """

    columns: tuple[str, str]
    group: str
    seed: int = 0
    labelled_share: float = 0.15

    def hold_out(self, rows: Callable[[], Iterable[Row]], queries: int, documents: int) -> HeldOut:
        """Whole groups, in a drawn order, until they have so many different queries and documents, or all there are.

        Args:
          rows: gives all rows; called again if the first groups drawn were not enough. Memory is that of what is held.
        """
        wanted, held = 4 * max(queries, documents), list[Row]()
        while True:
            first = heapq.nsmallest(wanted, rows(), key=lambda row: sampling_key(self.seed, row[self.group]))
            groups = [list(group) for _, group in groupby(first, key=lambda row: row[self.group])]
            if len(first) == wanted:
                groups.pop()  # it may have more rows
            held = []
            for group in groups:
                if self._is_enough(held, queries, documents):
                    break
                held += group
            if len(first) < wanted or self._is_enough(held, queries, documents):
                return HeldOut(held, {row[self.group] for row in held}, set(self._texts(held)))
            wanted *= 2

    def _is_enough(self, rows: Sequence[Row], queries: int, documents: int) -> bool:
        return all(
            len({row[column] for row in rows}) >= count
            for column, count in zip(self.columns, (queries, documents), strict=True)
        )

    def _texts(self, rows: Iterable[Row]) -> Iterable[str]:
        return (row[column] for row in rows for column in self.columns)

    def is_for_training(self, row: Row, held: HeldOut) -> bool:
        """Whether it is neither held out, nor has a text of what is."""
        return row[self.group] not in held.groups and held.texts.isdisjoint(self._texts([row]))

    def is_labelled(self, row: Row) -> bool:
        """Whether a row for training is for finetuning."""
        return self.is_drawn(row, "labelled", self.labelled_share)

    def is_drawn(self, row: Row, purpose: str, share: float) -> bool:
        """Whether its group is among a share of all; another one for each purpose."""
        return int.from_bytes(sampling_key(self.seed, f"{purpose} {row[self.group]}")[:4]) < share * 2**32

    def write_task(
        self, folder: Path, held: HeldOut, queries: int, query_prompt: str, document_prompt: str
    ) -> tuple[int, int]:
        """Writes a retrieval task of ``queries`` of the held queries and all held documents; returns both numbers."""
        query, document = self.columns
        document_ids = {text: f"d{i}" for i, text in enumerate(dict.fromkeys(row[document] for row in held.rows))}
        relevant: dict[str, set[str]] = {}
        for row in held.rows:
            relevant.setdefault(row[query], set()).add(document_ids[row[document]])
        # Drawn once more, so that they come from many groups where the number of documents decided.
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
    """A sort key that looks random but depends on seed and text alone."""
    return hashlib.sha256(f"{seed} {text}".encode()).digest()

"""The distinct queries and documents of an input and their pairs, on disk."""

import contextlib
import functools
import json
import shutil
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from nomic_jax.curate.engine.row_blocks import (
    AlreadyRejected,
    no_usable_row,
    read_file,
    read_quarantined,
    readable_files,
    write_quarantined,
)
from nomic_jax.curate.engine.text_store import TextFile, TextFileWriter
from nomic_jax.data.formats.paths import expand_files
from nomic_jax.data.formats.row_checks import BadRow, RejectedRows
from nomic_jax.files.writing import write_json

MOST_UNRELATED = 64  # lists that are kept for the next pairs of the same queries


class Pairs:
    """The pairs of a query and a positive. A row whose document column has a list gives one pair per text of the list.

    Attributes:
      queries, documents: distinct texts. Documents of the corpus follow those of the rows.
      query_P, document_P: each pair's index in ``queries`` and ``documents``, int64.
      own_Q: for each query, the document with the same text, or -1.
      rows: number of input rows used.
      rejected: number of skipped rows and of files that were set aside.
      quarantined: files that were set aside.
    """

    def __init__(self, folder: Path):
        counts = json.loads((folder / "counts.json").read_text(encoding="utf-8"))
        self.rows, self.rejected, self._holds_lists = (counts[n] for n in ("rows", "rejected", "holds_lists"))
        self.quarantined = read_quarantined(folder)
        self.queries, self.documents = TextFile(folder / "queries.txt"), TextFile(folder / "documents.txt")
        load = functools.partial(np.load, mmap_mode="r")
        self.query_P, self.document_P, self.own_Q, self._positives, self._ends_Q = (
            load(folder / f"{name}.npy") for name in ("query", "document", "own", "positives", "positives_end")
        )
        self._unrelated: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.query_P)

    def positives_of(self, query: int) -> np.ndarray:
        """Returns the distinct documents of all pairs of a query, in ascending order, as a view of the file."""
        start = int(self._ends_Q[query - 1]) if query else 0
        return self._positives[start : int(self._ends_Q[query])]

    def most_positives(self) -> tuple[int, int]:
        """Returns the query with the most distinct positives, the first of equal ones, and their number."""
        count_Q = np.diff(self._ends_Q, prepend=0)
        return int(count_Q.argmax()), int(count_Q.max())

    def count_related(self, query: int) -> int:
        """Returns how many documents at most cannot be negatives of a query; at least 1."""
        return len(self.positives_of(query)) + (int(self.own_Q[query]) >= 0)

    def can_be_negative(self, document_N: np.ndarray, query: int) -> np.ndarray:
        """Returns, bool [N], which documents are neither positives of the query nor equal to it."""
        positive_M = self.positives_of(query)
        place_N = np.minimum(np.searchsorted(positive_M, document_N), len(positive_M) - 1)
        return (positive_M[place_N] != document_N) & (document_N != self.own_Q[query])

    def unrelated(self, query: int) -> np.ndarray:
        """Returns all documents that can be negatives of a query, in ascending order."""
        if query not in self._unrelated:
            if len(self._unrelated) == MOST_UNRELATED:
                self._unrelated.clear()
            document_N = np.arange(len(self.documents))
            self._unrelated[query] = document_N[self.can_be_negative(document_N, query)]
        return self._unrelated[query]

    def distinct_pairs(self, at_once: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields (query_P, document_P) of all distinct pairs, at most ``at_once`` at a time, in order of query."""
        for start in range(0, len(self._positives), at_once):
            document_P = np.asarray(self._positives[start : start + at_once])
            numbers_P = np.arange(start, start + len(document_P))
            yield np.searchsorted(self._ends_Q, numbers_P, side="right"), document_P

    def read(self, files: str | list[str], query_column: str, document_column: str) -> Iterator[dict[str, Any]]:
        """Yields the pairs in order, as input rows with one text as document.

        Raises:
          ValueError: the files do not have the number of pairs that was read: they have changed since.
        """
        set_aside = {entry.file for entry in self.quarantined}
        readable = [file for file in expand_files(files) if file not in set_aside]
        count = 0
        for row in _rows(readable, query_column, document_column, self._holds_lists, "skip", AlreadyRejected()):
            for document in row[document_column] if self._holds_lists else [row[document_column]]:
                count += 1
                if count <= len(self):
                    yield row | {document_column: document}
        if count != len(self):
            raise ValueError(
                f"{', '.join(readable[:3])}: {count} pairs where {len(self)} were read before: the files have changed "
                f"since; run the command again"
            )


def collect_pairs(
    files: str | list[str],
    query_column: str,
    document_column: str,
    corpus: str | list[str] | None,
    corpus_column: str,
    folder: Path,
    side_file: Path,
    *,
    on_bad_row: str,
    progress: bool = True,
) -> Pairs:
    """Reads rows and corpus into ``folder``, unless an earlier run did. Memory: about 150 bytes per distinct text.

    Raises:
      BadRow: a row cannot be used, with on_bad_row="raise".
      ValueError: there is no usable row.
    """
    counts_file = folder / "counts.json"
    if counts_file.exists():
        pairs = Pairs(folder)
        if on_bad_row == "skip" or not pairs.rejected:
            return pairs
    shutil.rmtree(folder, ignore_errors=True)
    queries, documents = TextFileWriter(folder / "queries.txt"), TextFileWriter(folder / "documents.txt")
    query_P, document_P = array("q"), array("q")
    rejected = RejectedRows(side_file)
    holds_lists = _first_document_is_list(files, query_column, document_column)
    kinds = _kinds(query_column, document_column, holds_lists)
    readable = readable_files(files, kinds, on_bad_row, rejected, progress=progress)
    corpus_kinds = {corpus_column: str}
    readable_corpus = readable_files(corpus, corpus_kinds, on_bad_row, rejected, progress=progress) if corpus else []
    rows = 0
    with tqdm(desc="reading", unit=" rows", disable=not progress) as bar:
        for row in _rows(readable, query_column, document_column, holds_lists, on_bad_row, rejected):
            query = queries.add(row[query_column])
            for document in row[document_column] if holds_lists else [row[document_column]]:
                query_P.append(query)
                document_P.append(documents.add(document))
            rows += 1
            bar.update()
        if not rows:
            raise no_usable_row(files, rejected)
        for file in readable_corpus:
            for row in read_file(file, corpus_kinds, on_bad_row, rejected, others=()):
                documents.add(row[corpus_column])
                bar.update()
    own_Q = np.fromiter(
        (documents.number_of.get(key, -1) for key in queries.number_of), np.int64, len(queries.number_of)
    )
    order = np.lexsort((np.frombuffer(document_P, np.int64), np.frombuffer(query_P, np.int64)))
    by_query = np.stack([np.frombuffer(query_P, np.int64)[order], np.frombuffer(document_P, np.int64)[order]], axis=1)
    is_new = np.concatenate([[True], (by_query[1:] != by_query[:-1]).any(axis=1)])
    query_M, document_M = by_query[is_new].T
    arrays = {
        "query": np.frombuffer(query_P, np.int64),
        "document": np.frombuffer(document_P, np.int64),
        "own": own_Q,
        "positives": document_M,
        "positives_end": np.cumsum(np.bincount(query_M, minlength=len(own_Q))),
    }
    for name, values in arrays.items():
        np.save(folder / f"{name}.npy", values)
    queries.close()
    documents.close()
    write_quarantined(folder, rejected.quarantined)
    write_json(counts_file, {"rows": rows, "rejected": rejected.count, "holds_lists": holds_lists})
    return Pairs(folder)


def _first_document_is_list(files: str | list[str], query_column: str, document_column: str) -> bool:
    """Returns whether the first row with documents has a list of them. Rows of the other kind are bad rows."""
    for file in expand_files(files):
        with contextlib.suppress(BadRow):  # reported when the file is read again
            rows = read_file(file, {query_column: str}, "skip", AlreadyRejected(), others=(document_column,))
            for row in rows:
                if row.get(document_column) is not None:
                    return isinstance(row[document_column], list)
    return False


def _kinds(query_column: str, document_column: str, holds_lists: bool) -> dict[str, type]:
    return {query_column: str, document_column: list if holds_lists else str}


def _rows(
    files: str | list[str],
    query_column: str,
    document_column: str,
    holds_lists: bool,
    on_bad_row: str,
    rejected: RejectedRows,
) -> Iterator[dict[str, Any]]:
    def check(row: Mapping[str, Any], where: str) -> None:
        if not row[document_column]:
            raise BadRow(f"{where}: column {document_column!r} is an empty list, so there is no positive")

    kinds = _kinds(query_column, document_column, holds_lists)
    for file in files:
        yield from read_file(file, kinds, on_bad_row, rejected, further_check=check)

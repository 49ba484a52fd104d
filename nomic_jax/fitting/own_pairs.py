"""A user's own pairs: their columns, what of them can be used, and their split into a held-out task and the rest.

Files are read several times and never held in memory. A split depends on the rows and the seed, not on their order.
"""

import dataclasses
import heapq
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tqdm.auto import tqdm

from nomic_jax.curate.hold_out import HeldOut, Split, sampling_key
from nomic_jax.data.formats.reading import read_rows
from nomic_jax.data.formats.row_checks import RejectedRows
from nomic_jax.data.words import text_form
from nomic_jax.fitting.rows import DataError, columns_of

SAMPLE = 1000  # rows that stand for all where lengths are counted
MANY = 100_000  # different texts that are counted; that there are more does not matter


class Summary(NamedTuple):
    """What files of pairs hold.

    Attributes:
      rows: rows that can be read.
      empty: rows with an empty query or document, which are left out.
      rejected: rows that cannot be read, under "skip".
      pairs, queries, documents: different ones among the others, up to MANY.
      sample: up to SAMPLE pairs, chosen at random.
    """

    rows: int
    empty: int
    rejected: int
    pairs: int
    queries: int
    documents: int
    sample: list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class OwnPairs:
    """Files of pairs.

    Attributes:
      files: see ``nomic_jax.data.formats.paths.expand_files``.
      columns: query, document and, if there are any, negatives.
      on_bad_row: "raise", or "skip" to leave bad rows out.
      rejected_file: where bad rows are written under "skip".
    """

    files: str
    columns: tuple[str, ...]
    on_bad_row: str = "raise"
    rejected_file: Path | None = None

    @classmethod
    def find(
        cls, files: str, columns: tuple[str, ...] = (), on_bad_row: str = "raise", rejected_file: Path | None = None
    ) -> "OwnPairs":
        """Looks at the first row.

        Args:
          columns: query, document, negatives; () to take them from their names, or all in their order.

        Raises:
          DataError: the columns are not there, or do not say what is the query and what the document.
          BadRow, OSError: the files cannot be read; the message names file and line.
        """
        if files.endswith((".yaml", ".yml")):
            raise DataError(f"{files}: is a mixture; name the files of pairs themselves")
        rejected = RejectedRows(rejected_file) if on_bad_row == "skip" and rejected_file else None
        rows = read_rows(files, {}, allow_empty=True, on_bad_row=on_bad_row, rejected=rejected)
        first = next(iter(rows), None)
        if first is None:
            raise DataError(f"{files}: has no rows; expected pairs, a query and a document in each row")
        names = ", ".join(map(repr, first))
        if missing := [name for name in columns if name not in first]:
            raise DataError(f"{files}: there is no column {missing[0]!r}; its columns are {names}")
        try:
            found = columns or columns_of(first, None)
        except DataError:
            found = ()
        if len(found) < 2 or len(set(found)) < len(found):
            raise DataError(
                f"{files}: has the columns {names}; say which holds the query and which the document: "
                f"--columns=QUERY,DOCUMENT"
            )
        return cls(files, tuple(found), on_bad_row, rejected_file)

    def rows(self, doing: str = "reading") -> Iterator[dict[str, Any]]:
        """Yields the rows that have a query and a document, in the order of the files, with a bar if it takes long."""
        yield from filter(self._is_whole, self._read(doing))

    def _read(self, doing: str) -> Iterator[dict[str, Any]]:
        query, document, *negatives = self.columns
        rejected = RejectedRows(self.rejected_file) if self.on_bad_row == "skip" and self.rejected_file else None
        read = read_rows(
            self.files,
            {query: str, document: str},
            others=negatives,
            allow_empty=True,
            on_bad_row=self.on_bad_row,
            rejected=rejected,
        )
        yield from tqdm(read, doing, unit=" rows", delay=2, leave=False)

    def _is_whole(self, row: dict[str, Any]) -> bool:
        return bool(row[self.columns[0]].strip() and row[self.columns[1]].strip())

    def summarize(self) -> Summary:
        """Reads all rows once."""
        query, document = self.columns[:2]
        rows = empty = 0
        seen: dict[str, set[int]] = {"pairs": set(), "queries": set(), "documents": set()}

        def whole() -> Iterator[dict[str, Any]]:
            nonlocal rows, empty
            for row in self._read("reading"):
                rows += 1
                if not self._is_whole(row):
                    empty += 1
                    continue
                forms = text_form(row[query]), text_form(row[document])
                for name, value in zip(seen, (forms, *forms), strict=True):
                    if len(seen[name]) < MANY:
                        seen[name].add(hash(value))
                yield row

        sample = heapq.nsmallest(SAMPLE, whole(), key=lambda row: self._key(0, row))
        pairs, queries, documents = map(len, seen.values())
        return Summary(rows, empty, self.rejected, pairs, queries, documents, sample)

    @property
    def rejected(self) -> int:
        """The number of bad rows that the last reading left out."""
        if self.rejected_file is None or not self.rejected_file.exists():
            return 0
        with self.rejected_file.open("rb") as f:
            return sum(1 for _ in f)

    def _key(self, seed: int, row: dict[str, Any]) -> bytes:
        return sampling_key(seed, "\n".join(text_form(row[column]) for column in self.columns[:2]))

    def split(self, seed: int) -> Split:
        """The split that keeps rows with the same document together."""
        query, document = self.columns[:2]
        return Split((query, document), document, seed)

    def write_task(self, folder: Path, queries: int, documents: int, seed: int) -> None:
        """Writes a retrieval task of at most so many queries, to be found among at most about so many documents."""
        split = self.split(seed)
        held = split.hold_out(lambda: self.rows("choosing queries"), queries, 1)
        if not held.rows:
            raise DataError(f"{self.files}: has no row with a text in {self.columns[0]!r} and {self.columns[1]!r}")
        others = self.sample(max(0, documents - len(held.rows)), seed, held)
        further = [row[self.columns[1]] for row in others]
        split.write_task(folder, held, queries, "query", "document", further)

    def sample(self, most: int, seed: int, held: HeldOut | None = None) -> list[dict[str, Any]]:
        """Returns at most ``most`` different pairs, chosen at random, none of which shares a text with ``held``."""
        split, size = self.split(seed), most
        while most:
            usable = (row for row in self.rows("choosing") if held is None or split.is_for_training(row, held))
            nearest = heapq.nsmallest(size, usable, key=lambda row: self._key(seed, row))
            # Equal pairs have equal keys, so that they are neighbours.
            groups = itertools.groupby(nearest, key=lambda row: self._key(seed, row))
            found = [next(rows) for _, rows in groups]
            if len(found) >= most or len(nearest) < size:
                return found[:most]
            size *= 2
        return []

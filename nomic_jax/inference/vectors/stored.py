"""Reads what ``launch.embed`` wrote, a .parquet or a folder of parts, without holding all vectors in memory."""

import bisect
import itertools
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nomic_jax.data.formats.file_systems import check_protocols, file_system, is_local
from nomic_jax.data.formats.parquet import open_parquet
from nomic_jax.data.formats.row_checks import BadRow
from nomic_jax.inference.vectors.made_with import VECTORS, record_in
from nomic_jax.inference.vectors.storage import Folder
from nomic_jax.inference.vectors.stored_types import ranges_of, to_float32
from nomic_jax.inference.vectors.work import MANIFEST

if TYPE_CHECKING:
    import pyarrow as pa

READERS = 16  # threads that read footers, each of which may be a request to a remote store


class StoredVectors:
    """The rows of an output of ``launch.embed``, numbered from 0 in the order of its parts.

    Args:
      place: a .parquet or a folder, by its path or URL.

    Attributes:
      record: what the vectors were made with.
      files: the parts.
      dim: numbers in a vector.
      schema: of the parts.

    Raises:
      ValueError: it is no complete output of ``launch.embed``, or one of before it kept a record.
      FileNotFoundError: nothing is there.
    """

    def __init__(self, place: str | Path):
        self.place = str(place).rstrip("/")
        if not is_local(self.place):
            check_protocols(self.place)
        fs, path = file_system(self.place)
        if not fs.exists(path):
            raise FileNotFoundError(f"{place}: there is no such file or folder")
        self.files = [self.place]
        if fs.isdir(path):
            folder = Folder(self.place)
            try:
                manifest = folder.read_json(MANIFEST)
            except FileNotFoundError:
                raise ValueError(f"{place}: has no {MANIFEST}: nomic-jax embed has not completed it") from None
            self.files = [folder.path(part["name"]) for part in manifest["parts"]]
        self.schema = _schema(self.files[0])
        self.record = record_in(self.schema, self.files[0])
        self.dim = self.schema.field(VECTORS).type.list_size
        self._ranges_2E = ranges_of(self.record)
        with ThreadPoolExecutor(READERS) as pool:
            groups = list(pool.map(_groups, self.files))
        # (file, row group) and the number of the row behind it
        self._groups = [(file, i) for file, counts in zip(self.files, groups) for i in range(len(counts))]
        self._ends = list(itertools.accumulate(itertools.chain(*groups)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @property
    def index_file(self) -> Path:
        """Where an index of the vectors is, if there is one: in a folder, or beside a file."""
        return Path(self.place, "index.faiss") if os.path.isdir(self.place) else Path(f"{self.place}.faiss")

    def known(self, columns: Sequence[str]) -> list[str]:
        """Returns those of the columns that are there."""
        return [name for name in columns if name in self.schema.names and name != VECTORS]

    def batches(self, columns: Sequence[str] = ()) -> Iterator[tuple[int, np.ndarray, "pa.Table"]]:
        """Yields (number of the first row, vectors float32 [n, E], columns) of some thousand rows at a time."""
        for number, end in enumerate(self._ends):
            table = self._read(number, [*columns, VECTORS])
            yield end - len(table), self._float32(table[VECTORS]), table.select(list(columns))

    def columns(self, columns: Sequence[str]) -> Iterator[tuple[int, "pa.Table"]]:
        """Yields (number of the first row, columns) like ``batches``, without reading vectors."""
        for number, end in enumerate(self._ends):
            table = self._read(number, list(columns))
            yield end - len(table), table

    def vectors(self) -> np.ndarray:
        """Returns all vectors, float32 [N, E]."""
        vectors_NE = np.empty((len(self), self.dim), np.float32)
        for first, some_NE, _ in self.batches():
            vectors_NE[first : first + len(some_NE)] = some_NE
        return vectors_NE

    def rows(self, numbers: Sequence[int], columns: Sequence[str]) -> list[dict[str, Any]]:
        """Returns the values of columns of some rows, in their order. A row group is read for each."""
        found: dict[int, dict[str, Any]] = {}
        for row in sorted(set(map(int, numbers))):
            if row in found:
                continue
            group = bisect.bisect_right(self._ends, row)
            table = self._read(group, list(columns))
            first = self._ends[group] - len(table)
            for each in {int(n) for n in numbers if first <= n < self._ends[group]}:
                (found[each],) = table.slice(each - first, 1).to_pylist()
        return [found[int(number)] for number in numbers]

    def some(self, numbers: np.ndarray) -> np.ndarray:
        """Returns the vectors of some rows, float32 [n, E], given their numbers in ascending order."""
        found_NE = []
        ends = np.searchsorted(numbers, self._ends)
        for group, (start, end) in enumerate(itertools.pairwise([0, *ends.tolist()])):
            if end > start:
                table = self._read(group, [VECTORS])
                first = self._ends[group] - len(table)
                found_NE.append(self._float32(table[VECTORS])[numbers[start:end] - first])
        return np.concatenate(found_NE) if found_NE else np.empty((0, self.dim), np.float32)

    def _read(self, number: int, columns: list[str]) -> "pa.Table":
        file, group = self._groups[number]
        with open_parquet(file) as parquet:
            return parquet.read_row_group(group, columns=columns)

    def _float32(self, column: "pa.ChunkedArray") -> np.ndarray:
        stored = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
        return to_float32(stored.reshape(-1, self.dim), self._ranges_2E)


def _schema(file: str) -> "pa.Schema":
    try:
        with open_parquet(file) as parquet:
            schema = parquet.schema_arrow
    except BadRow as error:
        raise ValueError(f"{file}: is no .parquet that can be read ({error})") from error
    if VECTORS not in schema.names:
        raise ValueError(f"{file}: has no column {VECTORS!r}; write the file with nomic-jax embed")
    return schema


def _groups(file: str) -> list[int]:
    with open_parquet(file) as parquet:
        return [parquet.metadata.row_group(i).num_rows for i in range(parquet.metadata.num_row_groups)]

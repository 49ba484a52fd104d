"""Arrays in files, read as they are needed: what is embedded or found once is neither made nor held in memory twice."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import numpy as np

from nomic_jax.data.formats.writing import atomic_file


def save_array(file: Path, array: np.ndarray) -> None:
    """The file appears complete or not at all."""
    with atomic_file(file) as part, part.open("wb") as f:
        np.save(f, array)


def cached_array(file: Path, compute: Callable[[], np.ndarray]) -> np.ndarray:
    """The array in the file, memory-mapped; computed and saved now unless it is there."""
    if not file.exists():
        save_array(file, compute())
    return np.load(file, mmap_mode="r")


class ShardedArray:
    """One array whose rows lie in files of ``per_file`` rows each, memory-mapped.

    Attributes:
      shape, dtype: of the whole.
    """

    def __init__(self, folder: Path, rows: int, per_file: int):
        if rows < 1:
            raise ValueError(f"{folder} would hold no row")
        self.folder, self.per_file = folder, per_file
        self._maps: dict[int, np.ndarray] = {}
        first = self._shard(0)
        self.dtype = first.dtype
        self.shape = (rows, *first.shape[1:])

    @staticmethod
    def file(folder: Path, number: int) -> Path:
        return folder / f"{number:06d}.npy"

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        """A copy of the rows start:stop, or of those numbered in an int array."""
        if isinstance(rows, slice):
            start, stop, step = rows.indices(len(self))
            if step != 1:
                raise ValueError("rows are cut without a step")
            out = np.empty((max(0, stop - start), *self.shape[1:]), self.dtype)
            for number in range(start // self.per_file, -(-stop // self.per_file)):
                offset = number * self.per_file
                low, high = max(start, offset), min(stop, offset + self.per_file)
                out[low - start : high - start] = self._shard(number)[low - offset : high - offset]
            return out
        out = np.empty((len(rows), *self.shape[1:]), self.dtype)
        numbers = rows // self.per_file
        order = np.argsort(numbers, kind="stable")
        ends = np.flatnonzero(np.diff(numbers[order], append=-1)) + 1
        for low, high in zip([0, *ends[:-1].tolist()], ends.tolist()):
            places = order[low:high]
            number = int(numbers[places[0]])
            out[places] = self._shard(number)[rows[places] - number * self.per_file]
        return out

    def _shard(self, number: int) -> np.ndarray:
        if number not in self._maps:
            self._maps[number] = np.load(self.file(self.folder, number), mmap_mode="r")
        return self._maps[number]


Matrix: TypeAlias = np.ndarray | ShardedArray

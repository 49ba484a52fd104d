"""Arrays in files, read on demand, so that results are computed only once and need not stay in memory."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import numpy as np

from nomic_jax.files.writing import atomic_file


def save_array(file: Path, array: np.ndarray) -> None:
    """Saves an array atomically: the file appears complete or not at all."""
    with atomic_file(file) as part, part.open("wb") as f:
        np.save(f, array)


def cached_array(file: Path, compute: Callable[[], np.ndarray]) -> np.ndarray:
    """Returns the array in the file, memory-mapped; computes and saves it first if the file does not exist."""
    if not file.exists():
        save_array(file, compute())
    return np.load(file, mmap_mode="r")


class ShardedArray:
    """An array whose rows are stored in files of ``per_file`` rows each, memory-mapped.

    At most ``most_open`` files are open. A map holds a file open, and a process may open 1,024 by default.

    Attributes:
      shape, dtype: those of the whole array.
    """

    def __init__(self, folder: Path, rows: int, per_file: int, most_open: int = 128):
        if rows < 1:
            raise ValueError(f"{folder}: an array needs at least one row")
        self.folder, self.per_file, self.most_open = folder, per_file, most_open
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
        """Returns a copy of the rows start:stop, or of the rows with the numbers in an int array."""
        if isinstance(rows, slice):
            start, stop, step = rows.indices(len(self))
            if step != 1:
                raise ValueError(f"a slice of rows must have step 1, not {step}")
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
            positions = order[low:high]
            number = int(numbers[positions[0]])
            out[positions] = self._shard(number)[rows[positions] - number * self.per_file]
        return out

    def _shard(self, number: int) -> np.ndarray:
        shard = self._maps.pop(number, None)
        if shard is None:
            if len(self._maps) >= self.most_open:
                del self._maps[next(iter(self._maps))]  # the one that was used the longest time ago
            shard = np.load(self.file(self.folder, number), mmap_mode="r")
        self._maps[number] = shard
        return shard


Matrix: TypeAlias = np.ndarray | ShardedArray

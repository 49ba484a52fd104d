"""Distinct texts: in memory for a block, on disk for a whole input."""

import hashlib
import mmap
from array import array
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from nomic_jax.data.words import text_form
from nomic_jax.files.writing import atomic_file, named_errors, open_new

KEY_BYTES = 16


def text_key(text: str) -> bytes:
    """Returns KEY_BYTES bytes, which are equal for texts of one ``text_form``."""
    return hashlib.blake2b(text_form(text).encode(), digest_size=KEY_BYTES).digest()


def distinct_texts(texts: Iterable[str]) -> tuple[list[str], np.ndarray]:
    """Finds the distinct texts, in order of appearance. Texts of one ``text_form`` are equal.

    Returns:
      The first form of each distinct text, and for every text its index among them, int64 [N].
    """
    index: dict[str, int] = {}
    distinct: list[str] = []
    indices = []
    for text in texts:
        key = text_form(text)
        if key not in index:
            index[key] = len(distinct)
            distinct.append(text)
        indices.append(index[key])
    return distinct, np.array(indices, np.int64)


class TextFile:
    """Texts in a file, read from disk by number on demand."""

    def __init__(self, path: Path):
        self.path = path
        self._ends = np.load(path.with_suffix(".ends.npy"), mmap_mode="r")
        self._bytes: mmap.mmap | bytes = b""
        if len(self) and self._ends[-1]:
            with path.open("rb") as f:
                self._bytes = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)

    def __reduce__(self):
        return TextFile, (self.path,)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, number: int) -> str:
        start = int(self._ends[number - 1]) if number else 0
        return self._bytes[start : int(self._ends[number])].decode()


class TextFileWriter:
    """Writes distinct texts; memory holds about 150 bytes for each text.

    Attributes:
      number_of: key of a text -> number of the text.
    """

    def __init__(self, path: Path):
        self.path = path
        self.number_of: dict[bytes, int] = {}
        self._ends = array("q")
        self._file = open_new(path)

    def add(self, text: str) -> int:
        """Adds a text unless an equal one (by ``text_form``) exists; returns the number of the text."""
        key = text_key(text)
        if key not in self.number_of:
            self.number_of[key] = len(self.number_of)
            with named_errors(self.path):
                self._file.write(text.encode())
            self._ends.append(self._file.tell())
        return self.number_of[key]

    def close(self) -> None:
        with named_errors(self.path):
            self._file.close()
        with atomic_file(self.path.with_suffix(".ends.npy")) as part, part.open("wb") as f:
            np.save(f, np.frombuffer(self._ends, np.int64))

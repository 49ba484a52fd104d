"""Distinct texts: in memory for a block, on disk for a whole input."""

import hashlib
import mmap
from array import array
from collections.abc import Iterable
from pathlib import Path

import numpy as np


def text_key(text: str) -> bytes:
    """16 bytes that are equal for texts which differ in surrounding whitespace only."""
    return hashlib.blake2b(text.strip().encode(), digest_size=16).digest()


def distinct_texts(texts: Iterable[str]) -> tuple[list[str], np.ndarray]:
    """Texts that differ in more than surrounding whitespace, in order of appearance, and each text's place there.

    Returns:
      The first form met of each, and int64 [N] indices into them.
    """
    place: dict[str, int] = {}
    distinct: list[str] = []
    places = []
    for text in texts:
        key = text.strip()
        if key not in place:
            place[key] = len(distinct)
            distinct.append(text)
        places.append(place[key])
    return distinct, np.array(places, np.int64)


class TextFile:
    """Texts in a file, by number, read from disk as they are asked for."""

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
    """Writes distinct texts; memory holds about 150 bytes for each of them.

    Attributes:
      place: key of a text -> its number.
    """

    def __init__(self, path: Path):
        self.path = path
        self.place: dict[bytes, int] = {}
        self._ends = array("q")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("wb")

    def add(self, text: str) -> int:
        """Its number: that of the first text it equals up to surrounding whitespace."""
        key = text_key(text)
        if key not in self.place:
            self.place[key] = len(self.place)
            self._file.write(text.encode())
            self._ends.append(self._file.tell())
        return self.place[key]

    def close(self) -> None:
        self._file.close()
        np.save(self.path.with_suffix(".ends.npy"), np.frombuffer(self._ends, np.int64))

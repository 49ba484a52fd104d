"""What cleaning has to know of each row by itself. Any process may compute it, block by block.

A block is a span of an input file. It becomes a .npz in work/<settings>/, which other settings do not find.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from nomic_jax.curate.clean.contamination import shared_runs
from nomic_jax.curate.clean.duplicates import Compared, Signer, bands_and_rows
from nomic_jax.curate.clean.repeated import is_among, repeated_values
from nomic_jax.curate.engine.row_blocks import AlreadyRejected
from nomic_jax.curate.engine.sharded_array import cached_array
from nomic_jax.curate.engine.text_store import KEY_BYTES, text_key
from nomic_jax.data.formats.file_format import Mark, Scan
from nomic_jax.data.formats.reading import open_file, usable_rows
from nomic_jax.data.formats.row_checks import RejectedRows
from nomic_jax.data.words import WORDS_VERSION, words_of
from nomic_jax.files.writing import atomic_file
from nomic_jax.jobs.tasks import Task

if TYPE_CHECKING:
    from nomic_jax.curate.clean.cleaning import CleaningOptions

_REASONS = ("", "empty", "short")
VALUES_AT_ONCE = 1 << 28  # of 8 bytes, which are in memory to find those that are repeated


class Repeated(NamedTuple):
    """What several rows share. All else need not be kept in memory to be compared.

    Attributes:
      keys: beginnings of the keys of equal rows, sorted uint64; None if equal rows are not searched.
      bands: for each band of the signatures, its keys, sorted uint64.
    """

    keys: np.ndarray | None
    bands: list[np.ndarray]


class Batch(Protocol):
    """Consecutive rows, and what is known of each of them."""

    rows: Sequence[dict[str, Any]]

    def first(self, place: int) -> tuple[str, bytes]:
        """Returns "empty", "short" or "", and a key that rows with equal texts share; b"" if no other row has it."""
        ...

    def compared(self, places: Sequence[int]) -> Compared:
        """Returns what ``NearDuplicates`` compares of these rows, which are neither empty nor short."""
        ...

    def shared(self, place: int) -> Sequence[int]:
        """Returns the runs of words that a row, neither empty nor short, shares with the evaluation texts."""
        ...


class Describer:
    """Computes what is known of a row.

    Attributes:
      runs: those of the evaluation texts, sorted int64.
      file: where they are stored, for other processes; None: they are copied to them.
    """

    def __init__(self, columns: Sequence[str], options: "CleaningOptions", runs: np.ndarray | Path):
        self.columns, self.options = tuple(columns), options
        self.runs = np.load(runs, mmap_mode="r") if isinstance(runs, Path) else runs
        self.file = runs if isinstance(runs, Path) else None
        self._signer = None if options.near is None else Signer(options.near)

    def __reduce__(self):
        # A function of rensa cannot be pickled, and the runs are large.
        return Describer, (self.columns, self.options, self.runs if self.file is None else self.file)

    def first(self, row: Mapping[str, Any]) -> tuple[str, bytes]:
        texts, options = [row[column].strip() for column in self.columns], self.options
        if not all(texts):
            return "empty", b""
        if any(len(text) < options.min_chars or len(words_of(text)) < options.min_words for text in texts):
            return "short", b""
        return "", text_key("\0".join(texts)) if options.exact else b""

    def compared(self, rows: Sequence[Mapping[str, Any]]) -> Compared:
        assert self._signer is not None
        return self._signer([[row[column] for column in self.options.near_columns or self.columns] for row in rows])

    def shared(self, row: Mapping[str, Any]) -> list[int]:
        return shared_runs((row[column] for column in self.columns), self.runs, self.options.ngram)

    @property
    def settings(self) -> dict[str, Any]:
        """What the descriptions depend on, besides the rows."""
        options = self.options
        return {
            "columns": list(self.columns),
            "min_words": options.min_words,
            "min_chars": options.min_chars,
            "exact": options.exact,
            "near": options.near,
            "near_columns": list(options.near_columns),
            "ngram": options.ngram,
            "evaluation": hashlib.sha256(self.runs.tobytes()).hexdigest(),
            "words_version": WORDS_VERSION,
        }


class NewBatch:
    """A ``Batch`` whose rows are described when that is needed."""

    def __init__(self, rows: Sequence[dict[str, Any]], describer: Describer):
        self.rows, self.describer = rows, describer

    def first(self, place: int) -> tuple[str, bytes]:
        return self.describer.first(self.rows[place])

    def compared(self, places: Sequence[int]) -> Compared:
        return self.describer.compared([self.rows[place] for place in places])

    def shared(self, place: int) -> list[int]:
        return self.describer.shared(self.rows[place])


class StoredBatch:
    """A ``Batch`` whose rows were described before."""

    def __init__(self, rows: Sequence[dict[str, Any]], file: Path, repeated: Repeated):
        self.rows = rows
        with np.load(file) as arrays:
            self._arrays = dict(arrays)
        if len(self._arrays["reason"]) != len(rows):
            raise ValueError(
                f"{file} describes {len(self._arrays['reason'])} rows where there are {len(rows)}: the input has "
                f"changed since; run the command again"
            )
        known, keys = repeated.keys, self._arrays["key"]
        self._has_key = np.zeros(len(rows), bool) if known is None else is_among(keys[:, 0], known)
        self._number = np.cumsum(self._arrays["reason"] == 0) - 1  # of a row among those that are described

    def first(self, place: int) -> tuple[str, bytes]:
        key = self._arrays["key"][place].tobytes() if self._has_key[place] else b""
        return _REASONS[self._arrays["reason"][place]], key

    def compared(self, places: Sequence[int]) -> Compared:
        numbers = self._number[np.asarray(places, np.int64)]
        runs, ends = self._arrays["runs"], self._arrays["runs_end"]
        of_rows = [[runs[start:end] for start, end in itertools.pairwise(ends[number].tolist())] for number in numbers]
        return Compared(self._arrays["signatures"][numbers], self._arrays["keys"][numbers], of_rows)

    def shared(self, place: int) -> list[int]:
        number, ends = self._number[place], self._arrays["shared_end"]
        return self._arrays["shared"][ends[number] : ends[number + 1]].tolist()


class Rows(NamedTuple):
    """A block: the rows of a file from ``mark`` to before ``stop``."""

    file: str
    sha256: str
    mark: Mark
    stop: int

    def read(self, columns: Sequence[str], on_bad_row: str, rejected: RejectedRows) -> Iterator[dict[str, Any]]:
        checked = dict.fromkeys(columns, str)
        numbered = open_file(self.file, checked, None, [self.mark]).numbered(self.mark.row, self.stop)
        return usable_rows(numbered, checked, None, True, on_bad_row, rejected)


def blocks_of_file(file: str, scan: Scan) -> list[Rows]:
    """Returns the blocks of a file; none if it is broken."""
    starts = () if scan.broken else scan.marks
    stops = [*(mark.row for mark in starts[1:]), scan.rows]
    return [Rows(file, scan.sha256, mark, stop) for mark, stop in zip(starts, stops)]


class DescribingTask(Task):
    """The task that describes the rows of all blocks."""

    unit = " rows"

    def __init__(self, blocks: Sequence[Rows], describer: Describer, work: Path, on_bad_row: str, progress: bool):
        self.label, self.progress = "describing rows", progress
        self.blocks, self.describer, self.work, self.on_bad_row = blocks, describer, work, on_bad_row
        common = {**describer.settings, "on_bad_row": on_bad_row}
        self.folder = work / hashlib.sha256(json.dumps(common, sort_keys=True).encode()).hexdigest()[:16]
        describer.file = self.folder / "runs.npy"
        cached_array(describer.file, lambda: describer.runs)
        files = dict.fromkeys((block.file, block.sha256) for block in blocks)
        self._settings = common | {f"file {i}: {Path(name).name}": sha256 for i, (name, sha256) in enumerate(files, 1)}

    def __len__(self) -> int:
        return len(self.blocks)

    def file(self, block: int) -> Path:
        rows = self.blocks[block]
        return self.folder / f"{rows.sha256[:32]}-{rows.mark.row}-{rows.stop}.npz"

    def size(self, block: int) -> int:
        return self.blocks[block].stop - self.blocks[block].mark.row

    @property
    def records(self) -> Path:
        return self.work / "shards"

    def settings(self) -> Mapping[str, Any]:
        return self._settings

    def write(self, block: int, worker: Any, advance: Callable[[int], Any]) -> None:
        rows = list(self.read(block, AlreadyRejected()))
        batch = NewBatch(rows, self.describer)
        found = [batch.first(place) for place in range(len(rows))]
        reasons = np.array([_REASONS.index(reason) for reason, _ in found], np.uint8)
        places = np.flatnonzero(reasons == 0).tolist()
        keys = b"".join(key or bytes(KEY_BYTES) for _, key in found)
        shared = [batch.shared(place) for place in places]
        arrays: dict[str, Any] = {
            "reason": reasons,
            "key": np.frombuffer(keys, np.uint64).reshape(len(rows), -1),
            "shared": np.array([*itertools.chain(*shared)], np.int64),
            "shared_end": np.cumsum([0, *map(len, shared)]),
        }
        if self.describer.options.near is not None:
            signatures, keys_of_bands, runs = batch.compared(places)
            flat, columns = [own for row in runs for own in row], len(runs[0]) if runs else 1
            ends = np.cumsum([0, *map(len, flat)])
            arrays |= {
                "signatures": signatures,
                "keys": keys_of_bands,
                "runs": np.concatenate([np.zeros(0, np.int64), *flat]),
                "runs_end": ends[np.arange(len(runs))[:, None] * columns + np.arange(columns + 1)],
            }
        with atomic_file(self.file(block)) as part, part.open("wb") as f:
            np.savez(f, **arrays)

    def repeated(self) -> Repeated:
        """Returns what several rows share, once all blocks are described."""
        options, most = self.describer.options, sum(map(self.size, range(len(self))))
        keys: list[np.ndarray] = []
        if options.exact:
            keys = repeated_values(self._stored("key", slice(0, 1)), 1, most)
        bands: list[np.ndarray] = []
        if options.near is not None:
            count = bands_and_rows(options.near)[0]
            at_once = max(1, VALUES_AT_ONCE // max(1, most))
            for start in range(0, count, at_once):
                columns = slice(start, min(start + at_once, count))
                bands += repeated_values(self._stored("keys", columns), columns.stop - columns.start, most)
        return Repeated(keys[0] if keys else None, bands)

    def _stored(self, name: str, columns: slice) -> Iterator[np.ndarray]:
        for block in range(len(self)):
            with np.load(self.file(block)) as arrays:
                yield arrays[name][:, columns]

    def read(self, block: int, rejected: RejectedRows) -> Iterator[dict[str, Any]]:
        return self.blocks[block].read(self.describer.columns, self.on_bad_row, rejected)

"""Blocks of numbered input rows, so that workers can share an input without copying it."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nomic_jax.data.formats.paths import expand_files
from nomic_jax.data.formats.reading import RowCheck, is_readable, open_file, usable_rows
from nomic_jax.data.formats.row_checks import AlreadyRejected, Quarantined, RejectedRows
from nomic_jax.files.writing import write_json

QUARANTINED = "quarantined.json"  # in the work folder


def readable_files(
    files: str | list[str],
    columns: Mapping[str, type],
    on_bad_row: str,
    rejected: RejectedRows,
    *,
    progress: bool = True,
) -> list[str]:
    """Returns the files; with on_bad_row="skip", files that cannot be read to their end go to ``rejected`` instead."""
    with tqdm(
        expand_files(files), "checking files", unit=" files", disable=not progress or on_bad_row == "raise"
    ) as bar:
        return [file for file in bar if is_readable(file, columns, None, on_bad_row, rejected)]


def read_file(
    file: str,
    columns: Mapping[str, type],
    on_bad_row: str,
    rejected: RejectedRows,
    *,
    others: tuple[str, ...] | None = None,
    further_check: RowCheck = lambda row, where: None,
) -> Iterator[dict[str, Any]]:
    """Yields the rows of one of ``readable_files``, like ``read_rows``."""
    numbered = open_file(file, columns, others).numbered()
    return usable_rows(numbered, columns, others, False, on_bad_row, rejected, further_check)


def read_quarantined(work: Path) -> list[Quarantined]:
    """Returns the files that were set aside when the work began."""
    file = work / QUARANTINED
    return [Quarantined(**entry) for entry in json.loads(file.read_text(encoding="utf-8"))] if file.exists() else []


def write_quarantined(work: Path, quarantined: list[Quarantined]) -> None:
    if quarantined:
        write_json(work / QUARANTINED, [entry._asdict() for entry in quarantined])
    else:
        (work / QUARANTINED).unlink(missing_ok=True)


class CountedRows:
    """The usable rows of several files, numbered consecutively from 0.

    Attributes:
      counts: {file: number of usable rows}, in order.
      rejected: number of skipped rows and of files that were set aside.
      quarantined: the files that were set aside; their counts are 0.
    """

    def __init__(
        self,
        counts: Mapping[str, int],
        rejected: int,
        columns: Mapping[str, type],
        quarantined: Sequence[Quarantined] = (),
    ):
        self.counts, self.rejected, self.columns = dict(counts), rejected, dict(columns)
        self.quarantined = list(quarantined)
        self._open: Iterator[dict[str, Any]] = iter(())
        self._at = -1  # number of the next row of _open; -1 if no file is open

    def __len__(self) -> int:
        return sum(self.counts.values())

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": iter(()), "_at": -1}

    def read(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yields (file, row) for every row, with all its columns."""
        for file in self.counts:
            for row in self._read_file(file, None):
                yield file, row

    def block(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        """Yields the rows start ... stop - 1, with the checked columns only.

        Calls with ascending numbers read every file once. A call that goes back reads its file again from the start.

        Raises:
          ValueError: a file does not have the number of rows that was counted.
        """
        files, first = self._file_of(start)
        if not first <= self._at <= start:
            self._open, self._at = (row for file in files for row in self._read_file(file, ())), first
        for row in self._open:
            self._at += 1
            if self._at > start:
                yield row
            if self._at == stop:
                return

    def _file_of(self, number: int) -> tuple[list[str], int]:
        """Returns the file that holds the row and all files after it, and the number of the first row of that file."""
        start, files = 0, list(self.counts)
        for i, file in enumerate(files):
            if start + self.counts[file] > number:
                return files[i:], start
            start += self.counts[file]
        raise IndexError(number)

    def _read_file(self, file: str, others: tuple[str, ...] | None) -> Iterator[dict[str, Any]]:
        count = 0
        if not self.counts[file]:
            return
        for row in read_file(file, self.columns, "skip", AlreadyRejected(), others=others):
            count += 1
            if count <= self.counts[file]:
                yield row
        if count != self.counts[file]:
            raise ValueError(
                f"{file} has {count} rows where {self.counts[file]} were counted: the file has changed since"
            )


def count_rows(
    files: str | list[str],
    columns: Mapping[str, type],
    record: Path,
    side_file: Path,
    *,
    on_bad_row: str,
    progress: bool = True,
) -> CountedRows:
    """Counts the usable rows before anything is embedded, to find bad rows early. Saves the counts in ``record``.

    Files that were set aside are listed in QUARANTINED, in the folder of ``record``.

    Raises:
      BadRow: see ``read_rows``.
      ValueError: there is no usable row.
    """
    if record.exists():
        held = json.loads(record.read_text(encoding="utf-8"))
        if on_bad_row == "skip" or not held["rejected"]:
            counts = dict(zip(expand_files(files), held["rows"]))
            return CountedRows(counts, held["rejected"], columns, read_quarantined(record.parent))
    rejected = RejectedRows(side_file)
    counts = dict.fromkeys(expand_files(files), 0)
    readable = readable_files(files, columns, on_bad_row, rejected, progress=progress)
    with tqdm(desc="reading", unit=" rows", disable=not progress) as bar:
        for file in readable:
            for _ in read_file(file, columns, on_bad_row, rejected, others=()):
                counts[file] += 1
                bar.update()
    if not any(counts.values()):
        raise no_usable_row(files, rejected)
    write_quarantined(record.parent, rejected.quarantined)
    write_json(record, {"rows": list(counts.values()), "rejected": rejected.count})
    return CountedRows(counts, rejected.count, columns, rejected.quarantined)


def no_usable_row(files: str | list[str], rejected: RejectedRows) -> ValueError:
    files = files if isinstance(files, str) else ", ".join(files[:3])
    reasons = "".join(f"; {entry}" for entry in rejected.quarantined[:3])
    return ValueError(
        f"{files} has no usable row; {rejected.count} rejected rows and files are in {rejected.side_file}{reasons}"
    )


def equal_blocks(rows: int, block_size: int) -> list[tuple[int, int]]:
    """Returns (start, stop) of the fewest blocks that ``block_size`` allows, with sizes that differ by at most one."""
    count = -(-rows // block_size)
    return [(rows * i // count, rows * (i + 1) // count) for i in range(count)]

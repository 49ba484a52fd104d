"""Reads ArrayRecord files that TensorFlow Datasets prepared, without TensorFlow."""

import functools
import os
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nomic_jax.data.formats.file_format import FileRows, Scan, marks_of_sizes, sha256_of_file, unreadable_as_bad_row
from nomic_jax.data.formats.row_checks import BadRow, RawRow
from nomic_jax.extras import needs
from nomic_jax.files.reading import FileRefused, check_regular, read_json

ROWS_AT_ONCE = 1024  # decoded in one call
_CLASS = re.compile(r"tensorflow_datasets\.core\.features\.[\w.]+")


class ArrayRecordRows(FileRows):
    """The rows of an ArrayRecord file; see ``FileRows``. ``features.json`` beside the file defines the fields."""

    def __init__(self, file: str, columns: Mapping[str, type], others: Collection[str] | None = None):
        super().__init__(file, columns, others)
        self._features = _features(os.path.dirname(file))
        for column in (*columns, *(others or ())):
            if column not in self._features:
                names = ", ".join(map(repr, sorted(self._features)))
                raise BadRow(f"{file}: no column {column!r}; the data set has {names}")

    @functools.cached_property
    def _records(self) -> Any:
        with needs("reading ArrayRecord files", "nomic_jax[data]"):
            from array_record.python.array_record_data_source import ArrayRecordDataSource

        with unreadable_as_bad_row(self.file):
            check_regular(self.file)
        try:
            return ArrayRecordDataSource([self.file])
        except (ValueError, OSError, RuntimeError) as error:
            raise BadRow(f"{self.file}: not a readable ArrayRecord file ({error}); prepare it again") from error

    def __len__(self) -> int:
        return len(self._records)

    def numbered(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[str, RawRow]]:
        stop = len(self) if stop is None else min(stop, len(self))
        for first in range(start, stop, ROWS_AT_ONCE):
            numbers = range(first, min(first + ROWS_AT_ONCE, stop))
            for number, record in zip(numbers, self._read(numbers)):
                where = f"{self.file}: row {number} (counted from 0)"
                try:
                    row = self._features.deserialize_example_np(record)
                except Exception as error:  # protobuf raises several types
                    raise BadRow(f"{where}: not a record of this data set ({error})") from error
                names = row if self.decoded_columns is None else self.decoded_columns
                yield where, {name: _python_value(row[name]) for name in names}

    def scan(self, span_bytes: int) -> Scan:
        size = os.path.getsize(self.file) / max(1, len(self))
        groups = ((min(ROWS_AT_ONCE, len(self) - i), ROWS_AT_ONCE * size) for i in range(0, len(self), ROWS_AT_ONCE))
        rows, marks = marks_of_sizes(((count, int(held)) for count, held in groups), span_bytes)
        broken = ""
        try:
            for first in range(0, rows, ROWS_AT_ONCE):
                self._read(range(first, min(first + ROWS_AT_ONCE, rows)))
        except BadRow as error:
            broken = str(error)
        return Scan(sha256_of_file(self.file), rows, marks, broken=broken)

    def _read(self, numbers: range) -> list[bytes]:
        try:
            return self._records.__getitems__(numbers)
        except (ValueError, OSError, RuntimeError) as error:
            raise BadRow(f"{self.file}: broken between the rows {numbers[0]} and {numbers[-1]} ({error})") from error


def is_array_record(file: str) -> bool:
    return re.search(r"\.array_record(-\d+-of-\d+)?$", file) is not None


@functools.lru_cache(maxsize=16)
def _features(directory: str) -> Any:
    with needs("reading ArrayRecord files", "nomic_jax[data]"):
        import tensorflow_datasets as tfds

    file = Path(directory) / "features.json"
    try:
        content = read_features(file)
    except (OSError, FileRefused) as error:
        reason = str(error).removeprefix(f"{file}: ")
        raise BadRow(f"{file}: cannot be read ({reason}); prepare the data set again") from error
    try:
        return tfds.features.FeatureConnector.from_json(content)
    except Exception as error:  # protobuf raises several types
        raise BadRow(f"{file}: cannot be used ({error}); prepare the data set again") from error


def read_features(file: Path) -> Any:
    """Returns the content of a features.json.

    Raises:
      FileRefused, OSError: it cannot be read, or is a link out of its folder.
      BadRow: it names a class of another package, which TensorFlow Datasets would import.
    """
    content = read_json(file, within=file.parent)
    pending = [content]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            named = (value.get(key) for key in ("pythonClassName", "python_class_name", "type"))
            if foreign := [x for x in named if isinstance(x, str) and "." in x and not _CLASS.fullmatch(x)]:
                raise BadRow(f"{file} names the class {foreign[0]!r}, which is not part of tensorflow_datasets")
        if isinstance(value, dict | list):
            pending += value.values() if isinstance(value, dict) else value
    return content


def _python_value(value: Any) -> Any:
    """Converts numpy values to Python values. Texts become str; a text that is not UTF-8 stays bytes."""
    if isinstance(value, np.ndarray | list | tuple):
        return [_python_value(item) for item in value]
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return value
    return value.item() if isinstance(value, np.generic) else value

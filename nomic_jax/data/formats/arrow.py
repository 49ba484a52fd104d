"""Reads Arrow files as Hugging Face ``datasets`` writes them; also has the helpers of all columnar formats."""

import functools
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from nomic_jax.data.formats.file_format import FileRows, Scan, marks_of_sizes, sha256_of_file, unreadable_as_bad_row
from nomic_jax.data.formats.file_systems import file_system, open_stored
from nomic_jax.data.formats.row_checks import BadRow, RawRow, listed
from nomic_jax.data.formats.sizes import bounded_slices, check_buffer_sizes
from nomic_jax.extras import needs

if TYPE_CHECKING:  # imported where used: most commands read only jsonl
    import pyarrow as pa


_END = b"\xff\xff\xff\xff\0\0\0\0"  # end mark of a stream


class ArrowRows(FileRows):
    """The rows of an Arrow file; see ``FileRows``. Local files are memory-mapped."""

    def __len__(self) -> int:
        return sum(len(batch) for batch in self._batches())

    def numbered(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[str, RawRow]]:
        yield from numbered_rows(self.file, self._batches(), start, stop, self.decoded_columns)

    def scan(self, span_bytes: int) -> Scan:
        sizes: list[tuple[int, int]] = []
        broken = ""
        try:
            for batch in self._batches():
                sizes.append((len(batch), batch.get_total_buffer_size()))
                chosen = batch if self.decoded_columns is None else batch.select(self.decoded_columns)
                self._check(chosen)
                for _ in bounded_slices(chosen, self.file, sum(rows for rows, _ in sizes[:-1])):
                    pass
        except BadRow as error:
            broken = str(error)
        rows, marks = marks_of_sizes(iter(sizes), span_bytes)
        return Scan(sha256_of_file(self.file), rows, marks, broken=broken)

    def _check(self, batch: "pa.RecordBatch") -> None:
        import pyarrow as pa

        try:
            check_buffers(batch)
        except pa.ArrowInvalid as error:
            raise self._broken(error) from error

    def _batches(self) -> Iterable["pa.RecordBatch"]:
        with needs(f"reading {self.file}", "nomic_jax[data]"):
            import pyarrow  # noqa: F401
        fs, _ = file_system(self.file)
        return self._mapped if "file" in fs.protocol else self._streamed()

    @functools.cached_property
    def _mapped(self) -> list["pa.RecordBatch"]:
        """The batches of a local file; values are read from the file on access."""
        import pyarrow as pa

        try:
            _, path = file_system(self.file)
            with unreadable_as_bad_row(self.file), open_stored(self.file) as f:
                if os.fstat(f.fileno()).st_size == 0:
                    raise BadRow(f"{self.file}: the file is empty; write or fetch it again")
            mapped = pa.memory_map(path)
            check_buffer_sizes(mapped, self.file)
            return list(self._read(mapped))
        except (pa.ArrowException, OSError) as error:
            raise self._broken(error) from error

    def _streamed(self) -> Iterator["pa.RecordBatch"]:
        import pyarrow as pa

        try:
            with open_stored(self.file) as f:
                yield from self._read(pa.PythonFile(f, "r"))
        except (pa.ArrowException, OSError) as error:
            raise self._broken(error) from error

    def _read(self, f: "pa.NativeFile") -> Iterator["pa.RecordBatch"]:
        import pyarrow as pa

        try:
            reader = pa.ipc.open_stream(f)
        except pa.ArrowInvalid:  # not a stream: Arrow's file format
            f.seek(0)
            file_reader = pa.ipc.open_file(f)
            check_schema(file_reader.schema, self.columns, self.others or (), self.file)
            for i in range(file_reader.num_record_batches):
                yield file_reader.get_batch(i)
        else:
            check_schema(reader.schema, self.columns, self.others or (), self.file)
            yield from reader
            # A stream that was cut between two batches lacks only the end mark.
            f.seek(max(0, f.size() - len(_END)))
            if f.read() != _END:
                raise pa.ArrowInvalid("the file is truncated: there is no end mark")

    def _broken(self, error: Exception) -> BadRow:
        return BadRow(f"{self.file}: not a readable Arrow file ({error}); write or fetch it again")


def numbered_rows(
    file: str,
    batches: Iterable["pa.RecordBatch"],
    start: int,
    stop: int | None,
    decoded_columns: list[str] | None,
    first: int = 0,
) -> Iterator[tuple[str, RawRow]]:
    """Yields the rows start ... stop - 1 of batches; the first batch starts at row ``first`` of the file."""
    import pyarrow as pa

    for batch in batches:
        if stop is not None and first >= stop:
            return
        skipped = max(0, start - first)
        end = len(batch) if stop is None else min(len(batch), stop - first)
        if skipped < end:
            chosen = batch.slice(skipped, end - skipped)
            if decoded_columns is not None:
                chosen = chosen.select(decoded_columns)
            try:
                check_buffers(chosen)
            except pa.ArrowInvalid as error:
                rows = f"{first + skipped} and {first + end - 1} (counted from 0)"
                raise BadRow(f"{file}: broken between the rows {rows} ({error}); write or fetch it again") from error
            number = first + skipped
            for part in bounded_slices(chosen, file, number):
                for row in _python_rows(part):
                    yield f"{file}: row {number} (counted from 0)", row
                    number += 1
        first += len(batch)


def check_schema(schema: "pa.Schema", columns: Mapping[str, type], others: Collection[str], file: str) -> None:
    """Raises BadRow unless the file has the columns and they hold texts or lists of texts."""
    for column in (*columns, *others):
        if column not in schema.names:
            raise BadRow(f"{file}: no column {column!r}; the file has {listed(schema.names)}")
    for column, kind in columns.items():
        found = schema.field(column).type
        if not _holds_texts(found, kind):
            expected = "lists of texts" if kind is list else "text"
            raise BadRow(f"{file}: column {column!r} should hold {expected}, found the type {found}")


def _holds_texts(found: "pa.DataType", kind: type) -> bool:
    from pyarrow import types

    if types.is_null(found):  # the check of each row gives a better message
        return True
    if kind is list:
        lists = (types.is_list, types.is_large_list, types.is_fixed_size_list, types.is_list_view)
        if any(is_list(found) for is_list in lists):
            return _holds_texts(found.value_type, str)
    if types.is_dictionary(found):
        found = found.value_type
    return types.is_string(found) or types.is_large_string(found) or types.is_string_view(found)


def check_buffers(batch: "pa.RecordBatch") -> None:
    """Raises ArrowInvalid if a value refers to memory outside its buffer; pyarrow would read it unchecked."""
    for column in batch.columns:
        # Texts are viewed as bytes: invalid UTF-8 is a fault of its row, not of the file.
        column.view(_as_bytes(column.type)).validate(full=True)


def _as_bytes(kind: "pa.DataType") -> "pa.DataType":
    import pyarrow as pa
    from pyarrow import types

    if types.is_string(kind):
        return pa.binary()
    if types.is_large_string(kind):
        return pa.large_binary()
    if types.is_list(kind):
        return pa.list_(_as_bytes(kind.value_type))
    if types.is_large_list(kind):
        return pa.large_list(_as_bytes(kind.value_type))
    return kind


def _python_rows(batch: "pa.RecordBatch") -> list[dict[str, Any]]:
    """Returns the rows with Python values; a text that is not UTF-8 stays bytes."""

    def value(scalar):
        try:
            return scalar.as_py()
        except UnicodeDecodeError as error:
            return error.object

    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        return [dict(zip(batch.schema.names, map(value, scalars))) for scalars in zip(*batch.columns)]

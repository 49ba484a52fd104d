"""Reads parquet files."""

import contextlib
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING

from nomic_jax.data.formats.arrow import check_buffers, check_schema, numbered_rows
from nomic_jax.data.formats.file_format import (
    FileRows,
    Mark,
    Scan,
    marks_of_sizes,
    max_row_bytes,
    sha256_of_file,
    too_large,
    unreadable_as_bad_row,
)
from nomic_jax.data.formats.file_systems import open_stored
from nomic_jax.data.formats.row_checks import BadRow, RawRow
from nomic_jax.data.formats.sizes import BATCH_BYTES, bounded_slices
from nomic_jax.extras import needs

if TYPE_CHECKING:  # imported where used: most commands read only jsonl
    import pyarrow as pa
    import pyarrow.parquet as pq

ROWS_AT_ONCE = 1024  # decoded in one call
SMALL = 1 << 28  # unpacked bytes of a column of a row group, up to which it may be compressed to any size
MOST_COMPRESSED = 1000  # times; texts are compressed to a tenth, and gzip reaches this on zeros
MOST_VALUES = 1 << 28  # of a column of a row group


class ParquetRows(FileRows):
    """The rows of a parquet file; see ``FileRows``. Random access decodes a row group up to the row."""

    def __len__(self) -> int:
        return read_parquet_footer(self.file, self.columns, self.others or ())[0]

    def numbered(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[str, RawRow]]:
        with open_parquet(self.file) as parquet:
            check_schema(parquet.schema_arrow, self.columns, self.others or (), self.file)
            first, group = 0, 0
            while group < parquet.num_row_groups and first + parquet.metadata.row_group(group).num_rows <= start:
                first += parquet.metadata.row_group(group).num_rows
                group += 1
            groups = list(range(group, parquet.num_row_groups))
            expected = parquet.metadata.num_rows - first
            batches = self._batches(parquet, groups, expected)
            yield from numbered_rows(self.file, batches, start, stop, None, first)

    def _batches(self, parquet: "pq.ParquetFile", groups: list[int], expected: int) -> Iterator["pa.RecordBatch"]:
        """Yields the batches. Raises BadRow unless they have the number of rows that the footer gives."""
        rows = 0
        for group in groups:
            rows_at_once, names = self._plan(parquet, group)
            with open_parquet(self.file, names) if names else contextlib.nullcontext(parquet) as opened:
                for batch in opened.iter_batches(rows_at_once, row_groups=[group], columns=self.decoded_columns):
                    rows += len(batch)
                    yield batch
        if rows != expected and self.decoded_columns != []:
            raise BadRow(f"{self.file}: its footer says {expected:,} rows, its columns hold {rows:,}; write it again")

    def _plan(self, parquet: "pq.ParquetFile", group: int) -> tuple[int, list[str]]:
        """Returns how many rows of a row group to unpack at a time, and the columns to read without repeating values.

        A dictionary holds a value once, however many rows have it. So the longest value is looked up there.

        Raises:
          BadRow: a column of the row group is out of bounds.
        """
        footer = parquet.metadata.row_group(group)
        chunks = [footer.column(i) for i in range(footer.num_columns)]
        if self.decoded_columns is not None:
            chunks = [chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] in self.decoded_columns]
        row_bytes, lists = 1, []
        for chunk in chunks:
            size, values = chunk.total_uncompressed_size, max(1, chunk.num_values)
            where = f"{self.file}: column {chunk.path_in_schema!r} of row group {group}"
            if size > SMALL and size > MOST_COMPRESSED * max(1, chunk.total_compressed_size):
                packed = chunk.total_compressed_size
                raise BadRow(f"{where}: {packed:,} bytes that unpack to {size:,} are no texts; write it again")
            if values > MOST_VALUES:
                raise BadRow(f"{where}: {values:,} values; write row groups of at most {MOST_VALUES:,}")
            if size // values > max_row_bytes():
                raise too_large(f"{where}: a value")
            longest = size // values
            if chunk.has_dictionary_page and chunk.physical_type == "BYTE_ARRAY" and size * values > BATCH_BYTES:
                longest = max(longest, self._longest_in_dictionary(chunk.path_in_schema, group) or size)
                if longest > max_row_bytes():
                    raise too_large(f"{where}: a value")
                if "." in chunk.path_in_schema and longest * values > BATCH_BYTES:
                    lists.append(chunk.path_in_schema)
                    longest = 8
            row_bytes += longest * -(-values // max(1, footer.num_rows))
        return max(1, min(ROWS_AT_ONCE, BATCH_BYTES // row_bytes)), lists

    def _longest_in_dictionary(self, path: str, group: int) -> int:
        import pyarrow.compute as pc
        from pyarrow import types

        with open_parquet(self.file, [path]) as parquet:
            for batch in parquet.iter_batches(1, row_groups=[group], columns=[path]):
                array = batch.column(0)
                while types.is_list(array.type) or types.is_large_list(array.type) or types.is_struct(array.type):
                    array = array.field(0) if types.is_struct(array.type) else array.values
                return pc.max(pc.binary_length(array.dictionary)).as_py() or 0 if types.is_dictionary(array.type) else 0
        return 0

    def scan(self, span_bytes: int) -> Scan:
        rows, broken = 0, ""
        marks: tuple[Mark, ...] = ()
        try:
            with open_parquet(self.file) as parquet:
                groups = [parquet.metadata.row_group(i) for i in range(parquet.num_row_groups)]
                rows, marks = marks_of_sizes(((group.num_rows, group.total_byte_size) for group in groups), span_bytes)
                check_schema(parquet.schema_arrow, self.columns, self.others or (), self.file)
                first = 0
                for batch in self._batches(parquet, list(range(len(groups))), rows):
                    check_buffers(batch)
                    for _ in bounded_slices(batch, self.file, first):
                        pass
                    first += len(batch)
        except BadRow as error:
            broken = str(error)
        return Scan(sha256_of_file(self.file), rows, marks, broken=broken)


@contextlib.contextmanager
def open_parquet(file: str, dictionaries: Collection[str] = ()) -> Iterator["pq.ParquetFile"]:
    """Yields the open file. Errors of pyarrow, on opening or while reading, become a BadRow that names the file.

    Args:
      dictionaries: columns to read as dictionary arrays, in which a repeated value is in memory once.
    """
    with needs(f"reading {file}", "nomic_jax[data]"):
        import pyarrow as pa
        import pyarrow.parquet as pq

    with unreadable_as_bad_row(file), open_stored(file) as f:
        try:
            # Read bytes as they are decoded. By default pyarrow reads ahead a column of a row group, often all columns.
            parquet = pq.ParquetFile(
                f,
                read_dictionary=[*dictionaries],
                buffer_size=1 << 20,
                pre_buffer=False,
                page_checksum_verification=True,
            )
            _check_footer(parquet.metadata, file)
            yield parquet
        except (pa.ArrowException, OSError) as error:
            raise BadRow(f"{file}: not a readable parquet file ({error}); write or fetch it again") from error


def _check_footer(footer: "pq.FileMetaData", file: str) -> None:
    """Raises BadRow if the counts of a footer contradict each other."""
    groups = [footer.row_group(i).num_rows for i in range(footer.num_row_groups)]
    if min([*groups, footer.num_rows]) < 0 or sum(groups) != footer.num_rows:
        raise BadRow(
            f"{file}: its footer says {footer.num_rows:,} rows, its row groups hold {sum(groups):,}; write it again"
        )
    flat = [i for i in range(footer.num_columns) if footer.schema.column(i).max_repetition_level == 0]
    for number, rows in enumerate(groups):
        for values in (footer.row_group(number).column(i).num_values for i in flat):
            if values != rows:
                raise BadRow(
                    f"{file}: row group {number} has {rows:,} rows and a column of {values:,} values; write it again"
                )


def read_parquet_footer(
    file: str, columns: Mapping[str, type], others: Collection[str] = ()
) -> tuple[int, "pa.Schema"]:
    """Returns the number of rows and the schema, after checking the columns as ``read_rows`` does.

    Raises:
      BadRow: the file is broken, lacks the columns, or has columns of other types.
    """
    with open_parquet(file) as parquet:
        check_schema(parquet.schema_arrow, columns, others, file)
        return parquet.metadata.num_rows, parquet.schema_arrow

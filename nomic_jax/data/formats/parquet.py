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
    sha256_of_file,
    unreadable_as_bad_row,
)
from nomic_jax.data.formats.file_systems import open_stored
from nomic_jax.data.formats.row_checks import BadRow, RawRow

if TYPE_CHECKING:  # imported where used: most commands read only jsonl
    import pyarrow as pa
    import pyarrow.parquet as pq

ROWS_AT_ONCE = 1024  # decoded in one call


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
        for batch in parquet.iter_batches(ROWS_AT_ONCE, row_groups=groups, columns=self.decoded_columns):
            rows += len(batch)
            yield batch
        if rows != expected and self.decoded_columns != []:
            raise BadRow(f"{self.file}: its footer says {expected:,} rows, its columns hold {rows:,}; write it again")

    def scan(self, span_bytes: int) -> Scan:
        rows, broken = 0, ""
        marks: tuple[Mark, ...] = ()
        try:
            with open_parquet(self.file) as parquet:
                groups = [parquet.metadata.row_group(i) for i in range(parquet.num_row_groups)]
                rows, marks = marks_of_sizes(((group.num_rows, group.total_byte_size) for group in groups), span_bytes)
                check_schema(parquet.schema_arrow, self.columns, self.others or (), self.file)
                for batch in self._batches(parquet, list(range(len(groups))), rows):
                    check_buffers(batch)
        except BadRow as error:
            broken = str(error)
        return Scan(sha256_of_file(self.file), rows, marks, broken=broken)


@contextlib.contextmanager
def open_parquet(file: str) -> Iterator["pq.ParquetFile"]:
    """Yields the open file. Errors of pyarrow, on opening or while reading, become a BadRow that names the file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with unreadable_as_bad_row(file), open_stored(file) as f:
        try:
            # Read bytes as they are decoded. By default pyarrow reads ahead a column of a row group, often all columns.
            parquet = pq.ParquetFile(f, buffer_size=1 << 20, pre_buffer=False, page_checksum_verification=True)
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

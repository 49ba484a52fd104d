"""The input of ``launch.embed`` as blocks of consecutive rows, each of which becomes a part of the output on its own.

Before the first text is embedded, ``survey`` reads every row once: it finds bad rows, counts the others, and finds the
types of the kept columns. So blocks depend on nothing but the survey, and any process may embed any of them.
"""

import base64
import itertools
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from tqdm import tqdm

from nomic_jax.data.formats.array_record import is_array_record
from nomic_jax.data.formats.file_format import Mark
from nomic_jax.data.formats.file_systems import file_system
from nomic_jax.data.formats.parquet import read_parquet_footer
from nomic_jax.data.formats.reading import is_readable, open_file, usable_rows
from nomic_jax.data.formats.row_checks import AlreadyRejected, BadRow, RawRow, RejectedRows
from nomic_jax.data.formats.text.zip_members import stored_in
from nomic_jax.inference.vectors.kept_columns import kept_table, unify

if TYPE_CHECKING:  # imported where used: a .npy of jsonl needs none
    import pyarrow as pa

SPAN_BYTES = 1 << 24  # uncompressed bytes between two positions of a file where reading can start
SURVEY_ROWS = 4096  # whose kept columns are in memory at once


class Segment(NamedTuple):
    """The rows start ... stop - 1 of a file, bad ones included, and a position before them where reading can start."""

    file: str
    start: int
    stop: int
    mark: Mark


class Block(NamedTuple):
    """Rows that are embedded together.

    Attributes:
      number: of the part of the output that they become, from 0.
      row: number of the first row over all files.
    """

    number: int
    row: int
    segments: tuple[Segment, ...]


class SurveyedFile(NamedTuple):
    """A file of the input: its rows, bad ones included, those of them that can be embedded, and where to start."""

    file: str
    rows: int
    usable: int
    marks: tuple[Mark, ...]


class Survey(NamedTuple):
    """What was found in the input. A file that cannot be read to its end counts as one without rows.

    Attributes:
      schema: `row` and the kept columns, or None if nothing is kept beside the vectors.
      rejected: entries of the side file of rejected rows.
    """

    files: tuple[SurveyedFile, ...]
    schema: "pa.Schema | None"
    rejected: int

    @property
    def rows(self) -> int:
        return sum(file.rows for file in self.files)

    @property
    def usable(self) -> int:
        return sum(file.usable for file in self.files)

    def to_json(self) -> dict[str, Any]:
        schema = self.schema and base64.b64encode(self.schema.serialize()).decode()
        return {"files": [list(file) for file in self.files], "schema": schema, "rejected": self.rejected}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Survey":
        files = [
            SurveyedFile(file, rows, usable, tuple(Mark(*m) for m in marks))
            for file, rows, usable, marks in value["files"]
        ]
        schema = None
        if value["schema"]:
            import pyarrow as pa

            schema = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(value["schema"])))
        return cls(tuple(files), schema, value["rejected"])


def declared_types(
    files: Sequence[str], text_column: str, keep: Collection[str], on_bad_row: str
) -> dict[str, "pa.DataType"]:
    """Returns the types of the kept columns if every file is parquet; otherwise {}.

    Raises:
      BadRow: a parquet file is broken or lacks the columns, with on_bad_row="raise". It is reported before any file is
        read to its end.
    """
    schemas = []
    for file in files:
        if file.endswith(".parquet"):
            try:
                schemas.append(read_parquet_footer(file, {text_column: str}, keep)[1])
            except BadRow:
                if on_bad_row == "raise":
                    raise
    if not schemas or not all(file.endswith(".parquet") for file in files):
        return {}
    import pyarrow as pa

    schema = unify([pa.schema([(name, schema.field(name).type) for name in keep]) for schema in schemas])
    return dict(zip(schema.names, schema.types))


def survey(
    files: Sequence[str],
    text_column: str,
    keep: Sequence[str],
    *,
    with_schema: bool,
    declared: dict[str, "pa.DataType"],
    on_bad_row: str,
    rejected: RejectedRows,
    wanted: "pa.Schema | None" = None,
) -> Survey:
    """Reads every row.

    Args:
      declared: the types of the kept columns, {} to find them in the values.
      wanted: the schema of earlier parts, which those of this input get too.
      rejected: gets the bad rows, with on_bad_row="skip".

    Raises:
      BadRow: a row is invalid, or a file cannot be read, with on_bad_row="raise".
      ValueError: a kept column has several types, or no row has it.
    """
    columns = {text_column: str}
    others = () if declared and on_bad_row == "raise" else tuple(keep)  # rejected rows are stored with all of them
    surveyed: list[SurveyedFile] = []
    schemas: list[Any] = []
    with tqdm(desc="checking", unit=" rows") as bar:
        for file in files:
            marks: tuple[Mark, ...] = ()
            if not is_readable(file, columns, keep, on_bad_row, rejected):
                surveyed.append(SurveyedFile(file, 0, 0, ()))
                continue
            before, usable = rejected.count, 0
            rows = usable_rows(open_file(file, columns, others).numbered(), columns, others, True, on_bad_row, rejected)
            while chunk := list(itertools.islice(rows, SURVEY_ROWS)):
                if with_schema and (not schemas or not declared):
                    table = kept_table(list(enumerate(chunk, bar.n)), [] if declared else keep, {})
                    # Some rows of jsonl may lack a column. If all of the first lack it, its name is probably mistyped.
                    if not schemas and (missing := [n for n in others if not any(n in row for row in chunk)]):
                        raise ValueError(
                            f"--keep_columns: none of the first {len(chunk):,} rows has a column {missing[0]!r}"
                        )
                    if table.schema not in schemas:
                        schemas.append(table.schema)
                usable += len(chunk)
                bar.update(len(chunk))
            if _stored_bytes(file) > SPAN_BYTES and not _has_groups(file):
                marks = open_file(file, columns, others).scan(SPAN_BYTES).marks
            surveyed.append(SurveyedFile(file, usable + rejected.count - before, usable, marks))
    schema = unify(schemas) if schemas else None
    if schema is not None:
        import pyarrow as pa

        schema = pa.schema([*schema, *declared.items()])
    if wanted is not None and schema is not None and schema != wanted:
        for name in schema.names:
            if unify([pa.schema([each.field(name)]) for each in (wanted, schema)]).field(name) != wanted.field(name):
                raise ValueError(
                    f"--update: the values of column {name!r} are {schema.field(name).type}, those of the parts before "
                    f"are {wanted.field(name).type}, which cannot hold them; convert the input, or write another output"
                )
        schemas.append(wanted)
        schema = wanted
    found = Survey(tuple(surveyed), schema, rejected.count)
    if len(schemas) > 1:
        _check_values_fit(found, BlockRows(text_column, keep, on_bad_row))
    return found


def _check_values_fit(found: Survey, reader: "BlockRows") -> None:
    """Reads every row again where values have several types, such as integers and floats.

    Raises:
      ValueError: a value cannot be converted to the type that all of them get.
    """
    assert found.schema is not None
    types = dict(zip(found.schema.names, found.schema.types))
    for block in tqdm(cut(found.files, SURVEY_ROWS), "checking types", unit=" blocks"):
        if rows := reader.read(block):
            kept_table(rows, reader.keep, types)


def _stored_bytes(file: str) -> int:
    fs, path = file_system(stored_in(file))
    return fs.info(path)["size"] or 0


def _has_groups(file: str) -> bool:
    """Returns whether a format finds its rows without marks."""
    return file.endswith((".parquet", ".arrow")) or is_array_record(file)


def cut(files: Sequence[SurveyedFile], block_rows: int, number: int = 0, row: int = 0) -> list[Block]:
    """Returns blocks of ``block_rows`` rows, bad ones included, of which the last may have fewer.

    Args:
      number, row: of the first block and its first row.
    """
    blocks: list[Block] = []
    segments: list[Segment] = []
    missing = block_rows
    for file in files:
        start, marks = 0, iter([*file.marks, None])
        mark, following = Mark(0), next(marks)
        while start < file.rows:
            while following is not None and following.row <= start:
                mark, following = following, next(marks)
            stop = min(file.rows, start + missing)
            segments.append(Segment(file.file, start, stop, mark))
            missing -= stop - start
            start = stop
            if not missing:
                blocks.append(Block(number + len(blocks), row + len(blocks) * block_rows, tuple(segments)))
                segments, missing = [], block_rows
    if segments:
        blocks.append(Block(number + len(blocks), row + len(blocks) * block_rows, tuple(segments)))
    return blocks


class BlockRows:
    """Reads the usable rows of blocks. Blocks in ascending order read every file once, also a compressed one."""

    def __init__(self, text_column: str, keep: Sequence[str], on_bad_row: str):
        self.columns, self.keep, self.on_bad_row = {text_column: str}, [*keep], on_bad_row
        self._open: Iterator[tuple[str, RawRow]] = iter(())
        self._at = ("", -1)  # file and row that _open yields next

    def read(self, block: Block) -> list[tuple[int, dict[str, Any]]]:
        """Returns (number over all files, row) of each usable row.

        Raises:
          BadRow: a file has changed since it was surveyed.
        """
        found = []
        row = block.row
        for segment in block.segments:
            for number, values in self._read(segment):
                found.append((row + number, values))
            row += segment.stop - segment.start
        return found

    def _read(self, segment: Segment) -> Iterator[tuple[int, dict[str, Any]]]:
        if self._at != (segment.file, segment.start):
            opened = open_file(segment.file, self.columns, self.keep, [segment.mark])
            self._open = opened.numbered(segment.start)
        self._at = ("", -1)
        size = segment.stop - segment.start
        rejected = AlreadyRejected()
        rows = itertools.islice(self._open, size)
        good = 0
        # When a row is yielded, `rejected` has counted exactly the bad rows before it.
        for row in usable_rows(rows, self.columns, self.keep, True, self.on_bad_row, rejected):
            yield good + rejected.count, row
            good += 1
        if good + rejected.count != size:
            raise BadRow(f"{segment.file}: changed while it was read; start again")
        self._at = (segment.file, segment.stop)

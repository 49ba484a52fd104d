"""The columns of the input that ``launch.embed`` keeps beside the vectors: their types, shard by shard."""

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # imported where used: a .npy of jsonl needs none
    import pyarrow as pa


def kept_table(
    chunk: list[tuple[int, dict[str, Any]]],
    keep: list[str],
    declared: dict[str, "pa.DataType"],
    *,
    is_first: bool,
) -> "pa.Table":
    """Returns `row` and the kept columns of a shard, with the types that the input declares or the values have."""
    import pyarrow as pa

    columns = {"row": pa.array([number for number, _ in chunk], pa.int64())}
    for name in keep:
        # Some rows of jsonl may lack a column. If the whole first shard lacks it, its name is probably mistyped.
        if is_first and not any(name in row for _, row in chunk):
            raise ValueError(f"--keep_columns: none of the first {len(chunk):,} rows has a column {name!r}")
        values = [row.get(name) for _, row in chunk]
        try:
            column = pa.array(values, type=declared.get(name))
        except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
            raise ValueError(
                f"--keep_columns: column {name!r} of rows {chunk[0][0]} to {chunk[-1][0]} cannot be written to parquet "
                f"({error}); leave it out"
            ) from error
        if pa.types.is_struct(column.type) and column.type.num_fields == 0:
            # All values are {} or null, and parquet has no records without fields.
            column = pa.nulls(len(column))
        columns[name] = column
    return pa.table(columns)


def kept_schema(shards: list[Path]) -> "pa.Schema | None":
    if not shards or shards[0].suffix != ".parquet":
        return None
    import pyarrow.parquet as pq

    schemas = [pq.read_schema(shard) for shard in shards]
    return unify(schema.remove(schema.get_field_index("embedding")) for schema in schemas)


def unify(schemas: Iterable["pa.Schema"]) -> "pa.Schema":
    """Returns a schema that fits all: null becomes any type, records get the fields of both, integers become floats.

    So a column may be null in all of the first shards, and fields of records may first appear in later shards.
    """
    import pyarrow as pa

    try:
        return pa.unify_schemas(list(schemas), promote_options="permissive")
    except pa.ArrowException as error:
        raise ValueError(
            f"--keep_columns: a column has values of several types ({error}); leave it out, or convert it to one type"
        ) from error


def check_values_fit(schema: "pa.Schema", shards: list[Path], kept: "pa.Table") -> None:
    """Checks that all values so far can be converted to ``schema``, such as integers to floats.

    Raises:
      ValueError: a value cannot; the message names the column.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    for name in schema.names:
        wanted = pa.schema([schema.field(name)])
        tables = (pq.read_table(shard, columns=[name]) for shard in shards)
        for table in itertools.chain(tables, [kept.select([name])]):
            if table.schema == wanted:
                continue
            try:
                table.cast(wanted)
            except pa.ArrowException as error:
                raise ValueError(
                    f"--keep_columns: column {name!r} has values of several types, and not all of them fit "
                    f"{schema.field(name).type} ({error}); leave it out, or convert it to one type"
                ) from error

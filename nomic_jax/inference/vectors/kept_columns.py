"""The columns of the input that ``launch.embed`` keeps beside the vectors, and their types."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # imported where used: a .npy of jsonl needs none
    import pyarrow as pa


def kept_table(
    chunk: Sequence[tuple[int, dict[str, Any]]],
    keep: Sequence[str],
    declared: Mapping[str, "pa.DataType"],
) -> "pa.Table":
    """Returns `row` and the kept columns of some rows, with the declared types, or else those that the values have."""
    import pyarrow as pa

    columns = {"row": pa.array([number for number, _ in chunk], pa.int64())}
    for name in keep:
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


def unify(schemas: Iterable["pa.Schema"]) -> "pa.Schema":
    """Returns a schema that fits all: null becomes any type, records get the fields of both, integers become floats.

    So a column may be null in all of the first rows, and fields of records may first appear in later rows.
    """
    import pyarrow as pa

    try:
        return pa.unify_schemas(list(schemas), promote_options="permissive")
    except pa.ArrowException as error:
        raise ValueError(
            f"--keep_columns: a column has values of several types ({error}); leave it out, or convert it to one type"
        ) from error

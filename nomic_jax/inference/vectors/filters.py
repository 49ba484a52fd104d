"""Conditions on the kept columns of stored vectors, such as lang=en or year>=2020, computed by pyarrow."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from nomic_jax.inference.vectors.stored import StoredVectors

if TYPE_CHECKING:
    import pyarrow as pa

_OPERATORS = {
    "=": "equal",
    "!=": "not_equal",
    "<": "less",
    "<=": "less_equal",
    ">": "greater",
    ">=": "greater_equal",
}


class Condition(NamedTuple):
    """A column, an operator and the value to compare with."""

    column: str
    operator: str
    value: str

    @classmethod
    def parse(cls, text: str) -> "Condition":
        """Parses COLUMN=VALUE, or with !=, <, <=, > or >=. Raises ValueError if it is none of these."""
        parsed = re.fullmatch(r"\s*([^=!<>]+?)\s*(!=|<=|>=|=|<|>)\s*(.*?)\s*", text, re.DOTALL)
        if parsed is None:
            raise ValueError(f"--filter={text}: write COLUMN=VALUE, or !=, <, <=, >, >= in place of =")
        return cls(*parsed.groups())

    def holds(self, column: "pa.ChunkedArray") -> np.ndarray:
        """Returns whether it holds, bool [N]; never for a missing value."""
        import pyarrow as pa
        import pyarrow.compute as pc

        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        try:
            value = pa.scalar(self.value).cast(column.type)
            found = getattr(pc, _OPERATORS[self.operator])(column, value)
        except pa.ArrowException as error:
            raise ValueError(
                f"--filter={self.column}{self.operator}{self.value}: the column {self.column!r} is {column.type}, "
                f"which cannot be compared so ({error})"
            ) from error
        return pc.fill_null(found, False).to_numpy()


def matching(stored: StoredVectors, filters: Sequence[str]) -> np.ndarray:
    """Returns which rows all conditions hold for, bool [N].

    Raises:
      ValueError: a condition cannot be read, or names a column that the vectors do not have.
    """
    conditions = [Condition.parse(text) for text in filters]
    columns = list(dict.fromkeys(condition.column for condition in conditions))
    for name in columns:
        if name not in stored.known([name]):
            known = ", ".join(stored.known(stored.schema.names))
            raise ValueError(
                f"--filter: {stored.place} has no column {name!r}; it has {known} (--keep_columns of embed)"
            )
    matches = np.ones(len(stored), bool)
    for first, table in stored.columns(columns):
        for condition in conditions:
            matches[first : first + len(table)] &= condition.holds(table[condition.column])
    return matches

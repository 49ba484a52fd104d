"""Sets of 64-bit numbers as sorted arrays, which take 8 bytes a number where Python's sets take 100."""

from collections.abc import Iterable

import numpy as np


def is_among(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Returns whether each value is in ``known``, which is sorted; bool [N]."""
    if not len(known):
        return np.zeros(len(values), bool)
    return known[np.minimum(np.searchsorted(known, values), len(known) - 1)] == values


def repeated_values(parts: Iterable[np.ndarray], columns: int, most: int) -> list[np.ndarray]:
    """Returns for each column the values that it has at least twice, sorted.

    Args:
      parts: consecutive rows, uint64 [N, columns].
      most: the number of rows in all parts, or more. Memory: 8 bytes for each row and column.
    """
    values_CN, end = np.empty((columns, most), np.uint64), 0
    for part in parts:
        values_CN[:, end : end + len(part)] = part.T
        end += len(part)
    found = []
    for values in values_CN[:, :end]:
        values.sort()
        found.append(np.unique(values[1:][values[1:] == values[:-1]]))
    return found

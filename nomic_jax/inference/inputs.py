"""Checks what is given as texts. Nothing is guessed: an object that is not a sequence of strings is refused."""

from collections.abc import Iterable, Mapping, Set
from typing import Any

from nomic_jax.data.tokens.tokenizer import check_unicode


def as_texts(inputs: Iterable[str]) -> list[str]:
    """Returns the texts of a sequence, or of any other iterable with an order, such as a column of a table.

    Raises:
      TypeError: ``inputs`` is of another type, or an input is not a string; the message names its index.
      ValueError: an input is not valid Unicode.
    """
    # Iterating over a table gives the names of its columns, over a mapping or a set its keys, and over bytes numbers.
    if (columns := _columns(inputs)) is not None:
        raise TypeError(
            f"inputs is {type(inputs).__name__}, a table with the columns {', '.join(map(str, columns))}; pass the "
            f"column that holds the texts"
        )
    if isinstance(inputs, (bytes, bytearray, memoryview, Mapping, Set)) or not isinstance(inputs, Iterable):
        raise TypeError(f"inputs is {type(inputs).__name__}, expected a string or a sequence of strings")
    texts = list(inputs)
    check_texts(texts)
    return texts


def check_texts(texts: list[str], what: str = "input") -> None:
    """Raises TypeError for a text that is not a string, ValueError for one that is not valid Unicode."""
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"{what} {i} is {type(text).__name__}, expected a string")
        check_unicode(text, what, i)


def _columns(inputs: Any) -> list[Any] | None:
    """The columns of a table of pandas, polars, Arrow or datasets (a DataFrame's own columns are an Index)."""
    for name in ("column_names", "columns"):
        found = getattr(inputs, name, None)
        if found is not None and not callable(found):
            return list(found)
    return None

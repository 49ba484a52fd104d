"""Labelled texts of classification and clustering: one {"text", "label"} per line."""

from pathlib import Path
from typing import NamedTuple

from nomic_jax.data.formats.reading import read_rows
from nomic_jax.evals.tasks.contract import TaskError

Label = str | int


class Labelled(NamedTuple):
    texts: tuple[str, ...]
    labels: tuple[Label, ...]


def read_labelled(file: Path) -> Labelled:
    """Reads labelled texts. Raises TaskError if labels are not all strings or all integers; BadRow for a bad row."""
    texts: list[str] = []
    labels: list[Label] = []
    for row in read_rows(file, {"text": str}):
        label = row.get("label")
        if not isinstance(label, str | int) or isinstance(label, bool):
            raise TaskError(
                f"{file}: row {len(texts) + 1} has the label {label!r}; write a string or an integer for each"
            )
        if labels and type(label) is not type(labels[0]):
            raise TaskError(
                f"{file}: row {len(texts) + 1} has the label {label!r}, row 1 {labels[0]!r}; write all as strings or "
                f"all as integers"
            )
        texts.append(row["text"])
        labels.append(label)
    return Labelled(tuple(texts), tuple(labels))

"""Parts of the Markdown reports on curated data: tables, sample rows and files that were set aside."""

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from nomic_jax.data.formats.row_checks import Quarantined
from nomic_jax.files.printable import code, markdown


class Sample:
    """A uniform sample of a stream of unknown length. The same stream always gives the same sample."""

    def __init__(self, size: int = 10):
        self.size = size
        self.items: list[Any] = []
        self.seen = 0
        self.random = random.Random(0)

    def add(self, item: Any) -> None:
        self.seen += 1
        if len(self.items) < self.size:
            self.items.append(item)
        elif (index := self.random.randrange(self.seen)) < self.size:
            self.items[index] = item


class FileName(str):
    """The name of a file in a table: shown whole and as code, so that it can be copied from the report."""


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Returns a Markdown table. Texts are no markup, and long ones are truncated."""
    first, *others = [[_cell(value) for value in row] for row in (header, *rows)]
    lines = [first, ["---"] * len(first), *others]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def quarantine(summary: Mapping[str, Any]) -> str:
    """Returns a Markdown section that lists the files that were set aside; "" if there are none."""
    files = summary["quarantined"]
    rows = [(FileName(entry["file"]), entry["reason"], entry["rows_at_least"] or "unknown") for entry in files]
    if not rows:
        return ""
    return f"## Files set aside\n\nTheir rows are not used.\n\n{table(('file', 'reason', 'rows, at least'), rows)}\n"


def quarantine_lines(summary: Mapping[str, Any]) -> list[str]:
    """Returns one line for each file that was set aside, for a command to print at its end."""
    # Summaries of versions without quarantine do not have this field.
    return [str(Quarantined(**entry)) for entry in summary.get("quarantined", [])]


def _cell(value: Any, width: int = 200) -> str:
    if isinstance(value, FileName):
        return code(value)
    text = f"{value:.3f}" if isinstance(value, float) else " ".join(str(value).split())
    return markdown(text if len(text) <= width else text[: width - 1] + "…")

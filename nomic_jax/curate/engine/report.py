"""A page for the person who has to trust the data: counts, and rows to read."""

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from nomic_jax.data.formats.row_checks import Quarantined


class Sample:
    """A uniform sample of a stream of unknown length, the same at every run over the same stream."""

    def __init__(self, size: int = 10):
        self.size = size
        self.items: list[Any] = []
        self.seen = 0
        self.random = random.Random(0)

    def add(self, item: Any) -> None:
        self.seen += 1
        if len(self.items) < self.size:
            self.items.append(item)
        elif (place := self.random.randrange(self.seen)) < self.size:
            self.items[place] = item


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; long texts are cut."""
    lines = [header, ["---"] * len(header), *([_cell(value) for value in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def quarantine(summary: Mapping[str, Any]) -> str:
    """The files that were set aside, as Markdown; empty where there are none."""
    rows = [(one["file"], one["reason"], one["rows_at_least"] or "unknown") for one in summary["quarantined"]]
    if not rows:
        return ""
    return f"## Files set aside\n\nNone of their rows is used.\n\n{table(('file', 'reason', 'rows, at least'), rows)}\n"


def quarantine_lines(summary: Mapping[str, Any]) -> list[str]:
    """The files that were set aside, a line each, for the end of a command."""
    # The summary may be one that a version without quarantine wrote.
    return [str(Quarantined(**one)) for one in summary.get("quarantined", [])]


def _cell(value: Any, width: int = 200) -> str:
    text = f"{value:.3f}" if isinstance(value, float) else " ".join(str(value).split())
    return (text if len(text) <= width else text[: width - 1] + "…").replace("|", "\\|")

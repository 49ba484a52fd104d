"""Long documents in a report: scores by length and by depth of the answer, and what a document costs.

The entries of ``evals.tasks.long_context``: {..., "long_context": {"passages", "length", "by_depth",
"seconds_per_document"}}, as ``evals.suites.local`` writes them.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nomic_jax.evals.report import pictures
from nomic_jax.evals.report.document import Heading, Paragraph, Part, Picture, Table
from nomic_jax.evals.report.record import main_score

# Label of a model and its settings -> tokens of the documents, 0 for the passages alone -> entry of the task.
Entries = Mapping[str, Mapping[int, dict[str, Any]]]
FIELD = "long_context"
ALONE = "alone"
SCORE, SECONDS = "all depths", "seconds a document"  # panels, beside those of each depth
IN_A_ROW = 4


def is_placed(figures: Mapping[str, Any]) -> bool:
    """Returns whether the entry of a task is one of long documents with answers at known depths."""
    return FIELD in figures


def parts(folder: Path, runs: Mapping[str, Mapping[str, dict[str, Any]]]) -> list[Part]:
    """Returns the sections about long documents, one for each source of passages, and draws their charts.

    Args:
      runs: label of a model and its settings -> task -> entry, of tasks for which ``is_placed``.
    """
    found: list[Part] = []
    sources = dict.fromkeys(figures[FIELD]["passages"] for tasks in runs.values() for figures in tasks.values())
    for number, source in enumerate(sources, 1):
        entries: dict[str, dict[int, dict[str, Any]]] = {}
        for label, tasks in runs.items():
            for figures in tasks.values():
                if figures[FIELD]["passages"] == source:
                    entries.setdefault(label, {})[figures[FIELD]["length"] or 0] = figures
        file = f"long-context-{number}.png" if len(sources) > 1 else "long-context.png"  # a name may hold anything
        draw(folder / file, entries)
        picture = Picture(file, f"{source}: scores and seconds by length of the documents")
        found += [Heading(f"Long documents: {source}", 3), *_texts(entries), picture]
    return found


def _texts(entries: Entries) -> list[Part]:
    every = [figures for of_model in entries.values() for figures in of_model.values()]
    lengths, depths, metric = _lengths(entries), _depths(entries), every[0]["metric"]
    rows = [
        [label, *(main_score(of_model[length]) if length in of_model else "" for length in lengths)]
        for label, of_model in entries.items()
    ]
    by_depth = [
        [
            label,
            _name(length),
            *(figures[FIELD]["by_depth"].get(depth, "") for depth in depths),
            figures[FIELD].get("seconds_per_document", ""),
        ]
        for label, of_model in entries.items()
        for length, figures in sorted(of_model.items())
    ]
    return [
        Paragraph(
            f"{metric} of {every[0]['queries']:,} queries among {every[0]['documents']:,} documents, by tokens of the "
            f"documents; {ALONE}: the passages without filler. The passage of a query, its depth and its filler are "
            f"the same at all lengths. A random order has {_chance(entries):.3f}."
        ),
        Table(["model", *map(_name, lengths)], rows),
        Paragraph(
            f"{metric} by depth of the passage: 0 is the beginning of a document, 1 its end. Each depth has queries of "
            f"its own: compare a score with that of the passages alone. Seconds are those of a call with several "
            f"documents on this machine, after compilation."
        ),
        Table(["model", "tokens", *(f"depth {depth}" for depth in depths), SECONDS], by_depth),
    ]


def draw(path: Path, entries: Entries) -> None:
    """Draws panels over the length of the documents: the score of all queries, of those at each depth, and seconds."""
    lengths = _lengths(entries)
    metric = next(figures["metric"] for of_model in entries.values() for figures in of_model.values())
    timed = any("seconds_per_document" in x[FIELD] for of_model in entries.values() for x in of_model.values())
    panels = [SCORE, *(f"depth {depth}" for depth in _depths(entries)), *([SECONDS] if timed else [])]
    columns = min(IN_A_ROW, len(panels))
    figure = pictures.new_figure(3.3 * columns, 2.9 * math.ceil(len(panels) / columns))
    axes = figure.subplots(math.ceil(len(panels) / columns), columns, squeeze=False).flat
    # A logarithmic axis, with the passages alone one step before the shortest documents.
    shortest = min(filter(None, lengths), default=2)
    place = {length: math.log2(length or shortest / 2) for length in lengths}
    looks = pictures.looks(entries)
    handles: dict[str, Any] = {}
    for axis, panel in zip(axes, panels):
        for label, of_model in entries.items():
            values = {place[n]: _value(of_model[n], panel) for n in lengths if n in of_model}
            shown = {x: value for x, value in values.items() if value is not None}
            if shown:
                (handles[label],) = axis.plot([*shown], [*shown.values()], markersize=4, linewidth=1.4, **looks[label])
        axis.set_title(panel, fontsize=10)
        axis.set_xticks([place[n] for n in lengths], map(_name, lengths))
        axis.set_xlabel("tokens of the documents", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.25)
        if panel == SECONDS:
            axis.set_yscale("log")
        else:
            axis.set_ylim(0, 1.02)
            axis.set_ylabel(metric, fontsize=8)
            axis.axhline(_chance(entries), color="gray", linestyle="dotted", linewidth=1)
    for axis in figure.axes[len(panels) :]:
        axis.remove()
    pictures.legend_above(figure, handles, 4)
    figure.tight_layout()
    pictures.save(figure, path)


def _value(figures: dict[str, Any], panel: str) -> float | None:
    if panel == SCORE:
        return main_score(figures)
    if panel == SECONDS:
        return figures[FIELD].get("seconds_per_document")
    return figures[FIELD]["by_depth"].get(panel.removeprefix("depth "))


def _lengths(entries: Entries) -> list[int]:
    return sorted({length for of_model in entries.values() for length in of_model})


def _depths(entries: Entries) -> list[str]:
    found = {depth for of_model in entries.values() for x in of_model.values() for depth in x[FIELD]["by_depth"]}
    return sorted(found, key=float)


def _chance(entries: Entries) -> float:
    """The nDCG@10 of a random order: the only relevant document is at each of N ranks with probability 1 / N."""
    documents = next(figures["documents"] for of_model in entries.values() for figures in of_model.values())
    return sum(1 / math.log2(1 + rank) for rank in range(1, min(10, documents) + 1)) / documents


def _name(length: int) -> str:
    return str(length) if length else ALONE

"""Bar and line charts as PNG files, drawn without a display. Colours differ for colour-blind readers too."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nomic_jax.extras import needs
from nomic_jax.files.printable import printable
from nomic_jax.files.writing import atomic_file

# Petroff, "Accessible Color Sequences for Data Visualization" (arXiv:2107.02270), eight colours. Averages are black.
COLORS = ("#1845fb", "#ff5e02", "#c91f16", "#c849a9", "#adad7d", "#86c8dd", "#578dff", "#656364")
DASHES = ("solid", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "h")
HATCHES = ("", "///", "...", "xx")
MOST_SERIES = len(COLORS) * len(DASHES)  # more do not have a look of their own


def looks(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Returns name -> colour, line style and marker, which differ for up to MOST_SERIES names."""
    found = {}
    for i, name in enumerate(names):
        dashes = DASHES[(i + i // len(COLORS)) % len(DASHES)]
        found[name] = {"color": COLORS[i % len(COLORS)], "linestyle": dashes, "marker": MARKERS[i % len(MARKERS)]}
    return found


def smooth(values: Sequence[float], window: int) -> np.ndarray:
    """Returns means over ``window`` neighbours, centred; NaN and infinity do not count.

    At the start, where a loss falls fast, a mean is over as many on each side as there are. At the end it is over all
    that the window has.

    Args:
      values: [N]. A mean is NaN where all its values are.
    """
    x = np.asarray(values, np.float64)
    known = np.isfinite(x)
    sums, counts = (np.concatenate([[0], np.cumsum(part)]) for part in (np.where(known, x, 0), known))
    at = np.arange(len(x))
    half = np.minimum(window // 2, np.maximum(at, 1))
    first, end = np.maximum(at - half, 0), np.minimum(at + half + 1, len(x))
    count = counts[end] - counts[first]
    return np.where(count > 0, (sums[end] - sums[first]) / np.maximum(count, 1), np.nan)


def is_constant(values: Iterable[float]) -> bool:
    """Returns whether there are not two different numbers, so that a curve would say nothing."""
    known = [value for value in values if math.isfinite(value)]
    return not known or max(known) - min(known) <= 1e-6 * max(map(abs, known))


def spans_decades(values: Iterable[float]) -> bool:
    """Returns whether a logarithmic axis helps: all values are positive, the largest is 20 times the smallest."""
    known = [value for value in values if math.isfinite(value)]
    return bool(known) and min(known) > 0 and max(known) >= 20 * min(known)


def bars(path: Path, groups: Mapping[str, Mapping[str, float]], names: Sequence[str], ylabel: str) -> None:
    """Draws a group of bars for each name, with one bar for each key of ``groups`` that has a value for the name."""
    shown = [name for name in names if any(name in values for values in groups.values())]
    figure = new_figure(max(7.0, 1.2 * len(shown) + 4), 3.8)
    axes = figure.subplots()
    width = 0.8 / max(len(groups), 1)
    for i, (label, values) in enumerate(groups.items()):
        points = [(x, values[name]) for x, name in enumerate(shown) if name in values]
        offset = (i - (len(groups) - 1) / 2) * width
        axes.bar(
            [x + offset for x, _ in points],
            [value for _, value in points],
            width,
            label=plain(label),
            color=COLORS[i % len(COLORS)],
            hatch=HATCHES[i // len(COLORS) % len(HATCHES)],
            edgecolor="white",
            linewidth=0,
        )
    axes.set_xticks(range(len(shown)), [plain(name) for name in shown], rotation=20, ha="right")
    _finish(figure, axes, path, ylabel)


def lines(path: Path, curves: Mapping[str, Mapping[int, float]], xlabel: str, ylabel: str) -> None:
    """Draws a line for each key of ``curves``, over a logarithmic axis of lengths or dimensions."""
    figure = new_figure(9.0, 3.8)
    axes = figure.subplots()
    for (label, points), look in zip(curves.items(), looks(curves).values()):
        xs = sorted(points)
        axes.plot(xs, [points[x] for x in xs], label=plain(label), markersize=5, **look)
    ticks = sorted({x for points in curves.values() for x in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel(xlabel)
    _finish(figure, axes, path, ylabel)


def plain(text: str) -> str:
    """Returns a name as matplotlib shows it to the letter: "$" would begin a formula."""
    return printable(text).replace("$", r"\$")


def check_installed() -> None:
    """Raises MissingPackage if pictures cannot be drawn: for before the work that they show."""
    with needs("a report", "nomic_jax[report]"):
        import matplotlib  # noqa: F401


def new_figure(width: float, height: float) -> Any:
    """Returns a figure of that many inches."""
    from matplotlib.figure import Figure  # not pyplot, which keeps figures in memory and needs a display

    return Figure(figsize=(width, height))


def legend_above(figure: Any, handles: Mapping[str, Any], most_columns: int) -> None:
    """Draws one legend of name -> artist for all panels of a figure, above them."""
    figure.legend(
        handles.values(),
        map(plain, handles),
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        ncols=min(most_columns, len(handles)),
        fontsize=9,
        handlelength=3,
        frameon=False,
    )


def save(figure: Any, path: Path) -> None:
    with atomic_file(path) as part:
        figure.savefig(part, format="png", dpi=110, bbox_inches="tight", metadata={"Software": None})


def _finish(figure: Any, axes: Any, path: Path, ylabel: str) -> None:
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.3, axis="y")
    axes.set_axisbelow(True)
    # Beside the axes, because a legend over the bars would hide the highest.
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    figure.tight_layout()
    save(figure, path)

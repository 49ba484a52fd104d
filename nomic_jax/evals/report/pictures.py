"""Bar and line charts as PNG files, drawn without a display."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from nomic_jax.files.printable import printable
from nomic_jax.files.writing import atomic_file


def bars(path: Path, groups: Mapping[str, Mapping[str, float]], names: Sequence[str], ylabel: str) -> None:
    """Draws a group of bars for each name, with one bar for each key of ``groups`` that has a value for the name."""
    shown = [name for name in names if any(name in values for values in groups.values())]
    figure, axes = _figure(width=max(7.0, 1.2 * len(shown) + 4))
    width = 0.8 / max(len(groups), 1)
    for i, (label, values) in enumerate(groups.items()):
        points = [(x, values[name]) for x, name in enumerate(shown) if name in values]
        offset = (i - (len(groups) - 1) / 2) * width
        axes.bar([x + offset for x, _ in points], [value for _, value in points], width, label=plain(label))
    axes.set_xticks(range(len(shown)), [plain(name) for name in shown], rotation=20, ha="right")
    _finish(figure, axes, path, ylabel)


def lines(path: Path, curves: Mapping[str, Mapping[int, float]], xlabel: str, ylabel: str) -> None:
    """Draws a line for each key of ``curves``, over a logarithmic axis of lengths or dimensions."""
    figure, axes = _figure(width=9.0)
    for label, points in curves.items():
        xs = sorted(points)
        axes.plot(xs, [points[x] for x in xs], "o-", label=plain(label))
    ticks = sorted({x for points in curves.values() for x in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel(xlabel)
    _finish(figure, axes, path, ylabel)


def plain(text: str) -> str:
    """Returns a name as matplotlib shows it to the letter: "$" would begin a formula."""
    return printable(text).replace("$", r"\$")


def _figure(width: float):
    from matplotlib import colormaps
    from matplotlib.figure import Figure  # not pyplot, which keeps figures in memory and needs a display

    figure = Figure(figsize=(width, 3.8))
    axes = figure.subplots()
    # Twenty colours, the strong ones first.
    axes.set_prop_cycle(color=[colormaps["tab20"](i) for i in (*range(0, 20, 2), *range(1, 20, 2))])
    return figure, axes


def _finish(figure, axes, path: Path, ylabel: str) -> None:
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.3, axis="y")
    axes.set_axisbelow(True)
    # Beside the axes, because a legend over the bars would hide the highest.
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    figure.tight_layout()
    with atomic_file(path) as part:
        figure.savefig(part, format="png", dpi=110, metadata={"Software": None})

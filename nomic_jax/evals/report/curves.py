"""The curves of a training run: what was logged behind its running mean, a panel for each quantity that varies."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from nomic_jax.evals.report.pictures import (
    MOST_SERIES,
    is_constant,
    legend_above,
    new_figure,
    plain,
    smooth,
    spans_decades,
)

# Quantity -> title. Those of a batch differ from source to source.
BY_SOURCE = {"loss": "loss", "accuracy": "accuracy", "real/padded": "real / padded tokens"}
OF_STEP = {"grad_norm": "gradient norm", "lr": "learning rate"}
EVALUATION = "evaluation"
ORDER = ("loss", "accuracy", EVALUATION, "grad_norm", "lr", "real/padded")
FEWEST = 9  # values that a running mean is made of, at least
ALL = "all"


def panels_of(lines: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the quantities that vary in a run, in the order in which they are drawn."""
    values = {name: [_number(line, name) for line in lines] for name in (*BY_SOURCE, *OF_STEP)}
    varies = {name for name, column in values.items() if not is_constant(column)}
    if len(evaluations) > 1:
        varies.add(EVALUATION)
    return [name for name in ORDER if name in varies]


def draw(
    lines: Sequence[Mapping[str, Any]],
    evaluations: Sequence[Mapping[str, Any]],
    looks: Mapping[str, Mapping[str, Any]],
    metric: str,
) -> Any:
    """Returns the figure of a run, or None if nothing varies.

    Args:
      lines: the lines of metrics.jsonl.
      evaluations: those of evaluation.jsonl.
      looks: source or held-out task -> how it looks (``pictures.looks``).
      metric: what ``figure`` of an evaluation is the mean of.
    """
    panels = panels_of(lines, evaluations)
    if not panels:
        return None
    columns = {1: 1, 2: 2, 4: 2}.get(len(panels), 3)
    rows = math.ceil(len(panels) / columns)
    figure = new_figure(13.2 if columns > 1 else 6.6, 2.9 * rows)
    axes = figure.subplots(rows, columns, squeeze=False).flat
    own = sorted({line["source"] for line in lines})
    handles: dict[str, Any] = {}
    for axis, panel in zip(axes, panels):
        axis.grid(alpha=0.25)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
        if panel == EVALUATION:
            handles |= _draw_evaluations(axis, evaluations, looks, metric)
            continue
        axis.set_title((BY_SOURCE | OF_STEP)[panel], fontsize=10)
        groups = {source: [line for line in lines if line["source"] == source] for source in own}
        shown = groups if panel in BY_SOURCE and len(own) <= MOST_SERIES else {}
        means = [handle for source, group in shown.items() for handle in [_draw(axis, group, panel, looks[source])]]
        handles = dict(zip(shown, means)) | handles
        if len(own) > 1 or panel not in BY_SOURCE or not shown:
            black = {"color": "black", "linestyle": "solid", "marker": "o"}
            everything = _draw(axis, lines, panel, black, raw=not shown, width=2.0 if shown else 1.4)
            if shown and len(own) > 1:
                handles[ALL] = everything
        drawn = [y for line in axis.lines if line.get_linewidth() > 1 for y in line.get_ydata()]
        if panel in ("loss", "grad_norm") and spans_decades(drawn):
            axis.set_yscale("log")
            axis.set_title(f"{axis.get_title()}, logarithmic", fontsize=10)
    for axis in figure.axes[len(panels) :]:
        axis.remove()
    if len(handles) > 1:
        handles = {name: handles[name] for name in sorted(handles, key=lambda name: (name == ALL, name))}
        legend_above(figure, handles, 8)
    figure.tight_layout()
    return figure


def _draw(
    axis: Any,
    lines: Sequence[Mapping[str, Any]],
    panel: str,
    look: Mapping[str, Any],
    raw: bool = True,
    width: float = 1.6,
) -> Any:
    """Draws the logged values, faint, and their running mean. A few values are drawn as points instead."""
    steps, values = [line["step"] for line in lines], [_number(line, panel) for line in lines]
    if panel == "lr":  # a schedule has no noise
        return axis.plot(steps, values, color=look["color"], linewidth=width)[0]
    if len(values) < FEWEST:
        if raw:
            axis.plot(steps, values, linestyle="none", marker=look["marker"], color=look["color"], markersize=3)
        return axis.plot(steps, values, color=look["color"], linestyle=look["linestyle"], linewidth=width)[0]
    if raw:
        axis.plot(steps, values, color=look["color"], linewidth=0.6, alpha=0.25)
    means = smooth(values, window_of(len(values)))
    return axis.plot(steps, means, color=look["color"], linestyle=look["linestyle"], linewidth=width)[0]


def window_of(count: int) -> int:
    """Returns over how many of ``count`` values a running mean goes: a tenth of them, a fiftieth if there are many."""
    return max(FEWEST, min(count // 10, 30), count // 50)


def _draw_evaluations(
    axis: Any, evaluations: Sequence[Mapping[str, Any]], looks: Mapping[str, Mapping[str, Any]], metric: str
) -> dict[str, Any]:
    """Draws the scores on held-out tasks: each task, their mean, and the step with the best one. Returns the lines."""
    steps = [line["step"] for line in evaluations]
    tasks = list(dict.fromkeys(task for line in evaluations for task in line["tasks"]))
    handles = {}
    if 1 < len(tasks) <= MOST_SERIES:
        for task in tasks:
            scores = [_score(line["tasks"].get(task, {}), metric) for line in evaluations]
            (handles[task],) = axis.plot(steps, scores, markersize=3, linewidth=1.2, **looks[task])
    figures = [line["figure"] for line in evaluations]
    (handles[ALL],) = axis.plot(steps, figures, color="black", marker="o", markersize=4, linewidth=2)
    best = max(range(len(figures)), key=lambda i: figures[i] if math.isfinite(figures[i]) else -math.inf)
    axis.plot(
        steps[best], figures[best], color="black", marker="*", markersize=13, linestyle="none", markerfacecolor="white"
    )
    axis.set_title(f"validation: {plain(metric)} (star: best, step {steps[best]})", fontsize=10)
    return handles


def _score(metrics: Mapping[str, Any], metric: str) -> float:
    value = metrics.get(metric, next(iter(metrics.values()), math.nan))
    return float(value) if isinstance(value, int | float) else math.nan


def _number(line: Mapping[str, Any], name: str) -> float:
    if name == "real/padded":
        return line["real_tokens"] / line["padded_tokens"]
    value = line.get(name)
    return float(value) if isinstance(value, int | float) else math.nan

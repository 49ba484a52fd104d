"""A plot of the loss in a notebook, which grows while the run trains."""

import contextlib
import io
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nomic_jax.train.watch.metrics import read_metrics

SECONDS = 2.0  # between two drawings


@contextlib.contextmanager
def live_plot(workdir: Path) -> Iterator[None]:
    """While entered, shows the losses in metrics.jsonl and redraws them every few seconds, in a thread.

    Without matplotlib or IPython, nothing is shown.
    """
    try:
        from IPython.display import Image, display
        from matplotlib.figure import Figure  # without pyplot, which is not for threads
    except ImportError:
        yield
        return

    def picture() -> Image:
        png = io.BytesIO()
        draw(workdir, Figure).savefig(png, format="png")
        return Image(data=png.getvalue(), format="png")

    handle = display(picture(), display_id=True)
    done = threading.Event()

    def redraw() -> None:
        seen = 0
        while not done.wait(SECONDS):
            lines = read_metrics(workdir)
            if len(lines) != seen:
                seen = len(lines)
                handle.update(picture())

    thread = threading.Thread(target=redraw, name="live plot", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        handle.update(picture())


def draw(workdir: Path, figure: Any) -> Any:
    """Returns a Figure of the losses of a run, and of its accuracy if it has one."""
    lines = read_metrics(workdir)
    plot = figure(figsize=(7, 2.5), layout="constrained")
    names = [name for name in ("loss", "accuracy") if name == "loss" or any(name in line for line in lines)]
    for axes, name in zip(plot.subplots(1, len(names), squeeze=False)[0], names):
        points = [(line["step"], line[name]) for line in lines if name in line]
        axes.plot(*zip(*points) if points else ([], []))
        axes.set(xlabel="step", ylabel=name)
        axes.grid(alpha=0.3)
    return plot

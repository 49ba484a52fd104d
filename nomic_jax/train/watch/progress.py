"""The progress of a run while it trains: the bar, the lines of metrics, and a profile of some steps."""

import contextlib
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm.auto import tqdm

from nomic_jax.data.batches.stream import Batch
from nomic_jax.model import EncoderConfig
from nomic_jax.train import hosts
from nomic_jax.train.config import TrainConfig
from nomic_jax.train.watch.flops import peak_flops, training_flops
from nomic_jax.train.watch.goodput import Goodput
from nomic_jax.train.watch.metrics import MetricsWriter


class Progress(contextlib.AbstractContextManager["Progress"]):
    """Counts tokens and FLOPs of every step, and reports every ``config.log_every`` steps, in the first process only.

    Rates cover all time since the last line. MFU needs the peak of the device, from its data sheet or from
    ``config.peak_tflops``.

    Attributes:
      last: the metrics of the last line.
    """

    def __init__(
        self,
        config: TrainConfig,
        encoder: EncoderConfig,
        workdir: Path,
        start: int,
        steps: int,
        schedule: Callable[[int], Any],
        goodput: Goodput,
    ):
        self.last: dict[str, float] = {}
        self._config, self._encoder, self._schedule, self._steps = config, encoder, schedule, steps
        self._goodput = goodput
        peak = config.peak_tflops * 1e12 or peak_flops(jax.devices()[0].device_kind)
        self._peak = peak * jax.device_count() if peak else None
        self._writer = MetricsWriter(config, workdir, start) if hosts.is_first_process() else None
        self._bar = tqdm(
            initial=start,
            total=steps,
            desc=config.stage,
            unit=" steps",
            dynamic_ncols=True,
            disable=not hosts.is_first_process(),
        )
        self._trace = Trace(config.profiled_steps, workdir / "profile", start)
        self._accuracy: dict[str, float] = {}
        # Every new set of shapes costs a compilation.
        self._shapes: set[tuple[tuple[int, ...], ...]] = set()
        self._begin_window()

    def _begin_window(self) -> None:
        """Resets the counts of the current line."""
        self._since = time.perf_counter()
        self._window_steps = self._window_real = self._window_padded = 0
        self._window_flops = 0.0

    def add(self, step: int, batch: Batch, metrics: dict[str, jax.Array]) -> None:
        """Called after a step was dispatched. Waits for its metrics only if a line is due."""
        self._shapes.add(tuple(array.shape for array in batch.arrays.values()))
        self._window_steps += 1
        self._window_real += batch.real_tokens
        self._window_padded += batch.padded_tokens
        self._window_flops += training_flops(self._encoder, batch)
        self._trace.at(step, metrics)
        if step % self._config.log_every == 0 or step == self._steps:
            self._report(step, batch, metrics)
        self._bar.update()

    def _report(self, step: int, batch: Batch, metrics: dict[str, jax.Array]) -> None:
        self.last = {name: float(value) for name, value in jax.device_get(metrics).items()}
        seconds = time.perf_counter() - self._since
        updates = int(self.last.pop("updates", step - 1))
        line = self.last | {
            "lr": float(np.asarray(self._schedule(updates))),
            "source": batch.source,
            "real_tokens": batch.real_tokens,
            "padded_tokens": batch.padded_tokens,
            "compiled_shapes": len(self._shapes),
            "seconds_per_step": seconds / self._window_steps,
            "tokens_per_second": self._window_real / seconds,
            "goodput": self._goodput.share,
        }
        if self._peak is not None:
            line["mfu"] = self._window_flops / seconds / self._peak
        if self._writer is not None:
            self._writer.write(step, line)
        shown = {
            "loss": f"{line['loss']:.3f}",
            "lr": f"{line['lr']:.1e}",
            "grad": f"{line['grad_norm']:.2f}",
            "tokens/s": f"{line['tokens_per_second']:,.0f}",
            **({"mfu": f"{line['mfu']:.1%}"} if "mfu" in line else {}),
            "real/padded": f"{self._window_real / self._window_padded:.0%}",
        }
        if "accuracy" in self.last:
            self._accuracy[batch.source] = self.last["accuracy"]
            shown[f"accuracy {batch.source}"] = f"{self.last['accuracy']:.0%}"
            if len(self._accuracy) > 1:
                shown[f"of {len(self._accuracy)} sources"] = f"{statistics.fmean(self._accuracy.values()):.0%}"
        self._bar.set_postfix(shown, refresh=False)
        self._begin_window()

    def show(self, step: int, figures: dict[str, float]) -> None:
        """Shows the scores of an evaluation in the trackers. Its time does not count for the next steps' rates."""
        if self._writer is not None:
            self._writer.show(step, figures)
        self._begin_window()

    def __exit__(self, *_: object) -> None:
        self._trace.stop()
        self._bar.close()
        if self._writer is not None:
            self._writer.close()


class Trace:
    """A profile of a range of steps, first and last included, for TensorBoard's profiler or xprof."""

    def __init__(self, steps: tuple[int, int] | None, directory: Path, start: int):
        self._steps, self._directory, self._running = steps, directory, False
        self.at(start, {})

    def at(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Called after each step was dispatched."""
        if self._steps is None:
            return
        first, last = self._steps
        if step == first - 1:
            # Wait until the devices have finished the step before, so that the trace holds whole steps.
            jax.block_until_ready(metrics)
            jax.profiler.start_trace(str(self._directory))
            self._running = True
        elif step == last and self._running:
            jax.block_until_ready(metrics)
            self.stop()

    def stop(self) -> None:
        if self._running:
            jax.profiler.stop_trace()
            self._running = False

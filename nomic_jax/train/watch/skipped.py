"""Records steps whose loss or gradient was not finite, and ends the run after too many in a row."""

import json
from collections import deque
from pathlib import Path

import jax

from nomic_jax.data.batches.stream import Stream
from nomic_jax.files.writing import append
from nomic_jax.train import hosts
from nomic_jax.train.watch.metrics import keep_until, read_metrics

MOST_IN_A_ROW = 10
# The metrics of a step are read after this number of later steps was dispatched, so that no device waits for the host.
STEPS_LATE = 2


class DivergedError(ValueError):
    """Too many steps in a row were not finite."""


class SkippedSteps:
    """Writes skipped.jsonl: step (as in metrics.jsonl), source, loss, gradient norm, and row numbers by source."""

    def __init__(self, workdir: Path, start_step: int, stream: Stream):
        self._path = Path(workdir) / "skipped.jsonl"
        self._stream = stream
        self._unseen: deque[tuple[int, str, dict[str, jax.Array]]] = deque()
        kept = [line for line in read_metrics(workdir, self._path.name) if line["step"] <= start_step]
        if self._path.exists() and hosts.is_first_process():
            keep_until(self._path, start_step)
        self._in_a_row = 0
        while self._in_a_row < len(kept) and kept[-1 - self._in_a_row]["step"] == start_step - self._in_a_row:
            self._in_a_row += 1

    def add(self, step: int, source: str, metrics: dict[str, jax.Array]) -> None:
        """Adds the metrics of a step, and checks those of the step STEPS_LATE before it.

        Raises:
          DivergedError: MOST_IN_A_ROW steps in a row were not finite.
        """
        self._unseen.append((step, source, metrics))
        while len(self._unseen) > STEPS_LATE:
            self._look(*self._unseen.popleft())

    def catch_up(self) -> None:
        """Looks at all steps so far; a checkpoint must not be ahead of the record."""
        while self._unseen:
            self._look(*self._unseen.popleft())

    def _look(self, step: int, source: str, metrics: dict[str, jax.Array]) -> None:
        if not float(metrics["skipped"]):
            self._in_a_row = 0
            return
        self._in_a_row += 1
        # As text, because JSON has no NaN.
        loss, grad_norm = (str(float(metrics[name])) for name in ("loss", "grad_norm"))
        if hosts.is_first_process():
            line = {"step": step, "source": source, "loss": loss, "grad_norm": grad_norm}
            with append(self._path) as f:
                f.write(json.dumps(line | {"rows": self._stream.row_numbers(step - 1)}) + "\n")
        if self._in_a_row >= MOST_IN_A_ROW:
            raise DivergedError(
                f"the steps {step - MOST_IN_A_ROW + 1} to {step} were not finite (last: loss {loss}, gradient norm "
                f"{grad_norm}) and changed nothing; their rows are in {self._path}. A lower config.optim.lr may help, "
                f"or a look at these rows"
            )

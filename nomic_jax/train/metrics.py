"""Metrics of a run: metrics.jsonl is the record, TensorBoard a view of it."""

import json
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from nomic_jax.data.sources import atomic_file


class MetricsWriter:
    """Appends to a run's metrics, after taking back what a killed run wrote past its last checkpoint."""

    def __init__(self, workdir: Path, start_step: int):
        self._path = workdir / "metrics.jsonl"
        kept = [line for line in read_metrics(workdir) if line["step"] <= start_step]
        with atomic_file(self._path) as part:
            part.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        self._file = self._path.open("a", encoding="utf-8")
        self._tensorboard = SummaryWriter(str(workdir / "tensorboard"), purge_step=start_step + 1)

    def write(self, step: int, values: dict[str, Any]) -> None:
        self._file.write(json.dumps({"step": step} | values) + "\n")
        self._file.flush()
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self._tensorboard.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        self._tensorboard.close()


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl in order; a last line cut off by a kill is left out."""
    path = Path(workdir) / "metrics.jsonl"
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines

"""A run that has been trained: its model, its metrics, and its export."""

import dataclasses
import functools
import os
from pathlib import Path
from typing import Any

from nomic_jax.hf import write_checkpoint
from nomic_jax.inference.classifier import Classifier
from nomic_jax.inference.embedder import Embedder
from nomic_jax.run.pretrained import read_pretrained
from nomic_jax.train.evaluation import read_evaluations
from nomic_jax.train.watch.metrics import read_metrics


class Run:
    """The run in a working directory.

    Attributes:
      workdir: its working directory, which every command takes too.
    """

    def __init__(self, workdir: str | os.PathLike):
        self.workdir = Path(workdir)

    def __repr__(self) -> str:
        figures = ", ".join(f"{name} {value:.4g}" for name, value in self.metrics.items() if name in ("step", "loss"))
        return f"<Run {self.workdir}: {figures or 'no steps'}>"

    @functools.cached_property
    def embedder(self) -> Embedder:
        """The trained model, ready to embed."""
        return Embedder.from_pretrained(self.workdir)

    @functools.cached_property
    def classifier(self) -> Classifier:
        """The trained classifier of a run with ``config="glue"``."""
        return Classifier.from_pretrained(self.workdir)

    @property
    def history(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl: step, loss, accuracy, learning rate, tokens per second, ..."""
        return read_metrics(self.workdir)

    @property
    def metrics(self) -> dict[str, Any]:
        """The figures of the last step; those of the last evaluation as "task/metric"."""
        last = self.history[-1:] or [{}]
        scores = self.evaluations[-1:]
        tasks = scores[0]["tasks"] if scores else {}
        return last[0] | {f"{task}/{name}": value for task, found in tasks.items() for name, value in found.items()}

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """The lines of evaluation.jsonl: step, figure (the mean of the chosen metric), and the scores of each task."""
        return read_evaluations(self.workdir)

    def export(self, path: str | os.PathLike, *, dtype: str = "float32", overwrite: bool = False) -> Path:
        """Writes the embedder as a Hugging Face directory, which sentence-transformers and other clients open.

        ``nomic-jax to-hf`` has further options.

        Args:
          dtype: of the tensors: "float32", "bfloat16" or "float16".
          overwrite: also replace files that no export wrote.

        Raises:
          FileRefused: ``path`` holds files of that name that no export wrote.
        """
        source = read_pretrained(self.workdir)
        encoder = dataclasses.replace(source, params={"encoder": source.params["encoder"]})
        write_checkpoint(Path(path), encoder, dtype=dtype, overwrite=overwrite)
        return Path(path)

"""Tasks whose blocks are arrays, with the settings that ``locked_settings`` has recorded in their work folder."""

import abc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nomic_jax.curate.engine.settings import recorded_settings
from nomic_jax.curate.engine.sharded_array import save_array
from nomic_jax.jobs.tasks import Task


class ArrayTask(Task):
    """A task each of whose blocks is a .npy file."""

    def __init__(self, label: str, work: Path, progress: bool):
        self.label, self.progress, self.work = label, progress, work

    @property
    def records(self) -> Path:
        return self.work / "shards"

    def settings(self) -> Mapping[str, Any]:
        return recorded_settings(self.work)

    @abc.abstractmethod
    def make(self, block: int, encoder: Any) -> np.ndarray:
        """Returns a block. ``encoder`` is the teacher that the task needs, or None for a task that needs none."""

    def write(self, block: int, worker: Any, advance: Callable[[int], Any]) -> None:
        save_array(self.file(block), self.make(block, worker))

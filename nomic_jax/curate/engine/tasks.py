"""Long tasks in shards on disk, shared by any number of processes. A killed process loses only its current shard."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from nomic_jax.curate.engine.embedding import Encoder, Scorer
from nomic_jax.curate.engine.sharded_array import save_array
from nomic_jax.files.locks import claim

WAIT_SECONDS = 1.0  # between two checks on the shards that other processes are making


class Task(Protocol):
    """Work in shards, each of which becomes a file. A task can be pickled: an engine may send it to another machine."""

    label: str
    progress: bool

    def __len__(self) -> int: ...

    def file(self, shard: int) -> Path: ...

    def make(self, shard: int, encoder: Any) -> np.ndarray:
        """Returns a shard. ``encoder`` is the teacher that the task needs, or None for a task that needs none."""
        ...

    def tidy(self, shard: int) -> None:
        """Deletes intermediate files of a finished shard; called after the shard is made and at every start."""


# (task, encoder, wait): makes the missing shards. With ``wait``, it also waits for the shards of other processes, and
# makes those whose process was killed. Without, it returns when no unclaimed shard is left.
Engine = Callable[[Task, Encoder | Scorer | None, bool], None]


def make_shard(task: Task, shard: int, encoder: Encoder | Scorer | None) -> bool:
    """Makes a shard unless its file exists. Returns False if another process is making it."""
    file = task.file(shard)
    if not file.exists():
        with claim(file) as is_ours:
            if not is_ours:
                return False
            # Another process may have made it between the first check and the claim.
            if not file.exists():
                save_array(file, task.make(shard, encoder))
    task.tidy(shard)
    return True


def missing_shards(task: Task) -> list[int]:
    """Returns the shards without a file, and calls ``tidy`` for the others."""
    missing = []
    for shard in range(len(task)):
        if task.file(shard).exists():
            task.tidy(shard)
        else:
            missing.append(shard)
    return missing


def local_engine(task: Task, encoder: Encoder | Scorer | None, wait: bool = True) -> None:
    """The ``Engine`` that makes the shards in this process."""
    pending = missing_shards(task)
    if not pending:
        return
    with tqdm(
        total=len(task), initial=len(task) - len(pending), desc=task.label, unit=" shards", disable=not task.progress
    ) as bar:
        while pending:
            unfinished = []
            for shard in pending:
                if make_shard(task, shard, encoder):
                    bar.update()
                else:
                    unfinished.append(shard)
            if not wait:
                return
            if len(unfinished) == len(pending):
                bar.set_postfix_str(f"waiting for {len(unfinished)} shards of other processes")
                time.sleep(WAIT_SECONDS)
            pending = unfinished

"""Long work kept in shards on disk, shared by any number of processes: a kill costs the shard at hand."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
from tqdm import tqdm

from nomic_jax.curate.engine.embedding import Encoder
from nomic_jax.curate.engine.locks import claim
from nomic_jax.curate.engine.sharded_array import save_array

WAIT_SECONDS = 1.0  # between two looks at what other processes are making


class Task(Protocol):
    """Work in shards, each of which becomes a file. It can be pickled: an engine may carry it to another machine."""

    label: str
    progress: bool

    def __len__(self) -> int: ...

    def file(self, shard: int) -> Path: ...

    def make(self, shard: int, encoder: Encoder | None) -> np.ndarray: ...

    def tidy(self, shard: int) -> None:
        """Called once the shard's file is there, at every start."""


# (task, encoder, wait): makes the shards that are missing. ``wait`` for those that other processes are making, and make
# those whose process was killed; otherwise return when nothing is left to take up.
Engine = Callable[[Task, Encoder | None, bool], None]


def make_shard(task: Task, shard: int, encoder: Encoder | None) -> bool:
    """Makes a shard unless it is there; False if another process is at it."""
    file = task.file(shard)
    if not file.exists():
        with claim(file) as is_ours:
            if not is_ours:
                return False
            # Another process may have made it between the first look and the claim.
            if not file.exists():
                save_array(file, task.make(shard, encoder))
    task.tidy(shard)
    return True


def missing_shards(task: Task) -> list[int]:
    missing = []
    for shard in range(len(task)):
        if task.file(shard).exists():
            task.tidy(shard)
        else:
            missing.append(shard)
    return missing


def run_here(task: Task, encoder: Encoder | None, wait: bool = True) -> None:
    """The engine of one process, an ``Engine``."""
    pending = missing_shards(task)
    if not pending:
        return
    with tqdm(
        total=len(task), initial=len(task) - len(pending), desc=task.label, unit=" shards", disable=not task.progress
    ) as bar:
        while pending:
            left = []
            for shard in pending:
                if make_shard(task, shard, encoder):
                    bar.update()
                else:
                    left.append(shard)
            if not wait:
                return
            if len(left) == len(pending):
                bar.set_postfix_str(f"waiting for {len(left)} shards of other processes")
                time.sleep(WAIT_SECONDS)
            pending = left

"""Long tasks in blocks on disk, shared by any number of processes. A killed process loses only its current block."""

import abc
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from nomic_jax.files.locks import claim
from nomic_jax.files.reading import read_json
from nomic_jax.files.writing import write_json

WAIT_SECONDS = 1.0  # between two checks on the blocks that other processes are making


class Task(abc.ABC):
    """Work in independent blocks, each of which becomes a file or a folder.

    A task can be pickled: an engine may send it to another process or another machine.

    Attributes:
      label: what is done, for progress bars and messages.
      progress: whether there is a progress bar.
      unit: what ``size`` counts.
      is_last: whether the output is written from the blocks. False if they are for another task.
      is_shared: whether other processes may make blocks of the task at the same time. Each block is then claimed.
    """

    label: str
    progress: bool
    unit = " blocks"
    is_last = True
    is_shared = True

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def file(self, block: int) -> Path:
        """The file or folder that a block becomes. It is there only if it is complete."""

    @abc.abstractmethod
    def write(self, block: int, worker: Any, advance: Callable[[int], Any]) -> None:
        """Makes a block and writes its file, which appears complete or not at all.

        Args:
          worker: what the task works with, such as a teacher; None for a task that needs nothing.
          advance: called with the size of what is done, while the block is made. It may be called with less in all.
        """

    @property
    @abc.abstractmethod
    def records(self) -> Path:
        """The folder in which shards leave their records (``nomic_jax.jobs.shards``)."""

    @abc.abstractmethod
    def settings(self) -> Mapping[str, Any]:
        """All that the blocks depend on, as JSON: equal for all shards of a job."""

    def size(self, block: int) -> int:
        return 1

    def made(self) -> set[int]:
        """Returns the blocks that are there. Tasks whose files are not on a file system of this machine override it."""
        return {block for block in range(len(self)) if self.file(block).exists()}

    def write_record(self, name: str, record: Mapping[str, Any]) -> None:
        """Writes a record of a shard."""
        write_json(self.records / name, record)

    def read_records(self, prefix: str) -> Iterator[tuple[str, Any]]:
        """Yields (path, record) of the shards whose names begin with ``prefix``. Raises FileRefused: it is no JSON."""
        for file in sorted(self.records.glob(f"{prefix}*.json")):
            yield str(file), read_json(file)

    def tidy(self, block: int) -> None:  # noqa: B027 (most tasks have nothing to tidy)
        """Deletes intermediate files of a finished block; called after the block is made and at every start."""


# (task, worker, wait): makes the missing blocks. With ``wait``, it also waits for the blocks of other processes, and
# makes those whose process was killed. Without, it returns when no unclaimed block is left.
Engine = Callable[[Task, Any, bool], None]


def make_block(task: Task, block: int, worker: Any, advance: Callable[[int], Any] = lambda size: None) -> bool:
    """Makes one of the ``missing_blocks``, unless it is there by now. Returns False if another process is making it."""
    if not task.is_shared:
        task.write(block, worker, advance)
    elif not (file := task.file(block)).exists():
        with claim(file) as is_ours:
            if not is_ours:
                return False
            # Another process may have made it between the first check and the claim.
            if not file.exists():
                task.write(block, worker, advance)
    task.tidy(block)
    return True


def missing_blocks(task: Task) -> list[int]:
    """Returns the blocks without a file, and calls ``tidy`` for the others."""
    made = task.made()
    for block in made:
        task.tidy(block)
    return [block for block in range(len(task)) if block not in made]


def progress_bar(task: Task, pending: list[int]) -> tqdm:
    """Returns the bar of a task of which the blocks ``pending`` are missing."""
    total = sum(map(task.size, range(len(task))))
    initial = total - sum(map(task.size, pending))
    return tqdm(total=total, initial=initial, desc=task.label, unit=task.unit, disable=not task.progress)


def local_engine(task: Task, worker: Any, wait: bool = True) -> None:
    """The ``Engine`` that makes the blocks in this process."""
    pending = missing_blocks(task)
    if not pending:
        return
    with progress_bar(task, pending) as bar:
        while pending:
            unfinished = []
            for block in pending:
                begun = bar.n
                if make_block(task, block, worker, bar.update):
                    bar.update(task.size(block) - (bar.n - begun))
                else:
                    unfinished.append(block)
            if not wait:
                return
            if len(unfinished) == len(pending):
                bar.set_postfix_str(f"waiting for {len(unfinished)} blocks of other processes")
                time.sleep(WAIT_SECONDS)
            pending = unfinished

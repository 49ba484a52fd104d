"""Saves the checkpoints of a run in the background, prunes them, and verifies them before a run resumes.

A checkpoint holds the trees `params`, `training` (step and optimizer state) and, with a moving average, `ema`, and a
record.
"""

import contextlib
import itertools
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from nomic_jax.files.folders import make_folder, remove_folder
from nomic_jax.files.writing import atomic_link
from nomic_jax.run.record import changed_environment, check_same_arrays, check_same_run, shuffle_of
from nomic_jax.run.workdir import DamagedCheckpoint, commit, finished_steps, latest_intact, list_damage, remove_parts


class SaveError(OSError):
    """A checkpoint could not be written; the message says where, why, and from which step the run can resume."""


class Checkpoints:
    """The checkpoints of one working directory, for the run that uses the directory.

    Opening removes the unfinished checkpoints of a killed run. Damaged checkpoints that are newer than the latest sound
    one are moved aside, with a warning.

    Attributes:
      latest_step: step of the latest sound checkpoint, including one that is being saved; None if there is none.
      best_step: step of the checkpoint that is never pruned and that <workdir>/best links to; None if there is none.

    Raises:
      DamagedCheckpoint: there are checkpoints, but none is sound. They are not moved.
    """

    def __init__(
        self,
        workdir: Path,
        record: dict[str, Any],
        *,
        every: int,
        keep: int,
        keep_every: int = 0,
        on_first_process: Callable[[Callable[[], Any]], Any],
    ):
        self.record, self._every, self._keep, self._keep_every = record, every, keep, keep_every
        self._directory = (workdir / "checkpoints").absolute()
        self.best_step: int | None = None
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._saving: Future[None] | None = None
        # Only one process opens the directory: the others would not find what it moves.
        self.latest_step: int | None = on_first_process(self._open)

    def _open(self) -> int | None:
        self._directory.parent.mkdir(parents=True, exist_ok=True)
        make_folder(self._directory)
        remove_parts(self._directory)
        step, damaged = latest_intact(self._directory)
        if damaged and step is None:
            raise DamagedCheckpoint(
                f"{self._directory} holds no sound checkpoint: {list_damage(damaged)}. "
                f"Restore one from a copy, or choose another --workdir to start from the beginning"
            )
        if damaged:
            warnings.warn(f"{list_damage(damaged)}; resuming from step {step}", stacklevel=1)
        for bad in damaged:
            _move_aside(self._directory / str(bad))
        return step

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.wait()
        elif issubclass(kind, Exception):
            # Finish the checkpoint in progress, but report the error that ends the run, not a failed save.
            with contextlib.suppress(OSError):
                self.wait()
        self._executor.shutdown(wait=False)

    def is_due(self, step: int) -> bool:
        return step % self._every == 0

    def save(self, step: int, trees: dict[str, Any]) -> None:
        """Copies the trees off the devices and writes them in the background, unless the step is already saved.

        Raises:
          SaveError: saving this checkpoint or the previous one failed. The previous save is completed first.
        """
        self.wait()
        if step == self.latest_step:
            return
        self.latest_step = step
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(trees))
        part = self._directory / f"{step}.part"
        with self._explained(step, size):
            metadata = self.record | {"step": step}
            response = ocp.save_checkpointables_async(part, trees, custom_metadata=metadata)
        self._saving = self._executor.submit(self._finish, step, size, part, response)

    def _finish(self, step: int, size: int, part: Path, response: ocp.AsyncResponse[None]) -> None:
        """Runs in parallel with training: neither writing nor hashing holds Python's global lock."""
        with self._explained(step, size):
            response.result()
            if _is_first():
                commit(part)
        if _is_first():
            # Prune only now: the new checkpoint is not finished until its hashes are written.
            self._prune()
            self._link_best()

    def _prune(self) -> None:
        for step in finished_steps(self._directory)[: -self._keep]:
            if step != self.best_step and not (self._keep_every and step and step % self._keep_every == 0):
                # Rename before deleting, so that a kill leaves no partial checkpoint under the name of a finished one.
                old = (self._directory / str(step)).rename(self._directory / f"{step}.old.part")
                remove_folder(old)

    def _link_best(self) -> None:
        if self.best_step is None or not (self._directory / str(self.best_step)).is_dir():
            return
        link = self._directory.parent / "best"
        atomic_link(link, Path("checkpoints") / str(self.best_step))

    @contextlib.contextmanager
    def _explained(self, step: int, size: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            free = shutil.disk_usage(self._directory.parent).free
            if _is_first():
                remove_parts(self._directory, step)
            left = finished_steps(self._directory)
            # Orbax and tensorstore append their long arguments, in brackets and on further lines. Omit them.
            reason = str(error).strip().partition("\n")[0].partition(" [")[0][:300]
            raise SaveError(
                f"step {step} could not be saved to {self._directory} ({reason}): it takes up to {_megabytes(size)}, "
                f"{_megabytes(free)} are free there; "
                + (f"the same command resumes from step {left[-1]}" if left else "there is no earlier checkpoint")
            ) from error

    def check(self) -> None:
        """Raises SaveError if a background save has failed. It is called every step, to report a failure early."""
        if self._saving is not None and self._saving.done():
            self.wait()

    def wait(self) -> None:
        """Waits until no checkpoint is being saved.

        Raises:
          SaveError: the save failed.
        """
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def check_same_run(self) -> None:
        """Checks that the latest checkpoint belongs to this run. It is called before compilation starts.

        Raises:
          ResumeError: the latest checkpoint was made from other data, another tokenizer or another configuration.
        """
        if self.latest_step is not None:
            path = self._directory / str(self.latest_step)
            saved = dict(ocp.checkpointables_metadata(path).custom_metadata or {})
            check_same_run(saved, self.record, path)
            if _is_first() and (changes := changed_environment(saved, self.record)):
                warnings.warn(
                    f"resuming under another environment ({'; '.join(changes)}): the rest of the run may differ in the "
                    f"last bits from one that was not interrupted",
                    stacklevel=2,
                )

    def restore(self, like: dict[str, Any]) -> dict[str, Any]:
        """Returns the trees of the latest checkpoint, with the shapes, types and shardings of ``like``.

        Raises:
          ResumeError: the checkpoint belongs to another optimizer or model.
        """
        path = self._directory / str(self.latest_step)
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        check_same_arrays(ocp.checkpointables_metadata(path).metadata, abstract)
        return ocp.load_checkpointables(path, abstract)


def recorded_shuffle(workdir: Path) -> int | None:
    """Returns the version of the permutation that the run in ``workdir`` began with; None if it has no checkpoint.

    All checkpoints of a run have the same version.

    Raises:
      ResumeError: this version of nomic_jax does not have it.
    """
    record = latest_record(workdir)
    return None if record is None else shuffle_of(record)


def latest_record(workdir: Path) -> dict[str, Any] | None:
    """Returns the record of the latest checkpoint of the run in ``workdir``; None if it has none that can be read."""
    directory = (workdir / "checkpoints").absolute()
    for step in reversed(finished_steps(directory) if directory.is_dir() else []):
        # A checkpoint that cannot be read raises various exceptions; it is reported when the checkpoints are opened.
        with contextlib.suppress(Exception):
            if record := ocp.checkpointables_metadata(directory / str(step)).custom_metadata:
                return dict(record)
    return None


def _is_first() -> bool:
    """Returns whether this process writes the files that only one process writes."""
    return jax.process_index() == 0


def _move_aside(path: Path) -> None:
    rejected = path.parent.parent / "rejected"
    make_folder(rejected)
    names = (f"{path.name}{f'-{i}' if i else ''}" for i in itertools.count())
    path.rename(next(rejected / name for name in names if not os.path.lexists(rejected / name)))


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"

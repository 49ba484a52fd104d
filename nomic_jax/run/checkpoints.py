"""The checkpoints of a run: saved in the background, pruned, and found sound before a run goes on from one.

A checkpoint holds the trees `params` and `training` (step and optimizer state), and a record.
"""

import contextlib
import itertools
import shutil
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from nomic_jax.run.record import check_same_arrays, check_same_run
from nomic_jax.run.workdir import DamagedCheckpoint, commit, finished_steps, latest_sound, list_damage


class SaveError(OSError):
    """A checkpoint could not be written; the message says where, why, and what is left to go on from."""


class Checkpoints:
    """The checkpoints of one working directory, for the run in it.

    On opening, what a killed run left unfinished is removed, and checkpoints that are damaged and newer than the latest
    sound one are moved aside, with a warning.

    Attributes:
      latest_step: of the latest sound checkpoint, that under way included; None if there is none at all.
      best_step: the one that is never pruned, and that <workdir>/best is a link to; None if there is none.

    Raises:
      DamagedCheckpoint: there are checkpoints, and none is sound; they stay where they are.
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
        # By one process: others would find gone what it moves.
        self.latest_step: int | None = on_first_process(self._open)

    def _open(self) -> int | None:
        self._directory.mkdir(parents=True, exist_ok=True)
        for path in self._directory.glob("*.part*"):
            shutil.rmtree(path, ignore_errors=True)
        step, damaged = latest_sound(self._directory)
        if damaged and step is None:
            raise DamagedCheckpoint(
                f"{self._directory} holds no sound checkpoint: {list_damage(damaged)}. "
                f"Fetch one again, or take another --workdir to start from the beginning"
            )
        if damaged:
            warnings.warn(f"{list_damage(damaged)}; going on from step {step}", stacklevel=1)
        for bad in damaged:
            _move_aside(self._directory / str(bad))
        return step

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.wait()
        elif issubclass(kind, Exception):
            # What is being written will be of use; the error to hear of is the one that ends the run.
            with contextlib.suppress(OSError):
                self.wait()
        self._executor.shutdown(wait=False)

    def is_due(self, step: int) -> bool:
        return step % self._every == 0

    def save(self, step: int, trees: dict[str, Any]) -> None:
        """Copies the trees off the devices and writes them in the background, unless the step is saved already.

        Raises:
          SaveError: of this checkpoint or of the one before, which is waited for.
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
        """Runs beside the training: neither the writing nor the hashing holds Python's lock."""
        with self._explained(step, size):
            response.result()
            if _is_first():
                commit(part)
        if _is_first():
            # Only now: until its hashes are written, the new checkpoint is none.
            self._prune()
            self._link_best()

    def _prune(self) -> None:
        for step in finished_steps(self._directory)[: -self._keep]:
            if step != self.best_step and not (self._keep_every and step and step % self._keep_every == 0):
                # By a rename first: a kill must not leave half a checkpoint under the name of a whole one.
                old = (self._directory / str(step)).rename(self._directory / f"{step}.old.part")
                shutil.rmtree(old, ignore_errors=True)

    def _link_best(self) -> None:
        if self.best_step is None or not (self._directory / str(self.best_step)).is_dir():
            return
        link = self._directory.parent / "best"
        new = link.with_name("best.part")
        new.unlink(missing_ok=True)
        new.symlink_to(Path("checkpoints") / str(self.best_step))
        new.rename(link)

    @contextlib.contextmanager
    def _explained(self, step: int, size: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            free = shutil.disk_usage(self._directory.parent).free
            if _is_first():
                for path in self._directory.glob(f"{step}.part*"):
                    shutil.rmtree(path, ignore_errors=True)
            left = finished_steps(self._directory)
            # Orbax and tensorstore add what they were given, at length, in brackets and further lines.
            reason = str(error).strip().partition("\n")[0].partition(" [")[0][:300]
            raise SaveError(
                f"step {step} could not be saved to {self._directory} ({reason}): it takes up to {_megabytes(size)}, "
                f"{_megabytes(free)} are free there; "
                + (f"the same command goes on from step {left[-1]}" if left else "there is no earlier checkpoint")
            ) from error

    def check(self) -> None:
        """Raises SaveError if what was being written has failed; called every step, so that it is not for long."""
        if self._saving is not None and self._saving.done():
            self.wait()

    def wait(self) -> None:
        """Until nothing is being written.

        Raises:
          SaveError: it failed.
        """
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def check_same_run(self) -> None:
        """Before anything is compiled.

        Raises:
          ResumeError: the latest checkpoint was made from other data, another tokenizer or another configuration.
        """
        if self.latest_step is not None:
            path = self._directory / str(self.latest_step)
            check_same_run(dict(ocp.checkpointables_metadata(path).custom_metadata or {}), self.record, path)

    def restore(self, like: dict[str, Any]) -> dict[str, Any]:
        """The trees of the latest checkpoint, with the shapes, types and shardings of ``like``.

        Raises:
          ResumeError: another optimizer made it, or another model.
        """
        path = self._directory / str(self.latest_step)
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        check_same_arrays(ocp.checkpointables_metadata(path).metadata, abstract)
        return ocp.load_checkpointables(path, abstract)


def _is_first() -> bool:
    """Whether this process writes what is written once."""
    return jax.process_index() == 0


def _move_aside(path: Path) -> None:
    rejected = path.parent.parent / "rejected"
    rejected.mkdir(exist_ok=True)
    names = (f"{path.name}{f'-{i}' if i else ''}" for i in itertools.count())
    path.rename(next(rejected / name for name in names if not (rejected / name).exists()))


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"

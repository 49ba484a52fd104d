"""Refuses to compute in a forked child of a process that uses JAX, where a computation would wait for ever."""

import os

# There is no public way to ask whether JAX has started its threads.
from jax._src import xla_bridge

from nomic_jax.files.system import after_fork_in_child

_parent: int | None = None


def _note_fork() -> None:
    global _parent
    if xla_bridge.backends_are_initialized():
        _parent = os.getppid()


after_fork_in_child(_note_fork)


def check_not_forked() -> None:
    """Raises RuntimeError in a child that was forked after its parent had used JAX: JAX's threads are not copied."""
    if _parent is not None:
        raise RuntimeError(
            f"process {os.getpid()} was forked from process {_parent}, which had already used JAX; JAX cannot compute "
            f'here. Start workers with multiprocessing.get_context("spawn") (or "forkserver"), or fork before JAX is '
            f"used and open the model in each worker"
        )

"""The flags that say where a command works: on this machine, on a Ray cluster, or as a shard of a job array."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from typing import Any

from absl import flags

from nomic_jax.jobs.processes import process_engine, worker_processes
from nomic_jax.jobs.shards import MERGE, merge_engine, parse_shard, shard_engine
from nomic_jax.jobs.tasks import Engine, local_engine

from .errors import refer

ENGINE = flags.DEFINE_enum(
    "engine", "local", ["local", "ray"], "local: this machine, with all its devices. ray: a Ray cluster (extra `ray`)."
)
WORKERS = flags.DEFINE_integer(
    "workers",
    None,
    "With --engine=ray: actors of the cluster, each with a model [one per GPU; without GPUs, one per node], or without "
    "one [one per CPU]. On this machine: processes of pretokenize [one per core] and of clean [1].",
    lower_bound=0,
)
SHARD = flags.DEFINE_string(
    "shard",
    None,
    "For job arrays. I/N: do only the I-th of N shares of the work, and write no output. merge, once all shards have "
    "ended: write the output, or say what is missing.",
)


def choose(load: Callable[[], Any] | None, local: Engine = local_engine, *, on_gpus: bool = True) -> Engine:
    """The engine that the flags select.

    Args:
      load: opens, in each actor of Ray, what the work is done with; None for nothing.
      local: makes blocks on this machine.
      on_gpus: whether the work is done on GPUs where there are any.
    """
    if SHARD.value == MERGE:
        return merge_engine()
    engine = _ray(load, on_gpus) if ENGINE.value == "ray" else local
    return shard_engine(parse_shard(SHARD.value), engine) if SHARD.value else engine


def _ray(load: Callable[[], Any] | None, on_gpus: bool) -> Engine:
    from nomic_jax.jobs.ray_engine import ray_engine

    made = ray_engine(load, WORKERS.value, on_gpus=on_gpus)
    from ray import cloudpickle

    # The other machines have nomic_jax installed, but not the launch package.
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == __package__:
            cloudpickle.register_pickle_by_value(module)
    return made


def is_given() -> bool:
    """Whether the work is not simply done in this process."""
    return ENGINE.value == "ray" or SHARD.value is not None


def dtype(wanted: str) -> str:
    """Returns what --dtype=auto stands for on a Ray cluster: decided here for all, as results record it."""
    if wanted != "auto" or ENGINE.value != "ray" or SHARD.value == MERGE:
        return wanted
    from nomic_jax.jobs.ray_engine import cluster_gpus

    return "bfloat16" if cluster_gpus() else "float32"


def is_shard() -> bool:
    """Whether the command does a share of the work, and not the merge."""
    return SHARD.value not in (None, MERGE)


@contextlib.contextmanager
def on_cpus(load: Callable[[], Any] | None, workers: int) -> Iterator[tuple[Engine, Executor | None]]:
    """Yields the engine for work without a model, and the processes of this machine; None if it has only this one.

    Args:
      load: a function of nomic_jax that opens, in each process, what the work is done with; None for nothing.
      workers: processes on this machine, without --workers.
    """
    is_here = ENGINE.value == "local" and SHARD.value != MERGE
    with worker_processes(load, (WORKERS.value or workers) if is_here else 1) as pool:
        yield choose(load, process_engine(pool) if pool else local_engine, on_gpus=False), pool


def leave_devices_to_actors() -> None:
    """Keeps jax in this process off the devices: the actors of Ray use them, and a merge needs none."""
    if ENGINE.value == "ray" or SHARD.value == MERGE:
        import jax

        jax.config.update("jax_platforms", "cpu")


if __name__ == "__main__":
    refer("engine", __doc__, "embed")

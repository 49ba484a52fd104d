"""The engine for several machines: the blocks of a task are rows of a Ray data set, made by actors.

All machines must have nomic_jax installed and see the output under the same path (NFS, for instance). Ray finds its
cluster in its usual way (RAY_ADDRESS); without a cluster, it starts on this machine.
"""

import logging
import os
import time
from collections.abc import Callable
from typing import Any

from nomic_jax.extras import needs
from nomic_jax.jobs.tasks import WAIT_SECONDS, Engine, Task, make_block, missing_blocks, progress_bar


def ray_engine(load: Callable[[], Any] | None, workers: int | None = None, *, on_gpus: bool = True) -> Engine:
    """Returns an ``Engine`` that runs on Ray Data.

    Args:
      load: opens in each actor what the blocks are made with, such as a teacher; None for nothing. It is pickled.
      workers: number of actors; None for one per GPU of the cluster, or one per node if there are no GPUs.
      on_gpus: whether the blocks are made on GPUs where there are any. Without, None stands for one actor per CPU.

    Raises:
      MissingPackage: ray is not installed.
    """
    ray = _connected()
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False

    def run(task: Task, worker: Any, wait: bool = True) -> None:
        pending = missing_blocks(task)
        if not pending:
            return
        with progress_bar(task, pending) as bar:
            while pending:
                made = _make(pending, task, worker, load, workers, on_gpus, bar)
                pending = missing_blocks(task)
                if not wait:
                    return
                if pending and not made:
                    time.sleep(WAIT_SECONDS)

    return run


def cluster_gpus() -> int:
    """Returns the number of GPUs of the cluster. Raises ModuleNotFoundError: ray is not installed."""
    return int(_connected().cluster_resources().get("GPU", 0))


def _connected() -> Any:
    """Returns the module ``ray``, connected to its cluster."""
    with needs("--engine=ray", "nomic_jax[ray]"):
        import ray.data

    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    return ray


def _make(
    pending: list[int],
    task: Task,
    worker: Any,
    load: Callable[[], Any] | None,
    workers: int | None,
    on_gpus: bool,
    bar: Any,
) -> int:
    import ray.data

    # A task that works with nothing, such as a search, needs no GPU.
    load = None if worker is None else load
    resources, gpus = ray.cluster_resources(), cluster_gpus() if on_gpus else 0
    nodes = sum(node["Alive"] for node in ray.nodes())
    # One CPU stays free for Ray's own tasks; the other CPUs are divided among the actors, for numpy and faiss.
    processors = resources.get("CPU", 1.0)
    default = gpus or nodes if on_gpus else max(1, int(processors) - 1)
    count = min(workers or default, len(pending))
    cpus = max((processors - 1) // count, min(1.0, processors / count))
    blocks = ray.data.from_items([{"block": block} for block in pending], override_num_blocks=len(pending))
    rows = blocks.map(
        _Worker,  # type: ignore[arg-type]
        fn_constructor_args=(task, load, on_gpus),
        num_cpus=cpus if on_gpus else min(1.0, cpus),
        num_gpus=min(1.0, gpus / count) if worker is not None and gpus else None,
        compute=ray.data.ActorPoolStrategy(size=count, max_tasks_in_flight_per_actor=1),
    )
    made = 0
    for row in rows.iter_rows():
        if row["error"]:
            raise ValueError(row["error"])
        made += row["made"]
        bar.update(task.size(row["block"]) if row["made"] else 0)
    return made


class _Worker:
    """An actor, which makes blocks."""

    def __init__(self, task: Task, load: Callable[[], Any] | None, on_gpus: bool):
        self.task, self.load = task, load
        self.worker: Any = None
        if not on_gpus:
            os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the other cores have their own actors

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            if self.load and self.worker is None:
                self.worker = self.load()
            return row | {"made": int(make_block(self.task, row["block"], self.worker)), "error": ""}
        except (ValueError, OSError, ModuleNotFoundError) as error:
            # Returned for the user to read: Ray would wrap an exception and add the traces of three processes.
            return row | {"made": 0, "error": str(error)}

"""The engine for several machines: the shards of a task are rows of a Ray data set, made by actors with the encoder.

All machines must have nomic_jax installed and see the output under the same path (NFS, for instance). Ray finds its
cluster in its usual way (RAY_ADDRESS); without a cluster, it starts on this machine.
"""

import logging
import time
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from nomic_jax.curate.engine.embedding import Encoder, Scorer
from nomic_jax.curate.engine.tasks import WAIT_SECONDS, Engine, Task, make_shard, missing_shards
from nomic_jax.extras import needs


def ray_engine(load: Callable[[], Encoder | Scorer], workers: int | None = None) -> Engine:
    """Returns an ``Engine`` that runs on Ray Data.

    Args:
      load: opens the encoder in each actor. It is pickled.
      workers: number of actors; None for one per GPU of the cluster, or one per node if there are no GPUs.

    Raises:
      MissingPackage: ray is not installed.
    """
    ray = _connected()
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False

    def run(task: Task, encoder: Encoder | Scorer | None, wait: bool = True) -> None:
        pending = missing_shards(task)
        if not pending:
            return
        with tqdm(
            total=len(task),
            initial=len(task) - len(pending),
            desc=task.label,
            unit=" shards",
            disable=not task.progress,
        ) as bar:
            while pending:
                made = _make(pending, task, load if encoder else None, workers, bar)
                pending = missing_shards(task)
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
    pending: list[int], task: Task, load: Callable[[], Encoder | Scorer] | None, workers: int | None, bar: Any
) -> int:
    import ray.data

    resources, gpus = ray.cluster_resources(), cluster_gpus()
    nodes = sum(node["Alive"] for node in ray.nodes())
    count = min(workers or gpus or nodes, len(pending))
    # One CPU stays free for Ray's own tasks; the other CPUs are divided among the actors, for numpy and faiss.
    processors = resources.get("CPU", 1.0)
    cpus = max((processors - 1) // count, min(1.0, processors / count))
    shards = ray.data.from_items([{"shard": shard} for shard in pending], override_num_blocks=len(pending))
    rows = shards.map(
        _Worker,  # type: ignore[arg-type]
        fn_constructor_args=(task, load),
        num_cpus=cpus,
        num_gpus=min(1.0, gpus / count) if load and gpus else None,
        compute=ray.data.ActorPoolStrategy(size=count, max_tasks_in_flight_per_actor=1),
    )
    made = 0
    for row in rows.iter_rows():
        if row["error"]:
            raise ValueError(row["error"])
        made += row["made"]
        bar.update(row["made"])
    return made


class _Worker:
    """An actor, which makes shards."""

    def __init__(self, task: Task, load: Callable[[], Encoder | Scorer] | None):
        self.task, self.load = task, load
        self.encoder: Encoder | Scorer | None = None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            if self.load and self.encoder is None:
                self.encoder = self.load()
            return row | {"made": int(make_shard(self.task, row["shard"], self.encoder)), "error": ""}
        except (ValueError, OSError, ModuleNotFoundError) as error:
            # Returned for the user to read: Ray would wrap an exception and add the traces of three processes.
            return row | {"made": 0, "error": str(error)}

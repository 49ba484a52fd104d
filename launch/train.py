"""Trains one stage.

    python -m launch.train --config=configs/mlm.py[:variant] --workdir=DIR [--config.field=value ...]

The same command goes on from the latest checkpoint of the working directory. What the fields of a configuration mean
stands in nomic_jax/train/config.py.

On several hosts, start the same command on each: by srun (launch/slurm/), as pods of a JobSet (launch/k8s/), or by hand
with --coordinator_address=HOST:PORT --num_processes=N --process_id=I. The working directory must be on a file system
that all hosts share. A cache of tokens that they share is made once; otherwise each host makes its own.
"""

import jax
from absl import flags
from ml_collections import config_flags

from launch.errors import run
from launch.evaluate import embed_with
from nomic_jax.evals.suites.local import find_tasks, read_task
from nomic_jax.evals.tasks.retrieval import RetrievalTask
from nomic_jax.hf import Checkpoint
from nomic_jax.inference.embedder import Embedder
from nomic_jax.train import hosts
from nomic_jax.train.config import EvaluationConfig, TrainConfig
from nomic_jax.train.evaluation import Evaluate, check_metric
from nomic_jax.train.interruption import exit_on_sigterm
from nomic_jax.train.loop import train
from nomic_jax.train.watch.goodput import process_began

_CONFIG = config_flags.DEFINE_config_file("config", None, "configs/mlm.py, contrastive.py, finetune.py or glue.py")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where checkpoints, metrics and the resolved configuration go.", required=True
)
_COORDINATOR = flags.DEFINE_string("coordinator_address", None, "host:port of the process with --process_id=0.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Processes of the run, over all hosts.", lower_bound=1)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this one is, from 0.", lower_bound=0)
_DISTRIBUTED = flags.DEFINE_enum(
    "distributed",
    "auto",
    ["auto", "jax", "off"],
    "Without the three flags above: auto joins the processes that one srun has started; jax takes what JAX itself "
    "finds out (Open MPI, the Kubernetes API, TPU pods); off, and auto where there is no such srun, is one process.",
)
flags.mark_flag_as_required("config")


def main(_: list[str]) -> None:
    exit_on_sigterm()
    config = TrainConfig.from_mapping(_CONFIG.value.to_dict())
    _join()
    if hosts.is_first_process():
        processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
        print(f"{config.stage}: {jax.device_count()} device(s){processes}, {jax.devices()[0].device_kind}")
    evaluate = make_evaluation(config.evaluation) if config.evaluation.every else None
    last = train(config, _WORKDIR.value, evaluate=evaluate, began=process_began())
    if not hosts.is_first_process():
        return
    if last:
        print(f"{config.stage}: finished with " + ", ".join(f"{name} {value:.4g}" for name, value in last.items()))
    else:
        print(f"{config.stage}: {_WORKDIR.value} is at its last step")


def make_evaluation(config: EvaluationConfig) -> Evaluate:
    """Scores on local tasks; they are read now, so that a fault in them is not found an hour later."""
    read = {name: read_task(folder) for name, folder in find_tasks(config.tasks.split(",")).items()}
    check_metric(config.metric, [task.metrics for task in read.values()])

    def evaluate(model: Checkpoint) -> dict[str, dict[str, float]]:
        embedder = Embedder.from_checkpoint(model)
        return {
            name: dict(task.run(embed_with(embedder, normalize=isinstance(task, RetrievalTask))))
            for name, task in read.items()
        }

    return evaluate


def _join() -> None:
    """Makes this process one of several, if it is to be; JAX wants that before anything else."""
    place = hosts.place_from_flags(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    how = _DISTRIBUTED.value
    if place is not None and how != "auto":
        raise hosts.DistributedError(f"--distributed={how} and --coordinator_address exclude each other; leave one out")
    if place is None and how == "auto":
        place = hosts.place_from_slurm()
    if how == "jax":
        hosts.connect_as_jax_finds()
    elif place is not None:
        hosts.connect(place)


if __name__ == "__main__":
    with hosts.leave_on_error():
        run(main)

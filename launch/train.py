"""Trains one stage.

    nomic-jax train --config=mlm[:variant] --workdir=DIR [--config.field=value ...]

The same command continues from the latest checkpoint in the working directory. The fields of a configuration are
explained below.

On several hosts, start the same command on each: by srun (launch/slurm/), as pods of a JobSet (launch/k8s/), or by hand
with --coordinator_address=HOST:PORT --num_processes=N --process_id=I. The working directory must be on a file system
that all hosts share. A shared token cache is written once; otherwise each host writes its own.
"""

from absl import flags

from nomic_jax.fitting.stage import run_stage
from nomic_jax.inference.compilation_cache import use_compilation_cache
from nomic_jax.train import hosts
from nomic_jax.train.config import TrainConfig
from nomic_jax.train.interruption import exit_on_sigterm
from nomic_jax.train.watch.goodput import process_began

from . import config_files
from .errors import run

_CONFIG = config_files.define(
    "config", "mlm, contrastive, finetune, glue, or a .py file; with :variant if wanted, such as mlm:debug."
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder for checkpoints, metrics and the resolved configuration.", required=True
)
_COORDINATOR = flags.DEFINE_string("coordinator_address", None, "host:port of the process with --process_id=0.")
_NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "Number of processes of the run, over all hosts.", lower_bound=1
)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Number of this process, from 0.", lower_bound=0)
_DISTRIBUTED = flags.DEFINE_enum(
    "distributed",
    "auto",
    ["auto", "jax", "off"],
    "Used without the three flags above. auto: join the processes started by the same srun; without srun, run one "
    "process. jax: let JAX detect the processes (Open MPI, the Kubernetes API, TPU pods). off: run one process.",
)
flags.mark_flag_as_required("config")


def main(_: list[str]) -> None:
    exit_on_sigterm()
    use_compilation_cache()
    config = TrainConfig.from_mapping(_CONFIG.value.to_dict())
    _join()
    run_stage(config, _WORKDIR.value, began=process_began())


def _join() -> None:
    """Joins the processes of a distributed run, if there is one. JAX requires this before any other call."""
    place = hosts.place_from_flags(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    mode = _DISTRIBUTED.value
    if place is not None and mode != "auto":
        raise hosts.DistributedError(
            f"--distributed={mode} and --coordinator_address exclude each other; leave one out"
        )
    if place is None and mode == "auto":
        place = hosts.place_from_slurm()
    if mode == "jax":
        hosts.connect_as_jax_finds()
    elif place is not None:
        hosts.connect(place)


if __name__ == "__main__":
    with hosts.leave_on_error():
        run(main)

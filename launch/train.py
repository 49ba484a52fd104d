"""Trains one stage.

    python -m launch.train --config=configs/mlm.py[:variant] --workdir=DIR [--config.field=value ...]

The same command goes on from the latest checkpoint of the working directory. What the fields of a configuration mean
stands in nomic_jax/train/config.py.
"""

import jax
from absl import flags
from ml_collections import config_flags

from launch.errors import run
from nomic_jax.train.config import TrainConfig
from nomic_jax.train.loop import train

_CONFIG = config_flags.DEFINE_config_file("config", None, "configs/mlm.py, contrastive.py or finetune.py")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where checkpoints, metrics and the resolved configuration go.", required=True
)
flags.mark_flag_as_required("config")


def main(_: list[str]) -> None:
    config = TrainConfig.from_mapping(_CONFIG.value.to_dict())
    print(f"{config.stage}: {jax.device_count()} device(s), {jax.devices()[0].device_kind}")
    last = train(config, _WORKDIR.value)
    if last:
        print(f"{config.stage}: finished with " + ", ".join(f"{name} {value:.4g}" for name, value in last.items()))
    else:
        print(f"{config.stage}: {_WORKDIR.value} is at its last step")


if __name__ == "__main__":
    run(main)

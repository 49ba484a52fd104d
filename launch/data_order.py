"""Prints the rows that are in the batch of a training step: python -m launch.data_order RUN --step=N

It prints one JSON line for each source: {"source": name, "rows": [numbers]}. Rows count from 0 and exclude rejected
rows; in the masked-LM stage they are rows of seq_len tokens. Steps count from 1, as in metrics.jsonl.
"""

import dataclasses
import json
from pathlib import Path

from absl import flags

from launch.errors import run
from nomic_jax.data.tokens.tokenizer import Tokenizer
from nomic_jax.train.config import TrainConfig
from nomic_jax.train.objectives import make_stream

FLAGS = flags.FLAGS


def main(arguments: list[str]) -> None:
    workdir = Path(arguments[0])
    if not (workdir / "config.json").exists():
        raise FileNotFoundError(f"{workdir} is not the working directory of a run: it has no config.json")
    config = TrainConfig.from_mapping(json.loads((workdir / "config.json").read_text(encoding="utf-8")))
    if FLAGS.mixture:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, mixture=FLAGS.mixture))
    stream = make_stream(config, Tokenizer.from_directory(workdir))
    for source, rows in stream.row_numbers(FLAGS.step - 1).items():
        print(json.dumps({"source": source, "rows": rows}))


if __name__ == "__main__":
    flags.DEFINE_integer("step", None, "The step whose batch is printed.", required=True, lower_bound=1)
    flags.DEFINE_string("mixture", "", "Current path of the data, if it differs from the run's config.json.")
    run(main, ("RUN",))

"""Prints the rows that are in the batch of a training step: nomic-jax data-order RUN --step=N --recorded_paths

It prints one JSON line for each source: {"source": name, "rows": [numbers]}. Rows count from 0 and exclude rejected
rows; in the masked-LM stage they are rows of seq_len tokens. Steps count from 1, as in metrics.jsonl.

--recorded_paths opens the data and the cache that the run's config.json names, for a run of your own or one that you
trust; --mixture says where your copy of the data is.
"""

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

from absl import flags

from nomic_jax.data.batches.permutation import VERSION
from nomic_jax.data.tokens.tokenizer import Tokenizer
from nomic_jax.files.reading import read_json
from nomic_jax.run.checkpoints import recorded_shuffle
from nomic_jax.train.config import TrainConfig
from nomic_jax.train.objectives import make_stream

from .errors import run

FLAGS = flags.FLAGS


def main(arguments: list[str]) -> None:
    workdir = Path(arguments[0])
    if not (workdir / "config.json").exists():
        raise FileNotFoundError(f"{workdir} is not the working directory of a run: it has no config.json")
    config = TrainConfig.from_mapping(read_json(workdir / "config.json", within=workdir))
    if not (FLAGS.mixture or FLAGS.recorded_paths):
        raise ValueError(
            f"the run names data outside of its folder: {config.data.mixture!r}. If the run is yours, or you trust it, "
            f"write --recorded_paths to open them; or say where your copy is with --mixture"
        )
    data: dict[str, Any] = {"mixture": FLAGS.mixture or config.data.mixture}
    with tempfile.TemporaryDirectory(prefix="data_order-") as own:
        if hasattr(config.data, "cache_dir") and (FLAGS.cache_dir or not FLAGS.recorded_paths):
            data["cache_dir"] = FLAGS.cache_dir or own
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, **data))
        shuffle = recorded_shuffle(workdir) or VERSION
        stream = make_stream(config, Tokenizer.from_directory(workdir), shuffle=shuffle)
        for source, rows in stream.row_numbers(FLAGS.step - 1).items():
            print(json.dumps({"source": source, "rows": rows}))


if __name__ == "__main__":
    flags.DEFINE_integer("step", None, "The step whose batch is printed.", required=True, lower_bound=1)
    flags.DEFINE_bool("recorded_paths", False, "Open the data and the cache that the run's config.json names.")
    flags.DEFINE_string("mixture", "", "Path of the data. [that of config.json, with --recorded_paths]")
    flags.DEFINE_string(
        "cache_dir", "", "Folder for the tokenised data. [that of config.json with --recorded_paths, else a new one]"
    )
    run(main, ("RUN",))

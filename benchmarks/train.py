"""Compares the training speed of the three stages with a plain torch loop.

    python -m benchmarks.train [--stages=mlm,contrastive,finetune] [--steps=3] [--layers=12] [--dtype=float32]

Both sides have the same model, weights, batch, loss and optimizer. On a CPU they compute in float32; on a GPU in
bfloat16 with float32 master weights (torch: autocast, SDPA). Words follow Zipf's law (benchmarks/loads.py), and lengths
are log-normal, like those of real pairs. Each side runs in a separate process, one after the other: in a shared process
or in turns, the memory that one side leaves free determines the speed of the other. The first step is not counted; the
table shows medians. If the losses of the first step disagree, the command fails.

torch pads every batch to its longest text. Both sides compute the logits of the masked-LM head only at predicted
positions. `--layout` is the layout of nomic_jax's contrastive and finetune batches.
"""

import argparse
import dataclasses
import importlib.metadata
import multiprocessing
import statistics
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.encode import bert_tokenizer
from benchmarks.loads import Load, mlm_load, pair_load
from benchmarks.steps import TrainStep, paper_settings
from benchmarks.timing import timed
from nomic_jax.hf import Checkpoint, write_checkpoint
from nomic_jax.model import EmbeddingConfig
from nomic_jax.train.config import TrainConfig

# (rows, negatives, median tokens of a query, median tokens of a document, longest text) of a batch.
ON_CPU = {"mlm": (4, 0, 0, 0, 512), "contrastive": (16, 0, 12, 60, 256), "finetune": (4, 7, 12, 60, 128)}
ON_GPU = {"mlm": (64, 0, 0, 0, 2048), "contrastive": (256, 0, 20, 150, 512), "finetune": (32, 7, 20, 120, 512)}


def make_load(stage: str, rows: int, negatives: int, query: int, document: int, longest: int, layout: str) -> Load:
    if stage == "mlm":
        return mlm_load(rows, longest)
    rng = np.random.default_rng(0)

    def lengths(median: int, *shape: int) -> np.ndarray:
        return np.clip(np.round(median * np.exp(0.7 * rng.standard_normal(shape))), 4, longest).astype(int)

    query_length, document_length = lengths(query, rows), lengths(document, rows, 1 + negatives)
    return pair_load(stage, query_length, document_length, layout=layout, longest=longest)


class Side(NamedTuple):
    """The result of one side.

    Attributes:
      first: seconds of compilation and the first step.
      seconds: seconds of each further step.
      loss: loss of the first step.
    """

    first: float
    seconds: list[float]
    loss: float


def settings_and_load(name: str, args: argparse.Namespace, on_gpu: bool) -> tuple[TrainConfig, Load]:
    model = dict(
        num_layers=args.layers,
        dtype=args.dtype or ("bfloat16" if on_gpu else "float32"),
        recompute="attention" if on_gpu else "none",
    )
    fields = {} if name == "mlm" else dict(data=dict(layout=args.layout), kept_chunks=float(args.layout == "packed"))
    load = make_load(name, *(ON_GPU if on_gpu else ON_CPU)[name], args.layout)
    return paper_settings(name, model, **fields), load


def train_with_nomic_jax(name: str, args: argparse.Namespace, directory: Path) -> tuple[TrainConfig, Load, str, Side]:
    """Trains, and writes the checkpoint that it started from to ``directory``."""
    settings, load = settings_and_load(name, args, jax.default_backend() == "gpu")
    step = TrainStep(settings, load)
    seconds = step.compile()
    step.start()
    written = EmbeddingConfig(dataclasses.replace(settings.model, dtype="float32"))
    write_checkpoint(directory, Checkpoint(written, jax.device_get(step.state.params), bert_tokenizer()))
    side = steps_of(step, args.steps)
    return settings, load, jax.devices()[0].device_kind, side._replace(first=seconds + side.first)


def train_with_torch(settings: TrainConfig, load: Load, directory: Path, steps: int) -> Side:
    from benchmarks.torch_peers import TorchStep

    return steps_of(TorchStep(settings, load, directory), steps)


def steps_of(step: Callable[[], float], count: int) -> Side:
    (first, loss), *others = [timed(step) for _ in range(1 + count)]
    return Side(first, [seconds for seconds, _ in others], loss)


def measure(name: str, args: argparse.Namespace) -> str:
    """A row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        settings, load, device, ours = in_new_process(train_with_nomic_jax, name, args, Path(folder))
        theirs = in_new_process(train_with_torch, settings, load, Path(folder), args.steps)
    np.testing.assert_allclose(ours.loss, theirs.loss, rtol=2e-2 if settings.model.dtype == "bfloat16" else 1e-4)
    ours_s, theirs_s = (statistics.median(side.seconds) for side in (ours, theirs))
    return (
        f"| {name} | {device} | {load.real_tokens:,} | {ours_s:.2f} | {theirs_s:.2f} | {theirs_s / ours_s:.2f} "
        f"| {load.real_tokens / ours_s:,.0f} | {ours.first:.0f} | {ours.loss:.5f} {theirs.loss:.5f} |"
    )


def in_new_process(function: Callable, *arguments: Any) -> Any:
    """The result of the function, computed in a new process that ends afterwards."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", default="mlm,contrastive,finetune")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="[float32 on a CPU, bfloat16 on a GPU]")
    parser.add_argument("--layout", choices=["packed", "padded"], default="packed")
    args = parser.parse_args()
    print(f"jax {jax.__version__}, torch {importlib.metadata.version('torch')}, {args.layers} layers\n")
    print("| stage | device | real tokens | nomic_jax s | torch s | ratio | tokens/s | first call s | losses |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in args.stages.split(","):
        print(measure(name, args), flush=True)


if __name__ == "__main__":
    main()

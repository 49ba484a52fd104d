"""Training speed of the three stages beside a plain torch loop: the same model, weights, batch, loss and optimizer.

    python -m benchmarks.train [--stages=mlm,contrastive,finetune] [--steps=2] [--layers=12] [--dtype=float32]

On a CPU in float32; on a GPU in bfloat16 with float32 master weights (torch: autocast, SDPA). Texts are random tokens,
their lengths log-normal as those of real pairs. Each side has a process of its own, and they take turns: a step that is
not counted, for memory that a system has taken back from an idle process comes in slowly, then some that are. The table
has medians over two turns. The losses of the first step must agree, or nothing is printed.

torch pads every batch to its longest text, and makes the masked-LM head's logits where something is predicted, as ours
does. `--layout` is that of our contrastive and finetune batches.
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import multiprocessing
import statistics
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import jax
import numpy as np

from benchmarks.encode import bert_tokenizer
from benchmarks.loads import Load, mlm_load, pair_load
from benchmarks.steps import TrainStep, paper_settings
from benchmarks.timing import timed
from nomic_jax.hf import Checkpoint, write_checkpoint
from nomic_jax.model import EmbeddingConfig
from nomic_jax.train.config import TrainConfig

# (rows, negatives, median tokens of a query, of a document, longest) of a batch.
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


def measure(name: str, args: argparse.Namespace) -> str:
    """A line of the table."""
    on_gpu = jax.default_backend() == "gpu"
    model = dict(
        num_layers=args.layers,
        dtype=args.dtype or ("bfloat16" if on_gpu else "float32"),
        recompute="attention" if on_gpu else "none",
    )
    fields = {} if name == "mlm" else dict(data=dict(layout=args.layout), kept_chunks=float(args.layout == "packed"))
    settings = paper_settings(name, model, **fields)
    load = make_load(name, *(ON_GPU if on_gpu else ON_CPU)[name], args.layout)
    ours = TrainStep(settings, load)
    first = ours.compile()
    ours.start()
    params = jax.device_get(ours.state.params)
    with tempfile.TemporaryDirectory() as directory:
        written = EmbeddingConfig(dataclasses.replace(settings.model, dtype="float32"))
        write_checkpoint(Path(directory), Checkpoint(written, params, bert_tokenizer()))
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as torchs:
            torchs.submit(start_torch, settings, load, Path(directory)).result()
            sides = (functools.partial(timed, ours), lambda: torchs.submit(step_torch).result())
            turns = [[[side() for _ in range(1 + args.steps)] for side in sides] for _ in range(2)]
    first += turns[0][0][0][0]
    losses = [side[0][1] for side in turns[0]]
    np.testing.assert_allclose(*losses, rtol=2e-2 if settings.model.dtype == "bfloat16" else 1e-4)
    us, them = (
        statistics.median(seconds for turn in turns for seconds, _ in turn[side][1:]) for side in range(len(sides))
    )
    return (
        f"| {name} | {jax.devices()[0].device_kind} | {load.real_tokens:,} | {us:.2f} | {them:.2f} | {them / us:.2f} "
        f"| {load.real_tokens / us:,.0f} | {first:.0f} | {losses[0]:.5f} {losses[1]:.5f} |"
    )


_torch: Callable[[], float]  # a step, in torch's process once it has started


def start_torch(settings: TrainConfig, load: Load, directory: Path) -> None:
    global _torch
    from benchmarks.torch_peers import TorchStep

    _torch = TorchStep(settings, load, directory)


def step_torch() -> tuple[float, float]:
    """(seconds, loss)"""
    return timed(_torch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", default="mlm,contrastive,finetune")
    parser.add_argument("--steps", type=int, default=2, help="of each turn")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="[float32 on a CPU, bfloat16 on a GPU]")
    parser.add_argument("--layout", choices=["packed", "padded"], default="packed")
    args = parser.parse_args()
    print(f"jax {jax.__version__}, torch {importlib.metadata.version('torch')}, {args.layers} layers\n")
    columns = (
        "stage",
        "device",
        "real tokens",
        "nomic_jax s",
        "torch s",
        "ratio",
        "tokens/s",
        "first call s",
        "losses",
    )
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for name in args.stages.split(","):
        # A process for each: memory that a stage, or this process, held would be missing in the next.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as stage:
            print(stage.submit(measure, name, args).result(), flush=True)


if __name__ == "__main__":
    main()

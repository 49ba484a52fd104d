"""Training speed of the three stages beside a plain torch loop: the same model, weights, batch, loss and optimizer.

    python -m benchmarks.train [--stages=mlm,contrastive,finetune] [--steps=3] [--layers=12] [--dtype=float32]

On a CPU in float32; on a GPU in bfloat16 with float32 master weights (torch: autocast, SDPA). Texts are random tokens,
their lengths log-normal as those of real pairs. Both sides take turns, step by step, in one process; the table has
medians. The losses of the first step must agree, or nothing is printed.

torch pads every batch to its longest text, and makes the masked-LM head's logits where something is predicted, as ours
does. `--layout` is that of our contrastive and finetune batches.
"""

import argparse
import dataclasses
import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import torch

from benchmarks.encode import bert_tokenizer
from benchmarks.loads import Load, mlm_load, pair_load
from benchmarks.steps import TrainStep, paper_settings
from benchmarks.torch_peers import TorchStep
from nomic_jax.hf import Checkpoint, write_checkpoint
from nomic_jax.model import EmbeddingConfig

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
    """A line of the table; the models of one stage are gone before the next one's are made."""
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
        theirs = TorchStep(settings, load, Path(directory))
    started = time.perf_counter()
    losses = ours(), theirs()
    first += time.perf_counter() - started
    np.testing.assert_allclose(*losses, rtol=2e-2 if settings.model.dtype == "bfloat16" else 1e-4)
    seconds: dict[Callable, list[float]] = {ours: [], theirs: []}
    for _ in range(args.steps):
        for step, times in seconds.items():
            started = time.perf_counter()
            step()
            times.append(time.perf_counter() - started)
    us, them = (statistics.median(times) for times in seconds.values())
    return (
        f"| {name} | {load.real_tokens:,} | {us:.2f} | {them:.2f} | {them / us:.2f} | {load.real_tokens / us:,.0f} "
        f"| {first:.0f} | {losses[0]:.5f} {losses[1]:.5f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", default="mlm,contrastive,finetune")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="[float32 on a CPU, bfloat16 on a GPU]")
    parser.add_argument("--layout", choices=["packed", "padded"], default="packed")
    args = parser.parse_args()
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}, torch {torch.__version__}, {args.layers} layers\n")
    print("| stage | real tokens a step | nomic_jax s | torch s | ratio | nomic_jax tokens/s | first call s | losses |")
    print("|---|---|---|---|---|---|---|---|")
    for name in args.stages.split(","):
        print(measure(name, args), flush=True)
        gc.collect()


if __name__ == "__main__":
    main()

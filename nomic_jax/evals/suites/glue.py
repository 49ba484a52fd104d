"""The tasks of GLUE, their data and metrics, and the sweep of the paper (section 4.1). The caller does the training.

Data have the columns of GLUE on the hub (nyu-mll/glue), which TFDS uses too. Local files are DATA/<task>/ with train
and validation (for mnli, validation or validation_matched) as .jsonl, .jsonl.gz, .parquet or, as on the hub,
<split>-*.parquet.
"""

import dataclasses
import hashlib
import itertools
import json
import statistics
import urllib.parse
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nomic_jax.data.formats.file_format import sha256_of_file
from nomic_jax.data.formats.paths import expand_files
from nomic_jax.data.formats.reading import read_rows
from nomic_jax.data.formats.writing import write_rows
from nomic_jax.evals.report.published import GLUE_TASKS
from nomic_jax.evals.suites.hub import column, load
from nomic_jax.evals.tasks.contract import TaskError
from nomic_jax.evals.tasks.sts import correlation
from nomic_jax.extras import needs

HUB = "nyu-mll/glue"
LEARNING_RATES, BATCH_SIZES, SEEDS = (1e-5, 2e-5, 3e-5), (16, 32), (0, 1, 2, 3, 4)


class GlueTask(NamedTuple):
    """Attributes:
    columns: the columns of one or two texts.
    num_labels: number of labels, 1 for regression.
    metric: name of the metric.
    validation: the split that is scored.
    from_mnli: whether finetuning starts from a model that was finetuned on mnli.
    """

    columns: tuple[str, ...]
    num_labels: int
    metric: str
    validation: str = "validation"
    from_mnli: bool = False


_PAIR = ("sentence1", "sentence2")
TASKS = {
    "cola": GlueTask(("sentence",), 2, "matthews_correlation"),
    "sst2": GlueTask(("sentence",), 2, "accuracy"),
    "mrpc": GlueTask(_PAIR, 2, "accuracy", from_mnli=True),
    "stsb": GlueTask(_PAIR, 1, "pearson", from_mnli=True),
    "qqp": GlueTask(("question1", "question2"), 2, "accuracy"),
    "mnli": GlueTask(("premise", "hypothesis"), 3, "accuracy", "validation_matched"),
    "qnli": GlueTask(("question", "sentence"), 2, "accuracy"),
    "rte": GlueTask(_PAIR, 2, "accuracy", from_mnli=True),
}
# mnli is first, because other tasks start from it.
ORDER = ("mnli", *(task for task in GLUE_TASKS if task != "mnli"))


@dataclasses.dataclass(frozen=True, order=True)
class Cell:
    """One finetuning run of the sweep."""

    task: str
    learning_rate: float
    batch_size: int
    seed: int

    @property
    def name(self) -> str:
        return f"lr{self.learning_rate:g}-batch{self.batch_size}-seed{self.seed}"


def cells(
    tasks: Sequence[str], learning_rates: Sequence[float], batch_sizes: Sequence[int], seeds: Sequence[int]
) -> list[Cell]:
    """Returns the runs of the sweep, mnli first. () stands for all tasks, or for the paper's values.

    Raises:
      ValueError: GLUE does not have one of the tasks.
    """
    if unknown := [task for task in tasks if task not in TASKS]:
        raise ValueError(f"--tasks: GLUE has no task {unknown[0]!r}; it has {', '.join(GLUE_TASKS)}")
    grid = (learning_rates or LEARNING_RATES, batch_sizes or BATCH_SIZES, seeds or SEEDS)
    selected = [task for task in ORDER if not tasks or task in tasks]
    return [Cell(task, *values) for task in selected for values in itertools.product(*grid)]


def score(task: str, logits_NC: np.ndarray, labels: Sequence[float]) -> float:
    """Returns the task's metric for logits [N, labels] (cola: Matthews, stsb: Pearson, the others: accuracy).

    Raises:
      TaskError: a logit is not finite.
    """
    with needs("GLUE", "nomic_jax[report]"):
        from sklearn.metrics import accuracy_score, matthews_corrcoef

    metric = TASKS[task].metric
    if metric == "pearson":
        return correlation("pearson", labels, logits_NC[:, 0])
    if not np.isfinite(logits_NC).all():
        raise TaskError("a prediction of the model is not a finite number")
    of_labels = matthews_corrcoef if metric == "matthews_correlation" else accuracy_score
    return float(of_labels(labels, logits_NC.argmax(axis=1)))


def find_data(task: str, data: str, cache: Path) -> tuple[str, str]:
    """Returns (training files, validation files) of a task.

    Args:
      data: a folder; "tfds:glue" or "tfds:glue?data_dir=DIR", as TFDS prepares it (array_record or parquet); or "" for
        the hub. Data of TFDS and the hub are written to ``cache`` once.

    Raises:
      TaskError: the data cannot be loaded, or have an unexpected format.
      FileNotFoundError: the folder does not have the files of the task.
    """
    splits = ("train", TASKS[task].validation)
    if data and not data.startswith("tfds:"):
        train, validation = (_file(Path(data) / task, split) for split in splits)
        return train, validation
    files = [cache / task / f"{split}.jsonl" for split in splits]
    for split, file in zip(splits, files):
        if not file.exists():
            where = f"glue/{task} of TFDS" if data else f"{HUB} {task}"
            rows = _of_tfds(data, task, split) if data else load(HUB, task, split)
            write_rows(file, _checked(rows, TASKS[task], where))
    return str(files[0]), str(files[1])


def identify_data(task: str, data: str) -> str:
    """Returns a hash of the files of a task, or the name of what is downloaded; ``data`` as in ``find_data``.

    Raises:
      FileNotFoundError: the folder does not have the files of the task.
    """
    if not data or data.startswith("tfds:"):
        return data or HUB
    digest = hashlib.sha256()
    for pattern in find_data(task, data, Path()):
        for file in expand_files(pattern):
            digest.update(sha256_of_file(file).encode())
    return digest.hexdigest()


def cache_name(data: str) -> str:
    """Returns the folder of the downloaded data of ``data``: data of the hub and of TFDS are never mixed."""
    return hashlib.sha256(data.encode()).hexdigest()[:12] if data else ""


def summarize(results: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns for each task the median over the seeds at its best learning rate and batch size, and these settings.

    Args:
      results: for each run {"task", "learning_rate", "batch_size", "seed", "score", "start"}.
    """
    runs: dict[str, dict[tuple[float, int], dict[int, float]]] = {}
    for result in results:
        settings = (result["learning_rate"], result["batch_size"])
        # Earlier versions wrote NaN for a run that predicts one value.
        score = result["score"] if np.isfinite(result["score"]) else 0.0
        runs.setdefault(result["task"], {}).setdefault(settings, {})[result["seed"]] = score
    summary = {}
    for task in sorted(runs, key=GLUE_TASKS.index):
        medians = {settings: statistics.median(scores.values()) for settings, scores in runs[task].items()}
        # Of equal medians, the smaller learning rate and batch size win.
        best = min(medians, key=lambda settings: (-medians[settings], settings))
        summary[task] = {
            "score": medians[best],
            "type": "GLUE",
            "metric": TASKS[task].metric,
            "task": task,
            "learning_rate": f"{best[0]:g}",
            "batch_size": best[1],
            "starts": sorted({Path(result["start"]).name for result in results if result["task"] == task}),
            "seeds": [runs[task][best][seed] for seed in sorted(runs[task][best])],
            "runs": sum(len(scores) for scores in runs[task].values()),
        }
    return summary


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Returns the results of the finished runs in a folder."""
    return [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*/lr*.json"))]


def best_mnli_run(folder: Path) -> Path:
    """Returns the working directory of the finished mnli run with the highest score. Other tasks start from this run.

    Raises:
      TaskError: no mnli run is finished.
    """
    scores = {file: json.loads(file.read_text(encoding="utf-8"))["score"] for file in folder.glob("mnli/lr*.json")}
    if not scores:
        raise TaskError(
            "this task starts from the best run on mnli, but no run on mnli is finished: run --tasks=mnli first, or "
            "set the start with --mnli_checkpoint=DIR (--mnli_checkpoint=none for the model itself)"
        )
    return max(scores, key=lambda file: (scores[file], file)).with_suffix("")


def _file(folder: Path, split: str) -> str:
    names = [split, "validation"] if split == "validation_matched" else [split]
    for name in names:
        for suffix in (".jsonl", ".jsonl.gz", ".parquet"):
            if (folder / f"{name}{suffix}").is_file():
                return str(folder / f"{name}{suffix}")
        if list(folder.glob(f"{name}-*.parquet")):
            return str(folder / f"{name}-*.parquet")
    raise FileNotFoundError(f"{folder} has no {' or '.join(names)} (.jsonl, .jsonl.gz, .parquet or <split>-*.parquet)")


def _of_tfds(data: str, task: str, split: str) -> Iterable[dict[str, Any]]:
    name, _, query = data.removeprefix("tfds:").partition("?")
    options = dict(urllib.parse.parse_qsl(query))
    if name.rstrip("/") != "glue" or options.keys() - {"data_dir"}:
        raise TaskError(f"--data={data}: write tfds:glue, or tfds:glue?data_dir=DIR")
    named = f"tfds:glue/{task}?{urllib.parse.urlencode(options | {'split': split})}"
    return read_rows(named, dict.fromkeys(TASKS[task].columns, str), others=("label",), allow_empty=True)


def _checked(rows: Iterable[dict[str, Any]], task: GlueTask, where: str) -> Iterator[dict[str, Any]]:
    for row in rows:
        yield {name: column(row, name, where) for name in (*task.columns, "label")}

"""The scores of one model on one suite, in one JSON file from which a killed run resumes.

    {"model", "model_sha256", "suite", "dtype", "max_length",
     "tasks":   {label: {metric: value, ..., "task", "type", "metric": name of the main metric, and settings}},
     "failed":  {label: error message},
     "average": {metric: mean over the tasks that have it}}

A label is the task's name, followed by "@<max_length>" and " dim <n>" if a suite has several lengths or numbers of
components. The names of averages are then followed by " @<max_length> dim <n>".
"""

import hashlib
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nomic_jax.data.words import WORDS_VERSION
from nomic_jax.files.folders import is_file
from nomic_jax.files.reading import FileRefused, read_json
from nomic_jax.files.writing import write_json

# Files of a model folder that determine its embeddings. In a run, manifests have the hashes of the checkpoints' files.
MODEL_FILES = ("*.safetensors", "*.bin", "*config.json", "tokenizer.json", "vocab.txt", "manifest.sha256.json")


class Cell(NamedTuple):
    """One score to compute.

    Attributes:
      label: name of the cell, unique in its suite.
      score: computes the entry for the report's "tasks".
      sha256: hash of the task's content, if the task is read from files.
    """

    label: str
    score: Callable[[], dict[str, Any]]
    sha256: str = ""


def label(task: str, max_length: int | None = None, dim: int | None = None) -> str:
    return task + (f"@{max_length}" if max_length else "") + (f" dim {dim}" if dim else "")


def model_sha256(model: str) -> str:
    """Returns a hash of the content of a model folder, a run or a checkpoint of a run.

    For hub names it is "", because only their name identifies them.
    """
    if model == "bm25":
        return f"words {WORDS_VERSION}"
    digest = hashlib.sha256()
    files = [file for pattern in MODEL_FILES for file in sorted(Path(model).rglob(pattern))]
    for file in files:
        with file.open("rb") as f:
            digest.update(hashlib.file_digest(f, "sha256").digest())
    return digest.hexdigest() if files else ""


def open_report(path: Path, identity: dict[str, Any], cells: Sequence[Cell] = ()) -> dict[str, Any]:
    """Returns the report at ``path``, or a new report.

    Raises:
      ValueError: the report has scores of another model, length or task content.
    """
    if not path.exists():
        return identity | {"tasks": {}}
    report = json.loads(path.read_text(encoding="utf-8"))
    advice = "give another --name, or delete the file"
    for field, value in identity.items():
        if report.get(field) != value:
            raise ValueError(f"{path} was made with {field} {report.get(field)!r}, this is {value!r}; {advice}")
    for cell in cells:
        if report["tasks"].get(cell.label, {}).get("sha256", cell.sha256) != cell.sha256:
            raise ValueError(f"{path} has scores of task {cell.label!r} with other content; {advice}")
    return report


def run_cells(
    path: Path, identity: dict[str, Any], cells: Sequence[Cell], prepare: Callable[[], object]
) -> dict[str, Any]:
    """Computes the scores that the report at ``path`` lacks, writes it after every task, and returns it.

    A task that fails is listed under "failed", and the run continues. Only an error that would fail every task, such as
    a library that is not installed, ends the run.

    Args:
      prepare: called once, before the first task without scores. Its exceptions end the run.
    """
    report = open_report(path, identity, cells) | {"failed": {}}
    missing = [cell for cell in cells if cell.label not in report["tasks"]]
    if missing:
        prepare()
    for number, cell in enumerate(missing, len(cells) - len(missing) + 1):
        print(f"task {number} of {len(cells)}: {cell.label}", file=sys.stderr)
        started = time.monotonic()
        try:
            found = cell.score()
        except ModuleNotFoundError:
            raise
        except Exception as error:
            report["failed"][cell.label] = f"{type(error).__name__}: {error}"
            print(f"{cell.label} failed: {report['failed'][cell.label]}", file=sys.stderr)
            if not isinstance(error, (ValueError, OSError)):  # a defect in this project or in a library: show where
                traceback.print_exc()
        else:
            report["tasks"][cell.label] = found | ({"sha256": cell.sha256} if cell.sha256 else {})
            seconds = time.monotonic() - started
            print(f"    {found['metric']} {main_score(found):.4f}, {seconds:.0f} s", file=sys.stderr)
        report["average"] = average(report["tasks"].values())
        write_json(path, report)
    report["average"] = average(report["tasks"].values())
    return report


def is_output(path: Path) -> bool:
    """Returns whether a file or folder in the output of ``launch.evaluate`` is one that the command writes."""
    if path.suffix == ".json" and is_file(path):
        try:
            content = read_json(path)
        except FileRefused:
            return False
        return isinstance(content, dict) and {"suite", "tasks"} <= content.keys()
    return path.name in ("report.md", "results", "glue") or path.suffix == ".png"


def main_score(figures: dict[str, Any]) -> float:
    """Returns the score of a task that averages are made of."""
    return figures["score"] if "score" in figures else figures[figures.get("metric", "ndcg@10")]


def average(tasks: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Returns metric -> mean over the tasks that have it, separately for each length and number of components."""
    tasks = list(tasks)
    all_settings = {(task.get("max_length"), task.get("dim")) for task in tasks}
    values: dict[str, list[float]] = {}
    for task in tasks:
        setting = label(" ", task.get("max_length"), task.get("dim")) if len(all_settings) > 1 else ""
        for metric, value in task.items():
            if isinstance(value, float):
                values.setdefault(metric + setting, []).append(value)
    return {metric: sum(column) / len(column) for metric, column in values.items()}


def figures(task: Any, found: Iterable[tuple[str, float]], max_length: int | None, dim: int | None) -> dict[str, Any]:
    """Returns the report's entry of a local or LoCo task: metrics (the main one first), counts and settings."""
    metrics = dict(found)
    described = {"type": task.type, "metric": next(iter(metrics))}
    return metrics | task.counts | described | settings(task.name, max_length, dim)


def settings(task: str, max_length: int | None, dim: int | None) -> dict[str, Any]:
    values = {"task": task, "max_length": max_length, "dim": dim}
    return {name: value for name, value in values.items() if value is not None}

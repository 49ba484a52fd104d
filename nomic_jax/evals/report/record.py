"""The scores of one model on one suite, in one JSON file from which a killed run resumes.

    {"model", "model_sha256", "suite", "dtype", "max_length",
     "tasks":   {label: {metric: value, ..., "task", "type", "metric": name of the main metric, and settings}},
     "failed":  {label: error message},
     "average": {metric: mean over the tasks that have it}}

A label is the task's name, followed by "@<max_length>" and " dim <n>" if a suite has several lengths or numbers of
components. The names of averages are then followed by " @<max_length>", if there are several lengths, and " dim <n>".
"""

import itertools
import json
import math
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nomic_jax.files.folders import is_file, remove_folder
from nomic_jax.files.locks import exclusive_lock
from nomic_jax.files.reading import FileRefused, read_json
from nomic_jax.files.writing import write_json
from nomic_jax.jobs.tasks import Engine, Task

_CELLS = ".cells"  # the end of the name of a folder of scores that are not in the report yet


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


def open_report(path: Path, identity: dict[str, Any], cells: Sequence[Cell] = ()) -> dict[str, Any]:
    """Returns the report at ``path``, or a new report.

    Raises:
      ValueError: the report has scores of another model, length or task content.
    """
    if not path.exists():
        return identity | {"tasks": {}}
    report = json.loads(path.read_text(encoding="utf-8"))
    # Earlier versions wrote NaN, which is not JSON; such a task is computed again.
    report["tasks"] = {name: entry for name, entry in report["tasks"].items() if not _undefined(entry)}
    advice = "give another --name, or delete the file"
    for field, value in identity.items():
        if report.get(field) != value:
            raise ValueError(f"{path} was made with {field} {report.get(field)!r}, this is {value!r}; {advice}")
    for cell in cells:
        if report["tasks"].get(cell.label, {}).get("sha256", cell.sha256) != cell.sha256:
            raise ValueError(f"{path} has scores of task {cell.label!r} with other content; {advice}")
    return report


class CellsTask(Task):
    """The task that computes cells. A block has those of one task and length, which share the embeddings of its texts.

    A block is a file with the entries for the report, and the messages of cells that failed.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], cells: Sequence[Cell]):
        self.label, self.progress = f"evaluating {identity['model']}", True
        self.folder, self.identity = path.with_name(f".{path.name}{_CELLS}"), dict(identity)
        groups = itertools.groupby(cells, lambda cell: cell.label.partition(" dim ")[0])
        self.blocks = [(name, list(group)) for name, group in groups]

    def __len__(self) -> int:
        return len(self.blocks)

    def file(self, block: int) -> Path:
        return self.folder / f"{block:05d}.json"

    @property
    def records(self) -> Path:
        return self.folder / "shards"

    def settings(self) -> Mapping[str, Any]:
        return self.identity | {f"task {name}": [cell.sha256 for cell in own] for name, own in self.blocks}

    def write(self, block: int, worker: Any, advance: Callable[[int], Any]) -> None:
        found: dict[str, dict[str, Any]] = {"tasks": {}, "failed": {}}
        for cell in self.blocks[block][1]:
            entry, failed = _scored(cell)
            found["tasks"] |= entry
            found["failed"] |= failed
        write_json(self.file(block), found)


def run_cells(
    path: Path,
    identity: dict[str, Any],
    cells: Sequence[Cell],
    prepare: Callable[[], object],
    engine: Engine | None = None,
) -> dict[str, Any]:
    """Computes the scores that the report at ``path`` lacks, writes it after every task, and returns it.

    A task that fails is listed under "failed", and the run continues. Only an error that would fail every task, such as
    a library that is not installed, ends the run. Processes may share a report: each adds its scores to those that are
    in the file.

    Args:
      prepare: called once, before the first task without scores. Its exceptions end the run.
      engine: computes the missing scores; the report is written when all are there. [here, one after the other]

    Raises:
      ShardEnded: a shard has made its share; the last step, a merge, writes the report.
    """
    report = open_report(path, identity, cells)
    failed: dict[str, str] = {}
    missing = [cell for cell in cells if cell.label not in report["tasks"]]
    if missing:
        prepare()

    def add(entries: dict[str, dict[str, Any]]) -> dict[str, Any]:
        with exclusive_lock(path.with_name(f".{path.name}.lock")):
            report = open_report(path, identity, cells)
            report["tasks"] |= entries
            report |= {"failed": failed, "average": average(report["tasks"].values())}
            write_json(path, report)
        return report

    if engine is not None and missing:
        task = CellsTask(path, identity, missing)
        engine(task, True, True)
        blocks = [read_json(task.file(block)) for block in range(len(task))]
        failed |= {label: message for block in blocks for label, message in block["failed"].items()}
        report = add({label: entry for block in blocks for label, entry in block["tasks"].items()})
        remove_folder(task.folder)  # what failed is computed again by the next run
        missing = []
    for number, cell in enumerate(missing, len(cells) - len(missing) + 1):
        print(f"task {number} of {len(cells)}: {cell.label}", file=sys.stderr)
        entry, why = _scored(cell)
        failed |= why
        report = add(entry)
    return report | {"failed": failed, "average": average(report["tasks"].values())}


def _scored(cell: Cell) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Returns the entry of a cell in the report, or the message of its failure: one of the two is empty."""
    started = time.monotonic()
    try:
        found = cell.score()
        if undefined := _undefined(found):
            raise ValueError(f"the score {undefined[0]} is {found[undefined[0]]}, which is no number")
    except ModuleNotFoundError:
        raise
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
        print(f"{cell.label} failed: {message}", file=sys.stderr)
        if not isinstance(error, (ValueError, OSError)):  # a defect in this project or in a library: show where
            traceback.print_exc()
        return {}, {cell.label: message}
    seconds = time.monotonic() - started
    print(f"    {found['metric']} {main_score(found):.4f}, {seconds:.0f} s", file=sys.stderr)
    return {cell.label: found | ({"sha256": cell.sha256} if cell.sha256 else {})}, {}


def _undefined(entry: dict[str, Any]) -> list[str]:
    """Returns the names of figures that are NaN or infinite."""
    return [name for name, value in entry.items() if isinstance(value, float) and not math.isfinite(value)]


def is_output(path: Path) -> bool:
    """Returns whether a file or folder in the output of ``launch.evaluate`` is one that the command writes."""
    if path.suffix == ".json" and is_file(path):
        try:
            content = read_json(path)
        except FileRefused:
            return False
        return isinstance(content, dict) and {"suite", "tasks"} <= content.keys()
    if path.name.startswith(".") and path.name.endswith(_CELLS):
        return True
    return path.name in ("report.md", "report.html", "results", "glue") or path.suffix == ".png"


def main_score(figures: dict[str, Any]) -> float:
    """Returns the score of a task that averages are made of."""
    return figures["score"] if "score" in figures else figures[figures.get("metric", "ndcg@10")]


def average(tasks: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Returns metric -> mean over the tasks that have it, separately for each length and number of components."""
    values: dict[str, list[float]] = {}
    for setting, group in by_setting({str(i): task for i, task in enumerate(tasks)}).items():
        for task in group:
            for metric, value in task.items():
                if isinstance(value, float):
                    values.setdefault(metric + setting, []).append(value)
    return {metric: sum(column) / len(column) for metric, column in values.items()}


def by_setting(tasks: dict[str, dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Returns setting -> tasks. A setting is " @<length> dim <n>", without what is the default or equal for all tasks.

    Scores of all components at one length keep their name when others are added.
    """
    found: dict[tuple[int | None, int | None], list[dict[str, Any]]] = {}
    for figures in tasks.values():
        found.setdefault((figures.get("max_length"), figures.get("dim")), []).append(figures)
    has_lengths = len({length for length, _ in found}) > 1
    return {
        (f" @{length}" if length and has_lengths else "") + (f" dim {dim}" if dim and len(found) > 1 else ""): group
        for (length, dim), group in found.items()
    }


def figures(task: Any, found: Iterable[tuple[str, float]], max_length: int | None, dim: int | None) -> dict[str, Any]:
    """Returns the report's entry of a local or LoCo task: metrics (the main one first), counts and settings."""
    metrics = dict(found)
    described = {"type": task.type, "metric": next(iter(metrics))}
    return metrics | task.counts | described | settings(task.name, max_length, dim)


def settings(task: str, max_length: int | None, dim: int | None) -> dict[str, Any]:
    values = {"task": task, "max_length": max_length, "dim": dim}
    return {name: value for name, value in values.items() if value is not None}

"""The sweep of ``launch.evaluate --suite=glue``: finetunes a model on every task and scores each run on the task's
development set.

OUTPUT/glue/<name>/ holds data/ (the downloaded tasks), <task>/<run>.json (the score of a finished run) and
<task>/<run>/ (the working directory of a run, kept while it trains or while other runs start from it). Several
processes may share the folder: each does the runs that its flags name, with mnli before the tasks that start from it.
"""

import contextlib
import functools
import itertools
import json
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nomic_jax.data.formats.reading import read_rows
from nomic_jax.evals.report.record import average
from nomic_jax.evals.suites import glue, hub
from nomic_jax.evals.suites.glue import Cell
from nomic_jax.files.folders import remove_folder
from nomic_jax.files.writing import write_json
from nomic_jax.run.pretrained import read_pretrained
from nomic_jax.run.workdir import used_workdir
from nomic_jax.train.interruption import Preempted

from .config_files import get_config
from .errors import refer


def sweep(
    model: str,
    name: str,
    output: Path,
    identity: dict[str, Any],
    *,
    data: str,
    cells: Sequence[Cell],
    variant: str,
    mnli_checkpoint: str,
    dtype: str,
    batch_size: int,
) -> dict[str, Any]:
    """Does the missing runs and returns the report over all finished ones, as written to OUTPUT/<name>-glue.json.

    Args:
      identity: fields of the report that identify the model.
      data: see ``nomic_jax.evals.suites.glue.find_data``.
      variant: variant of configs/glue.py.
      mnli_checkpoint: checkpoint from which rte, stsb and mrpc start: "" for the best run on mnli, "none" for the model
        itself.
      batch_size: texts in a batch of the scoring.
    """
    folder = output / "glue" / name
    failed: dict[str, str] = {}
    identify_data = functools.cache(glue.identify_data)
    settings = {"model_sha256": identity["model_sha256"], "model": model, "variant": variant, "dtype": dtype}
    # The report is over all results of the folder, also those of tasks that this command does not name.
    for result in sorted(folder.glob("*/lr*.json")):
        _check_settings(result, settings)
    for cell in cells:
        result = _result_file(folder, cell)
        if not result.exists():
            continue
        with contextlib.suppress(FileNotFoundError):  # the data are not here any more
            _check_settings(result, {"data": identify_data(cell.task, data)})
        if mnli_checkpoint:
            start = _start(model, folder, cell.task, mnli_checkpoint)
            if Path(json.loads(result.read_text(encoding="utf-8"))["start"]).resolve() != Path(start).resolve():
                _check_settings(result, {"start": start})
    numbers = {cell: number for number, cell in enumerate(cells, 1)}
    missing = [cell for cell in cells if not _result_file(folder, cell).exists()]
    if missing:
        read_pretrained(model)  # an unreadable model fails here, not in every run
        if not data:
            hub.is_reachable()
    for task, runs in itertools.groupby(missing, key=lambda cell: cell.task):
        try:
            files = glue.find_data(task, data, folder / "data" / glue.cache_name(data))
            start = _start(model, folder, task, mnli_checkpoint)
        except ModuleNotFoundError:
            raise
        except Exception as error:
            failed[task] = _report_failure(task, error)
            continue
        for cell in runs:
            result, label = _result_file(folder, cell), f"{cell.task} {cell.name}"
            if result.exists():  # another process has finished it meanwhile
                continue
            print(f"run {numbers[cell]} of {len(cells)}: {label}", file=sys.stderr)
            try:
                score = _run(cell, start, folder, files, variant, dtype, batch_size)
            except (ModuleNotFoundError, Preempted):
                raise
            except Exception as error:
                failed[label] = _report_failure(label, error)
                continue
            figures = {"task": cell.task, "learning_rate": cell.learning_rate, "batch_size": cell.batch_size}
            outcome = {"seed": cell.seed, "score": score, "start": start, "data": identify_data(task, data)}
            write_json(result, figures | outcome | settings)
            _remove_workdirs(result, folder)
    tasks = glue.summarize(glue.read_results(folder))
    report = identity | {"tasks": tasks, "failed": failed, "average": average(tasks.values())}
    write_json(output / f"{name}-glue.json", report)
    return report


def _result_file(folder: Path, cell: Cell) -> Path:
    return folder / cell.task / f"{cell.name}.json"


def _report_failure(label: str, error: Exception) -> str:
    text = f"{type(error).__name__}: {error}"
    print(f"{label} failed: {text}", file=sys.stderr)
    if not isinstance(error, (ValueError, OSError)):  # a defect: show the traceback
        traceback.print_exception(error)
    return text


def _remove_workdirs(result: Path, folder: Path) -> None:
    """Removes the working directories of a task's finished runs, each several times the size of the model.

    The best run on mnli keeps its working directory, because other tasks start from it.
    """
    kept = glue.best_mnli_run(folder) if result.parent.name == "mnli" else None
    for file in result.parent.glob("lr*.json"):
        if file.with_suffix("") != kept:
            remove_folder(file.with_suffix(""))


def _start(model: str, folder: Path, task: str, mnli_checkpoint: str) -> str:
    """The checkpoint from which the runs of a task start."""
    if not glue.TASKS[task].from_mnli or mnli_checkpoint == "none":
        return model
    return mnli_checkpoint or str(glue.best_mnli_run(folder).resolve())


def _discard_other_start(workdir: Path, start: str) -> None:
    """Removes an interrupted run that started from another checkpoint than the one that is now the best run on mnli."""
    config = workdir / "config.json"
    if config.exists() and json.loads(config.read_text(encoding="utf-8"))["init_from"] != start:
        print(f"{workdir}: started from another checkpoint; starting again", file=sys.stderr)
        with used_workdir(workdir):  # no other process trains in it
            remove_folder(workdir)


def _run(
    cell: Cell, start: str, folder: Path, files: tuple[str, str], variant: str, dtype: str, batch_size: int
) -> float:
    from nomic_jax.inference.classifier import Classifier  # loads jax: not needed for --help or a wrong flag
    from nomic_jax.train.config import TrainConfig
    from nomic_jax.train.loop import train

    task = glue.TASKS[cell.task]
    training, validation = files
    config = get_config(f"glue:{variant}")
    config.init_from, config.batch_size, config.seed = start, cell.batch_size, cell.seed
    config.optim.lr, config.model.dtype = cell.learning_rate, dtype
    config.data.update(dict(mixture=training, columns=",".join(task.columns), num_labels=task.num_labels))
    workdir = folder / cell.task / cell.name
    if task.from_mnli:
        _discard_other_start(workdir, start)
    train(TrainConfig.from_mapping(config.to_dict()), workdir)
    rows = list(read_rows(validation, dict.fromkeys(task.columns, str), others=("label",), allow_empty=True))
    texts = [tuple(row[column] for column in task.columns) for row in rows]
    classifier = Classifier.from_pretrained(workdir, max_length=config.data.seq_len)
    return glue.score(cell.task, classifier.logits(texts, batch_size), [row["label"] for row in rows])


def _check_settings(result: Path, settings: dict[str, Any]) -> None:
    found = json.loads(result.read_text(encoding="utf-8"))
    for field, value in settings.items():
        # Earlier versions did not record the data.
        if found.get(field, value) != value:
            raise ValueError(
                f"{result} was made with {field} {found[field]!r}, this is {value!r}; give another --name, or delete "
                f"{result.parent.parent}"
            )


if __name__ == "__main__":
    refer("glue", __doc__, "evaluate")

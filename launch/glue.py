"""The sweep of ``launch.evaluate --suite=glue``: finetunes a model on every task and scores each run on its development
set.

Below OUTPUT/glue/<name>/ lie data/ (what was fetched), <task>/<run>.json (the score of a finished run) and, while it is
being trained or where others start from it, <task>/<run>/ (its working directory). Several processes may share them:
each takes the runs that its flags name, those on mnli before the tasks that start from them.
"""

import itertools
import json
import shutil
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from configs.glue import get_config
from nomic_jax.data.formats.reading import read_rows
from nomic_jax.data.formats.writing import write_json
from nomic_jax.evals.report.record import average
from nomic_jax.evals.suites import glue, hub
from nomic_jax.evals.suites.glue import Cell
from nomic_jax.run.pretrained import read_pretrained
from nomic_jax.train.interruption import Preempted


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
    """Runs what is not finished yet and returns the report over all that is, as written to OUTPUT/<name>-glue.json.

    Args:
      identity: of the model, for the report.
      data: see ``nomic_jax.evals.suites.glue.find_data``.
      variant: of configs/glue.py.
      mnli_checkpoint: what rte, stsb and mrpc start from: "" for the best run on mnli, "none" for the model itself.
      batch_size: texts scored together.
    """
    folder = output / "glue" / name
    failed: dict[str, str] = {}
    settings = {"model_sha256": identity["model_sha256"], "model": model, "variant": variant, "dtype": dtype}
    for cell in cells:
        _check_same(_result(folder, cell), settings)
    numbers = {cell: number for number, cell in enumerate(cells, 1)}
    missing = [cell for cell in cells if not _result(folder, cell).exists()]
    if missing:
        read_pretrained(model)  # what would fail every run alike is said now
        if not data:
            hub.is_reachable()
    for task, runs in itertools.groupby(missing, key=lambda cell: cell.task):
        try:
            files = glue.find_data(task, data, folder / "data")
            start = _start(model, folder, task, mnli_checkpoint)
        except ModuleNotFoundError:
            raise
        except Exception as error:
            failed[task] = _explained(task, error)
            continue
        for cell in runs:
            result, label = _result(folder, cell), f"{cell.task} {cell.name}"
            if result.exists():  # by now, by another process
                continue
            print(f"run {numbers[cell]} of {len(cells)}: {label}", file=sys.stderr)
            try:
                score = _run(cell, start, folder, files, variant, dtype, batch_size)
            except (ModuleNotFoundError, Preempted):
                raise
            except Exception as error:
                failed[label] = _explained(label, error)
                continue
            figures = {"task": cell.task, "learning_rate": cell.learning_rate, "batch_size": cell.batch_size}
            write_json(result, figures | {"seed": cell.seed, "score": score, "start": start} | settings)
            _remove_workdirs(result, folder)
    tasks = glue.summarize(glue.read_results(folder))
    report = identity | {"tasks": tasks, "failed": failed, "average": average(tasks.values())}
    write_json(output / f"{name}-glue.json", report)
    return report


def _result(folder: Path, cell: Cell) -> Path:
    return folder / cell.task / f"{cell.name}.json"


def _explained(label: str, error: Exception) -> str:
    text = f"{type(error).__name__}: {error}"
    print(f"{label} failed: {text}", file=sys.stderr)
    if not isinstance(error, (ValueError, OSError)):  # a defect, of ours or of a library: where it came from
        traceback.print_exception(error)
    return text


def _remove_workdirs(result: Path, folder: Path) -> None:
    """That of a finished run, and of runs on mnli all but the best: each is several times the model's size."""
    kept = glue.best_mnli_run(folder) if result.parent.name == "mnli" else None
    for file in result.parent.glob("lr*.json"):
        if file.with_suffix("") != kept:
            shutil.rmtree(file.with_suffix(""), ignore_errors=True)


def _start(model: str, folder: Path, task: str, mnli_checkpoint: str) -> str:
    """What the runs of a task start from."""
    if not glue.TASKS[task].from_mnli or mnli_checkpoint == "none":
        return model
    return mnli_checkpoint or str(glue.best_mnli_run(folder).resolve())


def _discard_other_start(workdir: Path, start: str) -> None:
    """Of a run that was cut off, and began from what is no longer the best run on mnli: it cannot be gone on with."""
    config = workdir / "config.json"
    if config.exists() and json.loads(config.read_text(encoding="utf-8"))["init_from"] != start:
        print(f"{workdir}: begun from another checkpoint; starting again", file=sys.stderr)
        shutil.rmtree(workdir)


def _run(
    cell: Cell, start: str, folder: Path, files: tuple[str, str], variant: str, dtype: str, batch_size: int
) -> float:
    from nomic_jax.inference.classifier import Classifier  # jax: not for --help or a wrong flag
    from nomic_jax.train.config import TrainConfig
    from nomic_jax.train.loop import train

    task = glue.TASKS[cell.task]
    training, validation = files
    config = get_config(variant)
    config.init_from, config.batch_size, config.seed = start, cell.batch_size, cell.seed
    config.optim.lr, config.model.dtype = cell.learning_rate, dtype
    config.data.update(dict(mixture=training, columns=task.columns, num_labels=task.num_labels))
    workdir = folder / cell.task / cell.name
    if task.from_mnli:
        _discard_other_start(workdir, start)
    train(TrainConfig.from_mapping(config.to_dict()), workdir)
    rows = list(read_rows(validation, dict.fromkeys(task.columns, str), others=("label",), allow_empty=True))
    texts = [tuple(row[column] for column in task.columns) for row in rows]
    classifier = Classifier.from_pretrained(workdir, max_length=config.data.seq_len)
    return glue.score(cell.task, classifier.logits(texts, batch_size), [row["label"] for row in rows])


def _check_same(result: Path, settings: dict[str, Any]) -> None:
    if not result.exists():
        return
    found = json.loads(result.read_text(encoding="utf-8"))
    for field, value in settings.items():
        if found[field] != value:
            raise ValueError(
                f"{result} was made with {field} {found[field]!r}, this is {value!r}; give another --name, or delete "
                f"{result.parent.parent}"
            )

"""The sweep over GLUE: finetunes a model on every task, scores each run on the development set, keeps the figures.

Below OUTPUT/glue/<name>/ lie data/ (what was fetched), <task>/<run>.json (the score of a finished run) and, while it is
being trained or where others start from it, <task>/<run>/ (its working directory). Several processes may share them:
each takes the runs that its flags name, those on mnli before the tasks that start from them.
"""

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from configs.glue import get_config
from nomic_jax.data.sources import read_rows, write_json
from nomic_jax.evals import glue, hub
from nomic_jax.evals.glue import Cell
from nomic_jax.evals.record import average


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
      data: see ``nomic_jax.evals.glue.find_data``.
      variant: of configs/glue.py.
      mnli_checkpoint: what rte, stsb and mrpc start from: "" for the best run on mnli, "none" for the model itself.
      batch_size: texts scored together.
    """
    folder = output / "glue" / name
    failed: dict[str, str] = {}
    if not data:
        hub.is_reachable()
    for number, cell in enumerate(cells, 1):
        result = folder / cell.task / f"{cell.name}.json"
        label = f"{cell.task} {cell.name}"
        settings = {"model_sha256": identity["model_sha256"], "model": model, "variant": variant, "dtype": dtype}
        if result.exists():
            _check_same(result, settings)
            continue
        print(f"run {number} of {len(cells)}: {label}", file=sys.stderr)
        try:
            start = _start(model, folder, cell, mnli_checkpoint)
            score = _run(cell, start, folder, data, variant, dtype, batch_size)
        except ModuleNotFoundError:
            raise
        except (ValueError, OSError) as error:
            failed[label] = f"{type(error).__name__}: {error}"
            print(f"{label} failed: {failed[label]}", file=sys.stderr)
            continue
        figures = {"task": cell.task, "learning_rate": cell.learning_rate, "batch_size": cell.batch_size}
        write_json(result, figures | {"seed": cell.seed, "score": score, "start": start} | settings)
        _remove_workdirs(result, folder)
    tasks = glue.summarize(glue.read_results(folder))
    report = identity | {"tasks": tasks, "failed": failed, "average": average(tasks.values())}
    write_json(output / f"{name}-glue.json", report)
    return report


def _remove_workdirs(result: Path, folder: Path) -> None:
    """That of a finished run, and of runs on mnli all but the best: each is several times the model's size."""
    kept = glue.best_mnli_run(folder) if result.parent.name == "mnli" else None
    for file in result.parent.glob("lr*.json"):
        if file.with_suffix("") != kept:
            shutil.rmtree(file.with_suffix(""), ignore_errors=True)


def _start(model: str, folder: Path, cell: Cell, mnli_checkpoint: str) -> str:
    """What the run starts from."""
    if not glue.TASKS[cell.task].from_mnli or mnli_checkpoint == "none":
        return model
    if mnli_checkpoint:
        return mnli_checkpoint
    return str(glue.best_mnli_run(folder))


def _run(cell: Cell, start: str, folder: Path, data: str, variant: str, dtype: str, batch_size: int) -> float:
    from nomic_jax.classifier import Classifier  # jax: not for --help or a wrong flag
    from nomic_jax.train.config import TrainConfig
    from nomic_jax.train.loop import train

    task = glue.TASKS[cell.task]
    training, validation = glue.find_data(cell.task, data, folder / "data")
    config = get_config(variant)
    config.init_from, config.batch_size, config.seed = start, cell.batch_size, cell.seed
    config.optim.lr, config.model.dtype = cell.learning_rate, dtype
    config.data.update(dict(mixture=training, columns=task.columns, num_labels=task.num_labels))
    workdir = folder / cell.task / cell.name
    train(TrainConfig.from_mapping(config.to_dict()), workdir)
    rows = list(read_rows(validation, dict.fromkeys(task.columns, str), others=("label",), allow_empty=True))
    texts = [tuple(row[column] for column in task.columns) for row in rows]
    classifier = Classifier.from_pretrained(workdir, max_length=config.data.seq_len)
    return glue.score(cell.task, classifier.logits(texts, batch_size), [row["label"] for row in rows])


def _check_same(result: Path, settings: dict[str, Any]) -> None:
    found = json.loads(result.read_text(encoding="utf-8"))
    for field, value in settings.items():
        if found[field] != value:
            raise ValueError(
                f"{result} was made with {field} {found[field]!r}, this is {value!r}; give another --name, or delete "
                f"{result.parent.parent}"
            )

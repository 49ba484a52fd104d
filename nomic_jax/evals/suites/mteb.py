"""MTEB and the long-context set of Jina, run by the mteb library itself: its tasks, its protocol, its result files.

The settings are those of the published figures: 512 tokens (MTEB) or 128, 512 and 8191 (Jina), the prompts of
``nomic_jax.evals.tasks.contract.PROMPTS``, and embeddings that are L2-normalised except for classification.
"""

import contextlib
import difflib
import functools
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nomic_jax.evals.report.record import Cell, label, settings
from nomic_jax.evals.suites.hub import explain
from nomic_jax.evals.tasks.contract import Encoders, TaskError

if TYPE_CHECKING:
    from mteb.abstasks import AbsTask
    from mteb.models.abs_encoder import AbsEncoder

BENCHMARK = "MTEB(eng, v1)"
MTEB_LENGTH = 512
JINA_TASKS = ("NarrativeQARetrieval", "SciFact", "BigPatentClustering", "WikiCitiesClustering")
JINA_LENGTHS = (128, 512, 8191)
# A classifier is trained on these embeddings; everywhere else they are compared.
UNNORMALIZED = ("Classification", "MultilabelClassification")


def find_tasks(names: Sequence[str] = ()) -> "list[AbsTask]":
    """The tasks of MTEB(eng, v1), or those named: with its splits and languages where it has them, else with mteb's.

    Raises:
      ModuleNotFoundError: mteb is not installed.
      ValueError: mteb has no task of a name.
    """
    mteb = _library()
    with _quiet():
        of_benchmark = {task.metadata.name: task for task in mteb.get_benchmark(BENCHMARK).tasks}
        return [_task(mteb, name, of_benchmark) for name in names] if names else list(of_benchmark.values())


def cells(
    encoders: Encoders,
    tasks: "Sequence[AbsTask]",
    lengths: Sequence[int],
    dims: Sequence[int | None],
    name: str,
    folder: Path,
) -> list[Cell]:
    """A cell for each task, length and number of components (None for all); mteb files the model under ``name``."""

    def compute(task: "AbsTask", length: int, dim: int | None) -> dict[str, Any]:
        encoder = encoders.for_mteb(length, dim, name)
        return score(encoder, task, folder, encoders.batch_size) | settings(task.metadata.name, length, dim)

    return [
        Cell(
            label(task.metadata.name, None if tuple(lengths) == (MTEB_LENGTH,) else length, dim),
            functools.partial(compute, task, length, dim),
        )
        for task in tasks
        for length in lengths
        for dim in dims
    ]


def score(encoder: "AbsEncoder", task: "AbsTask", folder: Path, batch_size: int) -> dict[str, Any]:
    """The task's main score, and what it is; mteb's own JSON goes below ``folder``/results.

    A result that is there already for the same weights and settings is taken; of a task with several subsets, those
    that are missing are computed.

    Raises:
      TaskError: the data cannot be had or have another form.
    """
    mteb = _library()
    path = task.metadata.dataset["path"]
    try:
        with _quiet():
            results = mteb.evaluate(
                encoder,
                task,
                cache=mteb.ResultCache(folder),
                encode_kwargs={"batch_size": batch_size},
                show_progress_bar=False,
            )
    except Exception as error:
        raise TaskError(explain(error, path)) from error
    if not results.task_results:
        reasons = "; ".join(str(failed.exception) for failed in results.exceptions or ())
        raise TaskError(reasons or f"mteb gave no result for {task.metadata.name}")
    result = results.task_results[0]
    # To as many digits as mteb's own file has.
    return {
        "score": round(float(result.get_score()), 6),
        "type": task.metadata.type,
        "metric": task.metadata.main_score,
    }


def _task(mteb: Any, name: str, of_benchmark: dict[str, "AbsTask"]) -> "AbsTask":
    if name in of_benchmark:
        return of_benchmark[name]
    try:
        return mteb.get_task(name)
    except KeyError as error:
        known = [task.metadata.name for task in mteb.get_tasks()]
        close = difflib.get_close_matches(name, known, n=3)
        hint = f"did you mean {', '.join(close)}?" if close else f"of {BENCHMARK}: {', '.join(of_benchmark)}"
        raise ValueError(f"--tasks: mteb has no task {name!r}; {hint}") from error


def _library() -> Any:
    try:
        import mteb
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"this suite needs {error.name}, which is not installed: pip install 'nomic_jax[eval]'", name=error.name
        ) from error
    return mteb


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without mteb's notes on newer versions of a task: the published figures are of these."""
    logger = logging.getLogger("mteb")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"mteb\.")
        try:
            yield
        finally:
            logger.setLevel(level)

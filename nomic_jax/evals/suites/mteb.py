"""MTEB and Jina's long-context tasks, run by the mteb library with its own tasks, protocol and result files.

The settings are those of the published scores: 512 tokens (MTEB) or 128, 512 and 8191 (Jina), the prompts of
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
from nomic_jax.extras import needs

if TYPE_CHECKING:
    from mteb.abstasks import AbsTask
    from mteb.models.abs_encoder import AbsEncoder

BENCHMARK = "MTEB(eng, v1)"
MTEB_LENGTH = 512
JINA_TASKS = ("NarrativeQARetrieval", "SciFact", "BigPatentClustering", "WikiCitiesClustering")
JINA_LENGTHS = (128, 512, 8191)
# Task types that train a classifier on the embeddings; all other types compare embeddings.
UNNORMALIZED = ("Classification", "MultilabelClassification")


def find_tasks(names: Sequence[str] = ()) -> "list[AbsTask]":
    """Returns the tasks of MTEB(eng, v1), or the named tasks.

    Tasks of MTEB(eng, v1) have the splits and languages of this benchmark, other tasks have mteb's defaults.

    Raises:
      MissingPackage: mteb is not installed.
      ValueError: mteb does not have one of the tasks.
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
    """Returns a cell for each task, length and number of components (None: all). mteb calls the model ``name``."""

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
    """Returns the task's main score, type and metric. mteb writes its own JSON below ``folder``/results.

    An existing result for the same weights and settings is reused. Only the missing subsets of a task are computed.

    Raises:
      TaskError: the data cannot be loaded, or have an unexpected format.
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
        raise TaskError(reasons or f"mteb returned no result for {task.metadata.name}")
    result = results.task_results[0]
    # With as many digits as in mteb's own file.
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
        hint = (
            f"did you mean {', '.join(close)}?" if close else f"the tasks of {BENCHMARK} are {', '.join(of_benchmark)}"
        )
        raise ValueError(f"--tasks: mteb has no task {name!r}; {hint}") from error


def _library() -> Any:
    with needs("this suite", "nomic_jax[eval]"):
        import mteb
    return mteb


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides mteb's notes on newer versions of a task, because the published scores are for these versions."""
    logger = logging.getLogger("mteb")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"mteb\.")
        try:
            yield
        finally:
            logger.setLevel(level)

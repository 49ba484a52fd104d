"""Evaluation tasks in folders of jsonl files, without code. The files and columns determine the type of the task.

    queries.jsonl {"_id", "text"}, corpus.jsonl {"_id", "title", "text"},
      qrels.jsonl {"query_id", "document_id", "score"}               retrieval: ndcg@10
    train.jsonl and test.jsonl {"text", "label"}                     classification: accuracy
    test.jsonl {"text", "label"}                                     clustering: v_measure
    test.jsonl {"sentence1", "sentence2", "score"}                   STS: spearman

The files may also be compressed, csv, tsv, json arrays or parquet, and qrels may be BEIR's qrels/test.tsv.

An optional task.json names the prompts, if they differ from those of the type of task:
{"query_prompt", "document_prompt"} for retrieval, {"prompt"} for the others. For retrieval, {"ignore_identical_ids":
true} leaves a document out for the query of the same _id.
"""

import functools
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from nomic_jax.data.formats.reading import read_rows
from nomic_jax.evals.report.record import Cell, figures, label
from nomic_jax.evals.tasks import bm25
from nomic_jax.evals.tasks.classification import ClassificationTask
from nomic_jax.evals.tasks.clustering import ClusteringTask
from nomic_jax.evals.tasks.contract import Embed, Encoders, TaskError, TruncatedEmbeddings
from nomic_jax.evals.tasks.files import LABELLED, QRELS, RETRIEVAL, find_file
from nomic_jax.evals.tasks.long_context import Placement
from nomic_jax.evals.tasks.retrieval import RetrievalTask
from nomic_jax.evals.tasks.sts import StsTask

LocalTask = RetrievalTask | ClassificationTask | ClusteringTask | StsTask
NOTHING: Mapping[str, float] = MappingProxyType({})
TIMED = 4  # long documents whose embedding is timed
FORMS = "queries, corpus and qrels.jsonl; train and test.jsonl; or test.jsonl alone"


def read_task(folder: str | Path) -> LocalTask:
    """Reads the task in a folder.

    Raises:
      TaskError, BadRow: the folder has no task or an invalid task; the message names the file.
    """
    folder = Path(folder)
    if any(find_file(folder, name) for name in RETRIEVAL):
        return RetrievalTask.read(folder)
    test = find_file(folder, "test")
    if test is None:
        raise TaskError(f"{folder} has no test.jsonl; a task is made of {FORMS}")
    prompt = _prompt(folder / "task.json")
    columns = set(next(islice(read_rows(test, {}), 1), {}))
    if {"sentence1", "sentence2", "score"} <= columns:
        return StsTask.read(folder, prompt)
    if not {"text", "label"} <= columns:
        raise TaskError(
            f"{test} has the columns {', '.join(sorted(columns)) or 'none'}; write text and label (classification with "
            f"a train.jsonl, clustering without), or sentence1, sentence2 and score (STS)"
        )
    kind = ClassificationTask if find_file(folder, "train") else ClusteringTask
    return kind.read(folder, prompt)


def run_task(task: LocalTask, embedder: Any, embed: Callable[[bool], Embed]) -> Iterable[tuple[str, float]]:
    """Yields (metric, value) of a task; retrieval ranks documents by the similarity of the model.

    Args:
      embedder: the model; its ``similarity_fn_name`` and ``similarity`` are those of ``Embedder``.
      embed: whether vectors are scaled to length 1 -> the function that embeds texts. Classifiers and k-means get the
        vectors that users of the model get, and so does every similarity but the cosine.
    """
    return task.score(_rank(task, embedder, embed)) if isinstance(task, RetrievalTask) else task.run(embed(False))


def _rank(task: RetrievalTask, embedder: Any, embed: Callable[[bool], Embed]) -> np.ndarray:
    if embedder.similarity_fn_name == "cosine":
        return task.rank(embed(True))
    return task.rank(embed(False), embedder.similarity)


def find_tasks(data: Iterable[str], names: Sequence[str] = ()) -> dict[str, Path]:
    """Returns task name -> folder, for task folders and folders of task folders; only ``names``, unless it is empty.

    Raises:
      FileNotFoundError: a folder does not exist or has no task.
      ValueError: two tasks have the same name, or there is no task of a name in ``names``.
    """
    tasks: dict[str, Path] = {}
    for given in map(Path, data):
        if not given.is_dir():
            raise FileNotFoundError(f"--data: there is no folder {given}")
        folders = [*([given] if _is_task(given) else []), *_tasks_inside(given)]
        if not folders:
            raise FileNotFoundError(f"--data: neither {given} nor a folder in it is a task ({FORMS})")
        for folder in folders:
            name = folder.resolve().name
            if tasks.setdefault(name, folder).resolve() != folder.resolve():
                raise ValueError(f"--data: {tasks[name]} and {folder} are both named {name!r}; rename one")
    if unknown := [name for name in names if name not in tasks]:
        raise ValueError(f"--tasks: there is no task {unknown[0]!r} in --data; there are {', '.join(tasks)}")
    return {name: folder for name, folder in tasks.items() if not names or name in names}


def _is_task(folder: Path) -> bool:
    # One of the files is enough, so that missing files are reported later.
    return any(find_file(folder, name) for name in (*RETRIEVAL, *LABELLED))


def _tasks_inside(folder: Path) -> Iterator[Path]:
    """Yields the tasks in a folder, and those in the folder of a task. Links are not followed twice."""
    for inner in sorted(folder.iterdir()):
        if inner.name != QRELS and _is_task(inner):  # BEIR's folder of judgements holds a test.tsv
            yield inner
            if not inner.is_symlink():
                yield from _tasks_inside(inner)


def task_sha256(folder: str | Path) -> str:
    """Returns a hash of a task's content. The scores of two runs are comparable only if it is equal."""
    digest = hashlib.sha256()
    settings = Path(folder) / "task.json"
    for name in (*RETRIEVAL, "task", *LABELLED):
        file = find_file(folder, name) if name != "task" else settings if settings.is_file() else None
        # Files of later task types enter the hash only if they exist: the hashes of retrieval tasks must not change.
        if file or name not in LABELLED:
            digest.update(hashlib.sha256(file.read_bytes() if file else b"").digest())
    return digest.hexdigest()


def cells(
    encoders: Encoders, folders: dict[str, Path], lengths: Sequence[int], dims: Sequence[int | None]
) -> list[Cell]:
    """Returns a cell for each task, length (() for the model's own) and number of components (None for all)."""
    found = []
    all_lengths: list[int | None] = [*lengths] or [None]
    for name, folder in folders.items():
        for length in all_lengths:
            truncated = {normalize: TruncatedEmbeddings(normalize) for normalize in (True, False)}
            for dim in dims:
                found.append(
                    Cell(
                        label(name, length if len(lengths) > 1 else None, dim),
                        functools.partial(_score, encoders, folder, length, dim, truncated, dim == dims[-1]),
                        task_sha256(folder),
                    )
                )
    return found


def _score(
    encoders: Encoders,
    folder: Path,
    length: int | None,
    dim: int | None,
    truncated: dict[bool, TruncatedEmbeddings],
    is_last: bool,
) -> dict[str, Any]:
    task = read_task(folder)
    placement = Placement.read(folder)
    if encoders.model == "bm25":
        if not isinstance(task, RetrievalTask):
            raise TaskError(f"{folder}: BM25 ranks documents; {task.type} needs embeddings")
        ranking_QK = bm25.rank(task)
        return figures(task, task.score(ranking_QK), None, None) | _by_depth(placement, task, ranking_QK)

    def embed(normalize: bool) -> Embed:
        if dim is None:
            return encoders.embed(length, normalize)
        return truncated[normalize].to(dim, encoders.embed(length, False))

    try:
        if placement is None or not isinstance(task, RetrievalTask):
            return figures(task, run_task(task, encoders.at(length), embed), length, dim)
        ranking_QK = _rank(task, encoders.at(length), embed)
        seconds = {} if placement.length is None else {"seconds_per_document": _seconds(task, encoders, length)}
        return figures(task, task.score(ranking_QK), length, dim) | _by_depth(placement, task, ranking_QK, seconds)
    finally:
        if is_last:
            for kept in truncated.values():
                kept.forget()


def _by_depth(
    placement: Placement | None, task: RetrievalTask, ranking_QK: np.ndarray, further: Mapping[str, float] = NOTHING
) -> dict[str, Any]:
    """Returns the entry of a task whose answers are at known depths, for ``evals.report.long_context``."""
    if placement is None:
        return {}
    by_depth = placement.by_depth(dict(task.score_queries(ranking_QK))[task.metrics[0]])
    described = {"passages": placement.passages, "length": placement.length, "by_depth": by_depth, **further}
    return {"long_context": described}


def _seconds(task: RetrievalTask, encoders: Encoders, length: int | None) -> float:
    """Returns the seconds that a document takes to embed, once all is compiled."""
    embed = encoders.embed(length, True)
    sample, seconds = list(task.documents[:TIMED]), 0.0
    for _ in range(2):  # the first compiles what these documents need
        started = time.perf_counter()
        embed(sample, task.document_prompt)
        seconds = time.perf_counter() - started
    return seconds / len(sample)


def _prompt(file: Path) -> str | None:
    """Returns the name of the prompt, "" for no prompt; None if the file does not say."""
    try:
        given = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise TaskError(f"{file}: broken JSON ({error})") from error
    if not isinstance(given, dict) or given.keys() - {"prompt"} or not isinstance(given.get("prompt"), str | None):
        raise TaskError(
            f'{file}: expected the name of a prompt (null for none), such as {{"prompt": "classification"}}'
        )
    return given["prompt"] or "" if "prompt" in given else None

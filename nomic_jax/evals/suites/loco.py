"""LoCo: five retrieval tasks with long documents (paper section 4.3), scored by pytrec_eval as in mteb and BEIR.

The document of row i is the only relevant one for the query of row i. The similarity is the cosine. Data come from the
hub, or from a folder with one file, or one folder of files, per data set: summ_screen_fd, gov_report and qmsum with the
columns "input" and "output", qasper with "title", "abstract" and "full_text".
"""

import dataclasses
import functools
import json
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nomic_jax.data.formats.reading import read_rows
from nomic_jax.evals.report.record import Cell, figures, label
from nomic_jax.evals.suites.hub import column, download, load
from nomic_jax.evals.tasks.contract import (
    PROMPTS,
    Embed,
    Encoders,
    TaskError,
    TruncatedEmbeddings,
    embedded,
    unit_length,
)
from nomic_jax.extras import needs

LENGTHS = (2048, 4096, 8192)


class Source(NamedTuple):
    """The source of a task's rows: data set on the hub, its archive (None for none), split, file name and columns."""

    path: str
    config: str | None
    split: str
    file: str
    document: str
    query: str


def _scrolls(name: str) -> Source:
    return Source("tau/scrolls", name, "validation", name, "input", "output")


TASKS = {
    "summ_screen_fd": _scrolls("summ_screen_fd"),
    "gov_report": _scrolls("gov_report"),
    "qmsum": _scrolls("qmsum"),
    "qasper_title": Source("allenai/qasper", None, "test", "qasper", "full_text", "title"),
    "qasper_abstract": Source("allenai/qasper", None, "test", "qasper", "full_text", "abstract"),
}


@dataclasses.dataclass(frozen=True)
class LocoTask:
    """Queries and documents in equal numbers; the document with the same index is the relevant one."""

    name: str
    queries: tuple[str, ...]
    documents: tuple[str, ...]
    type = "LoCo"
    metrics = ("ndcg@10", "recall@10")

    @classmethod
    def read(cls, name: str, folder: str | Path | None = None) -> "LocoTask":
        """Reads a task from a folder, or from the hub if ``folder`` is None.

        Raises:
          TaskError, BadRow: the data cannot be loaded or have an unexpected format; the message says what to do.
        """
        source = TASKS[name]
        if folder is None:
            where, rows = source.path, _of_hub(source)
        else:
            where = str(_file(Path(folder), source.file))
            rows = read_rows(where, {source.query: str}, allow_empty=True)
        queries, documents = [], []
        for row in rows:
            queries.append(column(row, source.query, where))
            documents.append(_text(column(row, source.document, where), f"{where}: row {len(queries)}"))
        if not queries:
            raise TaskError(f"{where} has no rows")
        return cls(name, tuple(queries), tuple(documents))

    @property
    def counts(self) -> dict[str, int]:
        return {"queries": len(self.queries), "documents": len(self.documents)}

    def run(self, embed: Embed) -> Iterator[tuple[str, float]]:
        """Returns ("ndcg@10", mean over the queries) and ("recall@10", mean over the queries).

        Raises:
          MissingPackage: pytrec_eval is not installed.
        """
        query_QE = unit_length(embedded(embed, list(self.queries), PROMPTS["query"]))
        document_NE = unit_length(embedded(embed, list(self.documents), PROMPTS["document"]))
        return score((query_QE @ document_NE.T).astype(np.float64))


def score(score_QN: np.ndarray) -> Iterator[tuple[str, float]]:
    """Yields the metrics of similarities [Q, N] in which the diagonal is relevant."""
    with needs("LoCo", "nomic_jax[eval]"):
        import pytrec_eval
    # Ids are those of the original evaluation, because trec_eval orders documents of equal score by id.
    run = {
        f"Query_{q}": {f"Passage_{n}": float(value) for n, value in enumerate(row)} for q, row in enumerate(score_QN)
    }
    relevant = {f"Query_{q}": {f"Passage_{q}": 1} for q in range(len(score_QN))}
    by_query = pytrec_eval.RelevanceEvaluator(relevant, {"ndcg_cut.10", "recall.10"}).evaluate(run).values()
    yield "ndcg@10", float(np.mean([query["ndcg_cut_10"] for query in by_query]))
    yield "recall@10", float(np.mean([query["recall_10"] for query in by_query]))


def cells(
    encoders: Encoders, data: Sequence[str], names: Sequence[str], lengths: Sequence[int], dims: Sequence[int | None]
) -> list[Cell]:
    """Returns a cell for each task (() for all), length and number of components (None for all).

    Args:
      data: one folder, or () for the hub.

    Raises:
      ValueError: a task is unknown.
      FileNotFoundError: ``data`` has more than one folder, or the folder does not exist.
    """
    if unknown := [name for name in names if name not in TASKS]:
        raise ValueError(f"--tasks: LoCo has no task {unknown[0]!r}; it has {', '.join(TASKS)}")
    if len(data) > 1 or (data and not Path(data[0]).is_dir()):
        raise FileNotFoundError(f"--data: {','.join(data)} is not one existing folder")

    def compute(name: str, length: int, dim: int | None, cut: TruncatedEmbeddings) -> dict[str, Any]:
        task = LocoTask.read(name, data[0] if data else None)
        embed = encoders.embed(length, dim is None)
        try:
            return figures(task, task.run(cut.to(dim, embed) if dim else embed), length, dim)
        finally:
            if dim == dims[-1]:
                cut.forget()

    return [
        Cell(label(name, length, dim), functools.partial(compute, name, length, dim, cut))
        for name in names or TASKS
        for length in lengths
        for cut in [TruncatedEmbeddings(normalize=True)]
        for dim in dims
    ]


def _of_hub(source: Source) -> Iterable[dict[str, Any]]:
    if source.config is None:
        return load(source.path, None, source.split)
    # SCROLLS is published as one archive per data set; its loading script no longer runs anywhere.
    archive = download(source.path, f"{source.config}.zip")
    member = f"{source.config}/{source.split}.jsonl"
    try:
        with zipfile.ZipFile(archive) as files, files.open(member) as lines:
            return [json.loads(line) for line in lines]
    except (KeyError, ValueError, zipfile.BadZipFile) as error:
        raise TaskError(f"{source.path}: {archive} has an unexpected format ({error})") from error


def _file(folder: Path, name: str) -> Path:
    """Returns the path of <name>.jsonl, .jsonl.gz or .parquet, or of a folder <name> of such files."""
    found = [folder / f"{name}{suffix}" for suffix in (".jsonl", ".jsonl.gz", ".parquet", "")]
    for path in found:
        if path.exists():
            return path
    raise TaskError(f"{folder} has none of {', '.join(path.name for path in found[:-1])} and no folder {name}")


def _text(value: Any, where: str) -> str:
    """Returns a text, or joins the sections of a qasper article: a line for each heading and each section's text."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping) and {"section_name", "paragraphs"} <= value.keys():  # columns, as on the hub
        sections = list(zip(value["section_name"], value["paragraphs"]))
    elif isinstance(value, list) and all(isinstance(section, Mapping) for section in value):  # rows, as published
        sections = [(section.get("section_name"), section.get("paragraphs")) for section in value]
    else:
        raise TaskError(f"{where}: the document is {type(value).__name__}, neither a text nor sections of an article")
    lines = (line for name, paragraphs in sections for line in (name, " ".join(paragraphs or ())) if line is not None)
    return "\n".join(lines).strip()

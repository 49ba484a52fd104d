"""Writes OUTPUT/report.md and report.html: all scores of the folder beside published ones, with charts.

Formats a table for a terminal, too.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nomic_jax.evals.report import long_context, pictures, published
from nomic_jax.evals.report.document import Heading, Paragraph, Part, Picture, Table, write_document
from nomic_jax.evals.report.published import MTEB_TYPES, Published
from nomic_jax.evals.report.record import by_setting, main_score
from nomic_jax.files import printable
from nomic_jax.files.reading import read_json

MTEB_TASKS = 56  # of MTEB(eng, v1)
PERCENT, EXACT = 2, 4  # decimals of scores
TITLES = {
    "mteb": "MTEB(eng, v1)",
    "jina_long": "Long context: the set of Jina",
    "loco": "Long context: LoCo",
    "glue": "GLUE",
    "local": "Local tasks",
}


class Run(NamedTuple):
    """One model with one set of settings on one suite.

    Attributes:
      model: name of the model and, if the embeddings are truncated, their number of components.
      max_length, dim: number of tokens and components kept; None for the default of the model or suite.
      tasks: task name -> entry of the task in the report.
    """

    model: str
    max_length: int | None
    dim: int | None
    tasks: dict[str, dict[str, Any]]

    @property
    def scores(self) -> dict[str, float]:
        return {name: main_score(figures) for name, figures in self.tasks.items()}

    def only(self, wanted: Callable[[dict[str, Any]], bool]) -> "Run":
        """Returns the run with the tasks whose entries are wanted."""
        return self._replace(tasks={name: figures for name, figures in self.tasks.items() if wanted(figures)})


def mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values) if values else float("nan")


def average_by_type(tasks: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Returns task type -> mean main score of its tasks, as in the paper. The overall average is over all tasks."""
    by_type: dict[str, list[float]] = {}
    for figures in tasks.values():
        by_type.setdefault(figures.get("type", "Retrieval"), []).append(main_score(figures))
    return {kind: mean(scores) for kind, scores in by_type.items()}


def table(report: dict[str, Any]) -> str:
    """Formats a report as text: for each type of task one line per task and averages, then the failed tasks."""
    by_type: dict[str, dict[str, dict[str, Any]]] = {}
    for name, figures in sorted(report["tasks"].items(), key=_sort_key):
        by_type.setdefault(figures.get("type", "Retrieval"), {})[name] = figures
    lines: list[tuple[str, list[str]]] = []
    for kind, tasks in by_type.items():
        first = next(iter(tasks.values()))
        columns = sorted(
            (key for key, value in first.items() if isinstance(value, float)), key=first.get("metric", "").__ne__
        )
        lines.append((kind, [f"{column:>16}" for column in columns]))
        lines += [(name, [f"{figures[column]:16.4f}" for column in columns]) for name, figures in tasks.items()]
        for setting, group in by_setting(tasks).items():
            if len(group) > 1:
                means = [mean(figures[column] for figures in group) for column in columns]
                lines.append((f"average{setting}", [f"{value:16.4f}" for value in means]))
    if len(by_type) > 1:
        for setting, group in by_setting(report["tasks"]).items():
            lines.append((f"all tasks{setting}", [f"{mean(map(main_score, group)):16.4f}", "  (main scores)"]))
    width = max(len(name) for name in [*(name for name, _ in lines), *report["failed"], ""])
    failed = [f"{name:{width}}  FAILED: {error}" for name, error in report["failed"].items()]
    return "\n".join(map(printable.printable, [f"{name:{width}}{''.join(cells)}" for name, cells in lines] + failed))


def _sort_key(item: tuple[str, dict[str, Any]]) -> tuple[str, int, int]:
    """Returns the sort key of a task in the table: by name, by length, the widest embeddings first."""
    name, figures = item
    return figures.get("task", name), figures.get("max_length", 0), -figures.get("dim", 0)


def write_report(folder: str | Path) -> Path:
    """Writes report.md, report.html and their charts for all reports of ``launch.evaluate`` in the folder.

    Returns:
      the path of report.md.
    """
    folder = Path(folder)
    reports = read_reports(folder)
    parts: list[Part] = [Heading("Evaluation", 1)]
    for suite, title in TITLES.items():
        runs = [run for name, report in reports.items() if report["suite"] == suite for run in runs_of(name, report)]
        if runs:
            parts += [Heading(title), *_SECTIONS[suite](folder, runs)]
    write_document(folder, [*parts, *_matryoshka(folder, reports), *_failures(reports)])
    return folder / "report.md"


def read_reports(folder: Path) -> dict[str, dict[str, Any]]:
    """Returns file name without suffix -> report, for all reports in the folder."""
    reports = {}
    for path in sorted(folder.glob("*.json")):
        content = read_json(path)
        if isinstance(content, dict) and {"suite", "tasks"} <= content.keys():
            reports[path.stem] = content
    return reports


def runs_of(name: str, report: dict[str, Any]) -> list[Run]:
    """Returns the runs of a report, one per length and number of components."""
    name = name.removesuffix(f"-{report['suite']}")
    settings: dict[tuple[int | None, int | None], dict[str, dict[str, Any]]] = {}
    for name_of_cell, figures in report["tasks"].items():
        key = (figures.get("max_length"), figures.get("dim"))
        settings.setdefault(key, {})[figures.get("task", name_of_cell)] = figures
    # Ordered by length, the widest embeddings first.
    ordered = sorted(settings.items(), key=lambda item: (item[0][0] or 0, -(item[0][1] or 0)))
    return [Run(name + (f", {dim} dims" if dim else ""), length, dim, tasks) for (length, dim), tasks in ordered]


def _legend_label(run: Run, runs: list[Run]) -> str:
    """Returns the model's name, with the length if the model was run at several lengths."""
    is_one_of_several = sum(other.model == run.model for other in runs) > 1
    return f"{run.model} @{run.max_length}" if is_one_of_several else run.model


def _mteb(folder: Path, runs: list[Run]) -> list[Part]:
    rows: list[list[Any]] = []
    groups: dict[str, dict[str, float]] = {}
    for run in runs:
        types = average_by_type(run.tasks)
        is_whole = len(run.tasks) == MTEB_TASKS
        note = f"this run, {run.max_length} tokens" + ("" if is_whole else f"; {len(run.tasks)} of {MTEB_TASKS} tasks")
        percent = {kind: 100 * score for kind, score in types.items()}
        groups[_legend_label(run, runs)] = percent
        cells = [percent.get(kind, "") for kind in MTEB_TYPES]
        rows.append([run.model, 100 * mean(run.scores.values()), *cells, note])
    rows += [
        [row.model, row.average, *(row.by.get(kind, "") for kind in MTEB_TYPES), row.source] for row in published.MTEB
    ]
    groups |= {row.model: row.by for row in published.MTEB if row.by}
    pictures.bars(folder / "mteb.png", groups, MTEB_TYPES, "average score, per cent")
    caution = "The averages of a run with fewer tasks are over these tasks only and do not compare with the others."
    return [
        Paragraph("Main scores, per cent; averages by type of task, and over all tasks."),
        *([Paragraph(caution)] if any(len(run.tasks) < MTEB_TASKS for run in runs) else []),
        Table(["model", "average", *MTEB_TYPES, "source"], rows, PERCENT),
        Picture("mteb.png", "Score by type of task"),
        _by_task(runs),
    ]


def _by_length(folder: Path, runs: list[Run], suite: str, known: Sequence[Published], metric: str) -> list[Part]:
    tasks = sorted({task for run in runs for task in run.tasks})
    rows: list[list[Any]] = []
    lines: dict[str, dict[int, float]] = {}
    for run in runs:
        scores = {task: 100 * score for task, score in run.scores.items()}
        rows.append(
            [run.model, run.max_length, mean(scores.values()), *(scores.get(task, "") for task in tasks), "this run"]
        )
        if run.max_length is not None:
            lines.setdefault(run.model, {})[run.max_length] = mean(scores.values())
    for row in known:
        lines[row.model] = {int(length): score for length, score in row.by.items()}
        rows += [[row.model, length, score, *[""] * len(tasks), row.source] for length, score in row.by.items()]
    pictures.lines(folder / f"{suite}.png", lines, "tokens", metric)
    header = ["model", "tokens", "average", *tasks, "source"]
    return [Paragraph(f"{metric}."), Table(header, rows, PERCENT), Picture(f"{suite}.png", f"{metric} by length")]


def _jina(folder: Path, runs: list[Run]) -> list[Part]:
    metric = "nDCG@10 (retrieval) and V-measure (clustering), per cent"
    return _by_length(folder, runs, "jina_long", published.JINA_LONG, metric)


def _loco(folder: Path, runs: list[Run]) -> list[Part]:
    return _by_length(folder, runs, "loco", published.LOCO, "nDCG@10, per cent")


def _glue(folder: Path, runs: list[Run]) -> list[Part]:
    tasks = published.GLUE_TASKS
    rows: list[list[Any]] = []
    groups: dict[str, dict[str, float]] = {}
    for run in runs:
        groups[run.model] = run.scores
        note = "this run" if len(run.tasks) == len(tasks) else f"this run; {len(run.tasks)} of {len(tasks)} tasks"
        rows.append([run.model, mean(run.scores.values()), *(run.scores.get(task, "") for task in tasks), note])
    rows += [[row.model, row.average, *(row.by.get(task, "") for task in tasks), row.source] for row in published.GLUE]
    groups |= {row.model: row.by for row in published.GLUE if row.by}
    pictures.bars(folder / "glue.png", groups, tasks, "score on the development set")
    details = [
        [run.model, task, *(figures.get(name, "") for name in ("metric", "learning_rate", "batch_size", "seeds"))]
        for run in runs
        for task, figures in run.tasks.items()
    ]
    return [
        Paragraph("Development sets; medians over the seeds, at the best learning rate and batch size."),
        Table(["model", "average", *tasks, "source"], rows),
        Picture("glue.png", "GLUE by task"),
        Table(["model", "task", "metric", "learning rate", "batch", "score of each seed"], details, EXACT),
    ]


def _local(folder: Path, runs: list[Run]) -> list[Part]:
    labels = [_legend_label(run, runs) for run in runs]
    placed = [(label, run.only(long_context.is_placed)) for label, run in zip(labels, runs)]
    named = [(label, run.only(lambda figures: not long_context.is_placed(figures))) for label, run in zip(labels, runs)]
    return [*_by_type(folder, named), *long_context.parts(folder, {label: run.tasks for label, run in placed})]


def _by_type(folder: Path, named: Sequence[tuple[str, Run]]) -> list[Part]:
    parts: list[Part] = []
    types = dict.fromkeys(kind for _, run in named for kind in average_by_type(run.tasks))
    for kind in types:
        own = [run.only(lambda figures: figures.get("type", "Retrieval") == kind) for _, run in named]  # noqa: B023
        own = [run for run in own if run.tasks]
        names = sorted({task for run in own for task in run.tasks})
        metric = next(figures.get("metric", "ndcg@10") for run in own for figures in run.tasks.values())
        rows = [
            [
                run.model,
                run.max_length or "",
                mean(run.scores.values()),
                *(run.scores.get(name, "") for name in names),
            ]
            for run in own
        ]
        parts += [Paragraph(f"{kind}, {metric}:"), Table(["model", "tokens", "average", *names], rows, EXACT)]
    groups = {label: average_by_type(run.tasks) for label, run in named if run.dim is None and run.tasks}
    if groups:
        pictures.bars(folder / "local.png", groups, tuple(types), "average of the main metric")
        parts.append(Picture("local.png", "Score by type of task"))
    return parts


def _by_task(runs: list[Run]) -> Table:
    tasks = sorted(
        {(figures["type"], task) for run in runs for task, figures in run.tasks.items()},
        key=lambda pair: (MTEB_TYPES.index(pair[0]) if pair[0] in MTEB_TYPES else len(MTEB_TYPES), pair),
    )
    rows = [
        [kind, task, *(100 * run.scores[task] if task in run.tasks else "" for run in runs)] for kind, task in tasks
    ]
    return Table(["type", "task", *(f"{run.model} @{run.max_length}" for run in runs)], rows, PERCENT)


def _matryoshka(folder: Path, reports: dict[str, dict[str, Any]]) -> list[Part]:
    rows: list[list[Any]] = []
    lines: dict[str, dict[int, float]] = {}
    for name, report in reports.items():
        for run in runs_of(name, report):
            if run.dim is not None:
                model = f"{name.removesuffix('-' + report['suite'])}, {report['suite']}"
                model += f" @{run.max_length}" if run.max_length else ""
                score = 100 * mean(run.scores.values())
                lines.setdefault(model, {})[run.dim] = score
                rows.append([model, run.dim, score, "this run"])
    if not rows:
        return []
    if any(report["suite"] == "mteb" for report in reports.values()):
        lines["nomic-embed-text-v1.5, mteb"] = {int(dim): score for dim, score in published.MATRYOSHKA.items()}
        rows += [
            ["nomic-embed-text-v1.5, mteb", dim, score, published.V15_CARD]
            for dim, score in published.MATRYOSHKA.items()
        ]
    pictures.lines(folder / "matryoshka.png", lines, "components kept", "average score, per cent")
    header = ["model, suite", "components", "average", "source"]
    table = Table(header, rows, PERCENT)
    return [Heading("Components kept"), table, Picture("matryoshka.png", "Score by components kept")]


def _failures(reports: dict[str, dict[str, Any]]) -> list[Part]:
    rows = [[name, task, error] for name, report in reports.items() for task, error in report.get("failed", {}).items()]
    return [Heading("Failed"), Table(["report", "task", "error"], rows)] if rows else []


_SECTIONS = {"mteb": _mteb, "jina_long": _jina, "loco": _loco, "glue": _glue, "local": _local}

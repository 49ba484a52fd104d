"""Consistency filtering, mining of hard negatives and scoring for every source of a mixture."""

import contextlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from nomic_jax.curate.engine.embedding import Encoder, Scorer
from nomic_jax.curate.engine.report import quarantine, table
from nomic_jax.curate.filter.consistency import FilterOptions, scoring
from nomic_jax.curate.filter.selection import threshold_text, write_selection
from nomic_jax.curate.filter.vectors import distillation_objective
from nomic_jax.curate.mine.negatives import SCORE_COLUMNS, collected, find_candidates_of, write_mined
from nomic_jax.curate.mine.selection import MiningOptions
from nomic_jax.curate.score.scoring import ScoreOptions, opened_task, write_scores
from nomic_jax.data.mixture import COLUMNS, MixtureError, Source, read_pairs, read_sources
from nomic_jax.files.folders import check_only
from nomic_jax.files.locks import exclusive_lock
from nomic_jax.files.printable import code
from nomic_jax.files.writing import atomic_file, write_json
from nomic_jax.jobs.tasks import Engine, local_engine


def is_mixture(files: str) -> bool:
    return files.endswith((".yaml", ".yml"))


def filter_mixture(
    mixture: str,
    output: str | os.PathLike,
    encoder: Encoder,
    options: FilterOptions,
    *,
    on_bad_row: str = "raise",
    engine: Engine = local_engine,
    progress: bool = True,
) -> dict[str, Any]:
    """Runs ``filter_pairs`` on every source of a mixture, which names the columns. Blocks do not mix sources.

    The rows of all sources are counted before anything is embedded, so that a bad row of the last one is found first.
    ``output`` receives a folder for each source, with the source's name; mixture.yaml, for training on the kept pairs;
    with ``options.vectors`` distillation.yaml, for training on the teacher's vectors of all pairs; and summary.json and
    report.md with the share kept of each source. Returns the summary.
    """
    output = Path(output)
    sources = _sources(mixture, output, "launch.filter")
    summaries = {}
    with contextlib.ExitStack() as stack:
        tasks = {}
        for source in _with_progress(sources, progress):
            columns = (source.columns[0], source.columns[1])
            task = stack.enter_context(
                scoring(
                    source.files,
                    output / source.name,
                    encoder,
                    options,
                    columns,
                    on_bad_row=on_bad_row,
                    progress=progress,
                )
            )
            tasks[source.name] = (source.files, task)
        for _, task in tasks.values():
            # Do not wait for blocks of other processes yet: the next source has work.
            engine(task, encoder, False)
        for _, task in tasks.values():
            engine(task, encoder, True)
        for name, (files, task) in tasks.items():
            summaries[name] = write_selection(files, output / name, task, options.k, options.min_score)
    counts = [
        {"source": name, **{field: summary[field] for field in ("rows", "kept", "share_kept", "rejected", "ranks")}}
        for name, summary in summaries.items()
    ]
    rows, kept = (sum(count[field] for count in counts) for field in ("rows", "kept"))
    summary = {
        "rows": rows,
        "kept": kept,
        "share_kept": round(kept / rows, 4),
        "rejected": sum(count["rejected"] for count in counts),
        "quarantined": [entry for summary in summaries.values() for entry in summary.get("quarantined", [])],
        "k": options.k,
        "min_score": options.min_score,
        "sources": counts,
    }
    lines = [(s["source"], s["rows"], s["kept"], s["share_kept"], s["ranks"][0]["share"]) for s in counts]
    report = (
        f"# Consistency filter of {code(mixture)}\n\nKept {kept:,} of {rows:,} pairs ({kept / rows:.1%}): those whose "
        f"document is among the {options.k} nearest to its query{threshold_text(summary)}. Each source's folder has a "
        f"report with sample rows.\n\n{quarantine(summary)}"
        f"{table(('source', 'rows', 'kept', 'share kept', 'share of rank 1'), lines)}"
    )
    _write(mixture, output, "kept.jsonl", {}, summary, report)
    if options.vectors:
        objectives = {source.name: {"objective": distillation_objective(source.columns)} for source in sources}
        with exclusive_lock(output / ".mixture.lock"), atomic_file(output / "distillation.yaml") as part:
            part.write_text(replace_files(mixture, "{name}/vectors", objectives), encoding="utf-8")
    return summary


def mine_mixture(
    mixture: str,
    output: str | os.PathLike,
    encoder: Encoder | None,
    options: MiningOptions,
    *,
    on_bad_row: str = "raise",
    engine: Engine = local_engine,
    progress: bool = True,
) -> dict[str, Any]:
    """Runs ``mine_negatives`` on every source of a mixture, which names the columns. Sources do not share negatives.

    The rows of all sources are read before anything is embedded, so that a bad row of the last one is found first.
    ``output`` receives a folder for each source, with the source's name; mixture.yaml, for training on the triplets;
    and summary.json and report.md with the counts of each source. Returns the summary.
    """
    output = Path(output)
    sources = _sources(mixture, output, "launch.mine")
    dropped = ("dropped_too_few", "dropped_by_margin", "dropped_for_want_of_documents")
    fields = ("rows", "pairs", "written", *dropped, "filled_with_random", "rejected")
    counts, objectives, quarantined = [], {}, []
    with contextlib.ExitStack() as stack:
        inputs = {}
        for source in _with_progress(sources, progress):
            columns = (source.columns[0], source.columns[1])
            inputs[source.name] = stack.enter_context(
                collected(
                    source.files,
                    output / source.name,
                    encoder,
                    options,
                    columns,
                    on_bad_row=on_bad_row,
                    progress=progress,
                )
            )
        find_candidates_of([output / source.name for source in sources], encoder, options, engine, progress)
        for source in sources:
            columns, folder = (source.columns[0], source.columns[1]), output / source.name
            summary = write_mined(source.files, inputs[source.name], folder, encoder, options, columns, progress)
            quarantined += summary.get("quarantined", [])
            counts.append({"source": source.name, **{field: summary[field] for field in fields}})
            objective = {"type": "triplet", "columns": [*columns, COLUMNS["triplet"][2]]}
            if encoder:
                # The rows are trained by InfoNCE, as those of random negatives; a loss on the scores is one word away.
                objective |= {"scores": list(SCORE_COLUMNS), "loss": "infonce"}
            objectives[source.name] = {"objective": objective}
    total = {field: sum(count[field] for count in counts) for field in fields} | {"quarantined": quarantined}
    report = (
        f"# Negatives of {code(mixture)}\n\nEach source's folder has a report with sample rows.\n\n{quarantine(total)}"
        f"{table([field.replace('_', ' ') for field in counts[0]], [tuple(c.values()) for c in counts])}"
    )
    summary = {**total, "sources": counts}
    _write(mixture, output, "triplets.jsonl", objectives, summary, report)
    return summary


def score_mixture(
    mixture: str,
    output: str | os.PathLike,
    scorer: Scorer,
    options: ScoreOptions,
    *,
    on_bad_row: str = "raise",
    engine: Engine = local_engine,
    progress: bool = True,
) -> dict[str, Any]:
    """Runs ``score_rows`` on every source of a mixture, which names the columns: pairs, or triplets.

    ``output`` receives a folder for each source, with the source's name; mixture.yaml, in which the triplets name their
    column of scores; and summary.json and report.md with the counts of each source. Returns the summary.
    """
    output = Path(output)
    sources = _sources(mixture, output, "launch.score", read_sources(mixture))
    if texts := [source.name for source in sources if source.kind == "text"]:
        raise MixtureError(f"{mixture}: source {texts[0]!r} holds single texts, which have no candidates to score")
    summaries: dict[str, dict[str, Any]] = {}
    with contextlib.ExitStack() as stack:
        tasks = {}
        for source in _with_progress(sources, progress):
            arguments = (source.files, output / source.name, scorer, options, source.columns)
            tasks[source.name] = stack.enter_context(opened_task(*arguments, on_bad_row=on_bad_row, progress=progress))
        for task in tasks.values():
            # Do not wait for blocks of other processes yet: the next source has work.
            engine(task, scorer, False)
        for task in tasks.values():
            engine(task, scorer, True)
        for source in sources:
            summaries[source.name] = write_scores(source.files, output / source.name, tasks[source.name], options)
    totals = ("rows", "scores", "rows_whose_document_is_best", "rejected")
    fields = (*totals, "mean_of_documents", "mean_of_negatives", "lowest", "highest")
    counts = [{"source": name, **{field: found[field] for field in fields}} for name, found in summaries.items()]
    summary = {field: sum(count[field] for count in counts) for field in totals} | {
        "column": options.column,
        "quarantined": [entry for found in summaries.values() for entry in found["quarantined"]],
        "sources": counts,
    }
    lines = [tuple("" if value is None else value for value in count.values()) for count in counts]
    report = (
        f"# Scores of {code(mixture)}\n\nThe column {code(options.column)} has the teacher's scores. Each source's "
        f"folder has a report with sample rows.\n\n{quarantine(summary)}"
        f"{table([field.replace('_', ' ') for field in counts[0]], lines)}"
    )
    scored = {
        source.name: {"objective": {**_without_infonce(objective), "scores": options.column}}
        for source, objective in zip(sources, _objectives(mixture), strict=True)
        if source.kind == "triplet"
    }
    _write(mixture, output, "scored.jsonl", scored, summary, report)
    return summary


def _sources(mixture: str, output: Path, command: str, sources: tuple[Source, ...] | None = None) -> tuple[Source, ...]:
    """Returns the sources of the mixture, pairs if not given. Raises FileRefused if ``output`` holds anything else."""
    sources = sources or read_pairs(mixture)
    names = {"mixture.yaml", "distillation.yaml", "report.md", "summary.json", *(source.name for source in sources)}
    check_only(output, names.__contains__, f"{command} with this mixture")
    return sources


def _with_progress(sources: Sequence[Source], progress: bool) -> Iterable[Source]:
    return tqdm(sources, "reading sources", unit=" sources", disable=not progress)


def _write(
    mixture: str,
    output: Path,
    file: str,
    changes: Mapping[str, Mapping[str, Any]],
    summary: Mapping[str, Any],
    report: str,
) -> None:
    content = replace_files(mixture, f"{{name}}/{file}", changes)
    with exclusive_lock(output / ".mixture.lock"):
        for name, text in (("mixture.yaml", content), ("report.md", report)):
            with atomic_file(output / name) as part:
                part.write_text(text, encoding="utf-8")
        write_json(output / "summary.json", summary)


def _without_infonce(objective: dict[str, Any]) -> dict[str, Any]:
    """Returns the objective without the loss that ``mine_mixture`` names, which would leave the scores out."""
    return {field: value for field, value in objective.items() if (field, value) != ("loss", "infonce")}


def _objectives(mixture: str) -> list[dict[str, Any]]:
    """Returns the field ``objective`` of each source, as it is written."""
    content = yaml.safe_load(Path(mixture).read_text(encoding="utf-8"))
    return [entry["objective"] for entry in (content["datasets"] if isinstance(content, dict) else content)]


def replace_files(mixture: str, file: str, changes: Mapping[str, Mapping[str, Any]] | None = None) -> str:
    """Returns the YAML of a mixture with its sources' files replaced and their row counts removed.

    Args:
      file: the files of a source; "{name}" stands for the source's name.
      changes: source name -> fields to replace.
    """
    content = yaml.safe_load(Path(mixture).read_text(encoding="utf-8"))
    entries: Iterable[dict] = content["datasets"] if isinstance(content, dict) else content
    for entry in entries:
        entry.pop("rows", None)  # the row count of the replaced files
        name = str(entry["name"])
        entry.update({"bucket": file.replace("{name}", name), **(changes or {}).get(name, {})})
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)

"""Removes empty, short and duplicate rows, and reports the rows that overlap with evaluation tasks.

    nomic-jax clean --input='pairs/*.jsonl' --output=cleaned --near=0.8 --min_words=2 --evaluation=tasks/nfcorpus

The output folder gets kept.jsonl, removed.jsonl (every removed row, with the reason), summary.json and report.md.
--workers, --engine=ray and --shard describe the rows in parallel, and one process compares them: the same bytes.
"""

import contextlib
from pathlib import Path

from absl import flags

from nomic_jax.curate.clean.cleaning import CleaningOptions, clean_rows
from nomic_jax.curate.clean.contamination import NGRAM, EvaluationTexts
from nomic_jax.curate.engine.report import quarantine_lines
from nomic_jax.evals.tasks.retrieval import RetrievalTask

from . import engine
from .errors import run

flags.adopt_module_key_flags(engine)  # so that --help lists them

FLAGS = flags.FLAGS


def main(argv: list[str]) -> None:
    del argv
    options = CleaningOptions(
        min_words=FLAGS.min_words,
        min_chars=FLAGS.min_chars,
        exact=FLAGS.exact,
        near=FLAGS.near,
        near_columns=tuple(FLAGS.near_columns),
        ngram=FLAGS.ngram,
        remove_contaminated=FLAGS.remove_contaminated,
    )
    tasks: dict[str, EvaluationTexts] = {}
    for folder in map(Path, FLAGS.evaluation):
        task_folders = sorted(path.parent for path in folder.glob("*/queries.jsonl"))
        for task in map(RetrievalTask.read, task_folders or [folder]):
            if task.name in tasks:
                raise ValueError(f"--evaluation holds two tasks named {task.name!r}; rename one of the folders")
            tasks[task.name] = EvaluationTexts(task.queries, task.documents)
    # One process needs no blocks: it reads the rows once.
    in_blocks = engine.is_given() or (engine.WORKERS.value or 1) > 1
    with engine.on_cpus(None, 1) if in_blocks else contextlib.nullcontext((None, None)) as (chosen, _):
        summary = clean_rows(
            FLAGS.input,
            FLAGS.output,
            FLAGS.columns,
            options,
            tasks,
            on_bad_row=FLAGS.on_bad_row,
            engine=chosen,
            is_shard=engine.is_shard(),
        )
    removed = ", ".join(f"{count:,} {reason}" for reason, count in summary["removed"].items() if count) or "none"
    print(
        f"kept {summary['kept']:,} of {summary['rows']:,} rows (removed: {removed}), rejected "
        f"{summary['rejected']:,}; see {FLAGS.output}/report.md"
    )
    for line in quarantine_lines(summary):
        print(line)
    for overlap in summary["contamination"]:
        print(
            f"{overlap['task']}: {overlap['training_rows']:,} rows overlap with {overlap['texts_met']:,} of "
            f"{overlap['texts']:,} {overlap['part']}"
        )
    if not summary["kept"]:
        raise ValueError("no row is left: see the report and removed.jsonl, and remove less")


if __name__ == "__main__":
    flags.DEFINE_string(
        "input", None, "Input rows: a file, a folder of files, a glob, a brace range or a URL.", required=True
    )
    flags.DEFINE_string("output", None, "Folder for the results.", required=True)
    flags.DEFINE_list("columns", ["query", "document"], "Columns that hold the texts.")
    flags.DEFINE_integer("min_words", 0, "Remove a row if one of its texts has fewer words.", lower_bound=0)
    flags.DEFINE_integer("min_chars", 0, "Remove a row if one of its texts has fewer characters.", lower_bound=0)
    flags.DEFINE_bool("exact", True, "Remove a row whose texts equal those of an earlier row.")
    flags.DEFINE_float(
        "near",
        None,
        "Remove near-duplicates: rows where each text has at least this Jaccard similarity of word 3-grams to that of "
        "an earlier row, such as 0.8. [off]",
    )
    flags.DEFINE_list(
        "near_columns", [], "Columns that --near compares; other columns may differ, such as questions. [--columns]"
    )
    flags.DEFINE_multi_string(
        "evaluation",
        [],
        "Report overlap with this retrieval task: its folder, or a folder of task folders; may be repeated.",
    )
    flags.DEFINE_integer(
        "ngram", NGRAM, "Consecutive words in common that count as overlap with an evaluation text.", lower_bound=1
    )
    flags.DEFINE_enum(
        "remove_contaminated",
        "none",
        ["none", "queries", "any"],
        "Remove rows that overlap with the queries of an evaluation task, or with any of its texts.",
    )
    flags.DEFINE_enum(
        "on_bad_row", "raise", ["raise", "skip"], "raise: stop at an unusable row. skip: write it to rejected.jsonl."
    )
    run(main)

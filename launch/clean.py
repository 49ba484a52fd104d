"""Cleaning: removes empty, short and repeated rows, and tells which overlap with evaluation tasks.

    python -m launch.clean --input='pairs/*.jsonl' --output=cleaned --near=0.8 --min_words=2 --evaluation=tasks/nfcorpus

writes kept.jsonl, removed.jsonl (every row that went, and why), summary.json and report.md.
"""

from pathlib import Path

from absl import flags

from launch.errors import run
from nomic_jax.curate.clean.cleaning import CleaningOptions, clean_rows
from nomic_jax.curate.clean.contamination import NGRAM, EvaluationTexts
from nomic_jax.curate.engine.report import told
from nomic_jax.evals.tasks.retrieval import RetrievalTask

FLAGS = flags.FLAGS


def main(argv: list[str]) -> None:
    del argv
    options = CleaningOptions(
        min_words=FLAGS.min_words,
        min_chars=FLAGS.min_chars,
        exact=FLAGS.exact,
        near=FLAGS.near,
        ngram=FLAGS.ngram,
        remove_contaminated=FLAGS.remove_contaminated,
    )
    tasks: dict[str, EvaluationTexts] = {}
    for folder in map(Path, FLAGS.evaluation):
        inside = sorted(path.parent for path in folder.glob("*/queries.jsonl"))
        for task in map(RetrievalTask.read, inside or [folder]):
            if task.name in tasks:
                raise ValueError(f"--evaluation names two tasks {task.name!r}; rename one folder")
            tasks[task.name] = EvaluationTexts(task.queries, task.documents)
    summary = clean_rows(FLAGS.input, FLAGS.output, FLAGS.columns, options, tasks, on_bad_row=FLAGS.on_bad_row)
    removed = ", ".join(f"{count:,} {reason}" for reason, count in summary["removed"].items() if count) or "none"
    print(
        f"kept {summary['kept']:,} of {summary['rows']:,} rows (removed: {removed}), rejected "
        f"{summary['rejected']:,}; see {FLAGS.output}/report.md"
    )
    for line in told(summary):
        print(line)
    for line in summary["contamination"]:
        print(
            f"{line['task']}: {line['training_rows']:,} rows overlap with {line['texts_met']:,} of "
            f"{line['texts']:,} {line['part']}"
        )


if __name__ == "__main__":
    flags.DEFINE_string("input", None, "Rows: a file, a folder of them, a glob, a brace range or a URL.", required=True)
    flags.DEFINE_string("output", None, "Folder for the results.", required=True)
    flags.DEFINE_list("columns", ["query", "document"], "Columns that hold the texts.")
    flags.DEFINE_integer("min_words", 0, "Remove a row with a text of fewer words.", lower_bound=0)
    flags.DEFINE_integer("min_chars", 0, "Remove a row with a text of fewer characters.", lower_bound=0)
    flags.DEFINE_bool("exact", True, "Remove a row whose texts equal those of an earlier one.")
    flags.DEFINE_float(
        "near",
        None,
        "Remove a row this similar to an earlier one, such as 0.8: Jaccard of word 3-grams. [no such step]",
    )
    flags.DEFINE_multi_string(
        "evaluation", [], "Folder of a retrieval task, or of such folders, to look for in the rows; may be repeated."
    )
    flags.DEFINE_integer("ngram", NGRAM, "Words in a row that make an overlap with an evaluation text.", lower_bound=1)
    flags.DEFINE_enum(
        "remove_contaminated",
        "none",
        ["none", "queries", "any"],
        "Remove rows that overlap with an evaluation task's queries, or with any text of it.",
    )
    flags.DEFINE_enum(
        "on_bad_row", "raise", ["raise", "skip"], "Stop at a row that cannot be used, or put it into rejected.jsonl."
    )
    run(main)

"""Finetunes a model on your own pairs and says whether it helped: nomic-jax finetune FILE --base=MODEL --output=DIR

    nomic-jax finetune faq.csv --base=sentence-transformers/all-MiniLM-L6-v2 --output=my-embedder

FILE holds a query and a document in each row, such as a question and its answer: csv, tsv, json, jsonl or parquet (also
compressed, several files as 'pairs/*.csv', a URL). The columns are found by their names (query, question or anchor;
document, answer, positive or passage; negatives), else taken in their order; --columns names them.

A part of the pairs is held out first; no text of it is trained on. DIR becomes the finetuned model, which
SentenceTransformer("DIR") opens, with report.md and report.html: figures before and after with the interval of their
difference, and the ten queries that changed most. How much is trained follows from the number of pairs, for about five
minutes on 2 cores with a small model. The same command continues after a kill. DIR/training holds the held-out pairs
and the run, and may be deleted in the end.
"""

from absl import flags

from nomic_jax.evals.suites.side_by_side import changes_table, figures_table, to_text
from nomic_jax.files.printable import printable
from nomic_jax.fitting.amounts import MINUTES, MOST_QUERIES
from nomic_jax.fitting.finetune import finetune
from nomic_jax.inference.compilation_cache import use_compilation_cache
from nomic_jax.train.interruption import exit_on_sigterm

from .errors import run

FLAGS = flags.FLAGS


def main(arguments: list[str]) -> None:
    exit_on_sigterm()
    use_compilation_cache()
    found = finetune(
        arguments[0],
        FLAGS.base,
        FLAGS.output,
        columns=FLAGS.columns,
        held_out=FLAGS.held_out,
        minutes=FLAGS.minutes,
        most_pairs=FLAGS.most_pairs,
        epochs=FLAGS.epochs,
        batch_size=FLAGS.batch_size,
        lr=FLAGS.lr,
        seed=FLAGS.seed,
        on_bad_row=FLAGS.on_bad_row,
        say=lambda line: print(printable(line), flush=True),
    )
    print(f"\n{printable(found.verdict)}")
    if found.advice:
        print("What to try:", *(f"- {line}" for line in found.advice), sep="\n")
    names = ("before", "after")
    print(f"\n{to_text(figures_table(found.comparison.differences(), names, found.baselines))}\n")
    if changes := found.comparison.changes():
        print(f"The queries that changed most:\n{to_text(changes_table(changes, names))}\n")
    print(printable(f'wrote {FLAGS.output}: SentenceTransformer("{FLAGS.output}") opens it, report.html shows more'))


if __name__ == "__main__":
    flags.DEFINE_string(
        "base", None, "The model to start from: a name on the Hugging Face hub, a folder or a run.", required=True
    )
    flags.DEFINE_string("output", None, "Folder for the finetuned model and the report; new or empty.", required=True)
    flags.DEFINE_list(
        "columns", [], "Columns of query, document and, if there are any, negatives. [by their names or order]"
    )
    flags.DEFINE_integer(
        "held_out", None, f"Queries to hold out. [a tenth of the pairs, 20 to {MOST_QUERIES}]", lower_bound=1
    )
    flags.DEFINE_float(
        "minutes", MINUTES, "Training on 2 cores may take about that long; more takes more pairs, more often.", 0.01
    )
    flags.DEFINE_integer("most_pairs", None, "Train on at most so many pairs. [by --minutes]", lower_bound=10)
    flags.DEFINE_float("epochs", None, "How often each pair is used. [1 to 3, by --minutes]", lower_bound=0.01)
    flags.DEFINE_integer("batch_size", None, "Pairs in a step. [8 to 64, by their number]", lower_bound=2)
    flags.DEFINE_float("lr", None, "Peak learning rate. [2e-5]", lower_bound=0)
    flags.DEFINE_integer("seed", 0, "Of the choice of pairs, and of their order.")
    flags.DEFINE_enum(
        "on_bad_row",
        "raise",
        ["raise", "skip"],
        "raise: stop at a row that cannot be read. skip: write it to DIR/training/rejected.jsonl.",
    )
    run(main, ("FILE",))

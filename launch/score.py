"""Scores every candidate of a row by a teacher: its document and each of its negatives, as a column of numbers.

    nomic-jax score --input=mined/mixture.yaml --output=scored --model=cross-encoder/ms-marco-MiniLM-L6-v2
    nomic-jax score --input=pairs.jsonl --output=scored --model=thenlper/gte-base

The output folder gets scored.jsonl (the rows with `scores` added: [document, negative 1, ...]), summary.json and
report.md; for a mixture, a folder a source and mixture.yaml, whose triplets name their scores, for the losses on a
teacher's scores. The teacher is a cross-encoder (one label), or an embedder, whose scores are its own similarity. It
reads texts, so its tokenizer may be another than the student's. A killed command resumes; several share the work.
"""

from typing import Any

from absl import flags

from nomic_jax.curate.engine.report import quarantine_lines
from nomic_jax.curate.mixtures import is_mixture, score_mixture
from nomic_jax.curate.score.scoring import ScoreOptions, score_rows
from nomic_jax.data.formats.paths import expand_files

from . import teacher
from .errors import run

flags.adopt_module_key_flags(teacher)  # so that --help lists them
_NEGATIVES = flags.DEFINE_string(
    "negatives_column", None, "Column with a list of negatives, for triplets. [none: the input holds pairs]"
)
_COLUMN = flags.DEFINE_string("scores_column", "scores", "Name of the column that is added.")
_ACTIVATION = flags.DEFINE_enum(
    "activation",
    "model",
    ["model", "identity", "sigmoid"],
    "What becomes of a cross-encoder's logit. model: what the model says (of most, the sigmoid). identity: the logit "
    "itself, whose differences a sigmoid would squeeze.",
)
_BLOCK_SIZE = flags.DEFINE_integer("block_size", 1024, "Rows that a process scores at a time.")


def main(argv: list[str]) -> None:
    del argv
    if teacher.APPROXIMATE_ABOVE.present:
        raise ValueError("--approximate_above is for searching, and nothing is searched here; leave it out")
    options = ScoreOptions(_COLUMN.value, _BLOCK_SIZE.value)
    files, output = teacher.INPUT.value, teacher.OUTPUT.value
    common: dict[str, Any] = {
        "on_bad_row": teacher.ON_BAD_ROW.value,
        "engine": teacher.engine(scores_by=_ACTIVATION.value),
    }
    named = [flag for flag in (_NEGATIVES, teacher.QUERY_COLUMN, teacher.DOCUMENT_COLUMN) if flag.present]
    if is_mixture(files):
        if named:
            raise ValueError(f"a mixture names the columns of its sources; leave --{named[0].name} out")
        summary = score_mixture(files, output, teacher.load_scorer(_ACTIVATION.value), options, **common)
    else:
        expand_files(files)  # report a mistyped path before loading the model
        negatives = [_NEGATIVES.value] if _NEGATIVES.value else []
        columns = [teacher.QUERY_COLUMN.value, teacher.DOCUMENT_COLUMN.value, *negatives]
        scorer = teacher.load_scorer(_ACTIVATION.value)
        summary = score_rows(files, output, scorer, options, columns=columns, **common)
    print(
        f"scored {summary['scores']:,} candidates of {summary['rows']:,} rows; the document scores best in "
        f"{summary['rows_whose_document_is_best']:,}; rejected {summary['rejected']:,} rows; see {output}/report.md"
    )
    for line in quarantine_lines(summary):
        print(line)


if __name__ == "__main__":
    run(main)

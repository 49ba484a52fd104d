"""Consistency filtering: keeps a pair if a teacher model ranks its document among the k nearest to its query.

    nomic-jax filter --input='shards/*.jsonl.gz' --output=filtered --model=thenlper/gte-base

The output folder gets kept.jsonl, scores.jsonl (rank and score of every row), summary.json and report.md. Running the
same command with another --k or --min_score selects again and reuses the embeddings.

With --vectors, the folder vectors/ gets the teacher's vectors of all pairs, and a mixture distillation.yaml, for
`nomic-jax train --config=distillation`.
"""

from typing import Any

from absl import flags

from nomic_jax.curate.engine.report import quarantine_lines
from nomic_jax.curate.filter.consistency import FilterOptions, filter_pairs
from nomic_jax.curate.mixtures import filter_mixture, is_mixture
from nomic_jax.data.formats.paths import expand_files

from . import teacher
from .errors import run

flags.adopt_module_key_flags(teacher)  # so that --help lists them
_K = flags.DEFINE_integer("k", 2, "Keep a pair if its document is among the k nearest to its query.")
_MIN_SCORE = flags.DEFINE_float(
    "min_score", None, "Also require a similarity of at least this: the teacher's, cosine or dot. [no minimum]"
)
_BLOCK_SIZE = flags.DEFINE_integer(
    "block_size",
    1_000_000,
    "Largest number of rows ranked against each other; a million of width 768 take about 6 GB of disk.",
)
_VECTORS = flags.DEFINE_bool(
    "vectors", False, "Also write the teacher's vectors of all pairs, kept or not, for embedding distillation."
)


def main(argv: list[str]) -> None:
    del argv
    options = FilterOptions(
        _K.value, _MIN_SCORE.value, _BLOCK_SIZE.value, teacher.APPROXIMATE_ABOVE.value, _VECTORS.value
    )
    common: dict[str, Any] = {"on_bad_row": teacher.ON_BAD_ROW.value, "engine": teacher.engine()}
    if is_mixture(teacher.INPUT.value):
        summary = filter_mixture(teacher.INPUT.value, teacher.OUTPUT.value, teacher.load_teacher(), options, **common)
    else:
        expand_files(teacher.INPUT.value)  # report a mistyped path before loading the model
        summary = filter_pairs(
            teacher.INPUT.value,
            teacher.OUTPUT.value,
            teacher.load_teacher(),
            options,
            query_column=teacher.QUERY_COLUMN.value,
            document_column=teacher.DOCUMENT_COLUMN.value,
            **common,
        )
    print(
        f"kept {summary['kept']:,} of {summary['rows']:,} pairs ({summary['share_kept']:.1%}), "
        f"rejected {summary['rejected']:,} rows; see {teacher.OUTPUT.value}/report.md"
    )
    for line in quarantine_lines(summary):
        print(line)
    if not summary["kept"]:
        raise ValueError(
            "no pair is left, so there is nothing to train on: see the report, raise --k or lower --min_score"
        )


if __name__ == "__main__":
    run(main, shares_gpu_memory=True)  # with faiss, whose GPU build searches there

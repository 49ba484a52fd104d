"""Consistency filtering: keeps the pairs whose document a teacher finds by its query.

    python -m launch.filter --input='shards/*.jsonl.gz' --output=filtered --model=thenlper/gte-base

writes kept.jsonl, scores.jsonl (rank and score of every row), summary.json and report.md. The same command with another
--k selects again without embedding.
"""

from absl import flags

from launch import teacher
from launch.errors import run
from nomic_jax.curate.consistency import filter_pairs
from nomic_jax.data.sources import expand_files

flags.adopt_module_key_flags(teacher)  # --help shows them too
_K = flags.DEFINE_integer("k", 2, "Keep a pair if its document is among the k nearest to its query.", lower_bound=1)
_BLOCK_SIZE = flags.DEFINE_integer(
    "block_size", 1_000_000, "Rows whose documents compete. Memory is about 8 KB a row for width 768.", lower_bound=1
)


def main(argv: list[str]) -> None:
    del argv
    expand_files(teacher.INPUT.value)  # a mistyped path is reported before the model is loaded
    summary = filter_pairs(
        teacher.INPUT.value,
        teacher.OUTPUT.value,
        teacher.load_teacher(),
        k=_K.value,
        block_size=_BLOCK_SIZE.value,
        query_column=teacher.QUERY_COLUMN.value,
        document_column=teacher.DOCUMENT_COLUMN.value,
        on_bad_row=teacher.ON_BAD_ROW.value,
    )
    print(
        f"kept {summary['kept']:,} of {summary['rows']:,} pairs ({summary['share_kept']:.1%}), "
        f"rejected {summary['rejected']:,} rows; see {teacher.OUTPUT.value}/report.md"
    )


if __name__ == "__main__":
    run(main)

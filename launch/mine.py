"""Mines hard negatives: documents that a teacher model ranks near a query but that are not its positives.

    nomic-jax mine --input=pairs.jsonl --output=mined --model=thenlper/gte-base
    nomic-jax mine --input=labelled.jsonl --output=random --random

The output folder gets triplets.jsonl (the rows with `negatives` added), summary.json and report.md. A query has
several positives if several rows hold it, or if --document_column holds a list. Embeddings are kept in --output: mining
the same pairs again with other options reuses them.
"""

from typing import Any

from absl import flags

from nomic_jax.curate.engine.report import quarantine_lines
from nomic_jax.curate.mine.negatives import mine_negatives
from nomic_jax.curate.mine.selection import MiningOptions
from nomic_jax.curate.mixtures import is_mixture, mine_mixture
from nomic_jax.data.formats.paths import expand_files

from . import engine, teacher
from .errors import run

flags.adopt_module_key_flags(teacher)  # so that --help lists them
_K = flags.DEFINE_integer("k", 20, "Candidates for each query: its k nearest documents besides its positives.")
_CORPUS = flags.DEFINE_string("corpus", None, "Files with more documents to mine from, given as for --input.")
_CORPUS_COLUMN = flags.DEFINE_string("corpus_column", None, "Column of --corpus with the text. [--document_column]")
_MARGIN = flags.DEFINE_float(
    "margin",
    0.95,
    "Keep candidates that score below this share of the positive's score, with several positives of the lowest one; "
    "0 keeps all.",
)
_RANGE_MIN = flags.DEFINE_integer("range_min", 0, "First rank to keep; ranks count from 0 and skip positives.")
_RANGE_MAX = flags.DEFINE_integer("range_max", None, "First rank not to keep. [--k]")
_NUM_NEGATIVES = flags.DEFINE_integer(
    "num_negatives",
    None,
    "Negatives that training needs for each row. [7, or fewer if --k and the range of ranks leave fewer]",
)
_TOO_FEW = flags.DEFINE_enum(
    "too_few",
    "drop",
    ["drop", "random", "error"],
    "For a row with fewer negatives. drop: leave it out. random: fill up with random documents. error: stop.",
)
_RANDOM = flags.DEFINE_bool(
    "random", False, "Take --k random documents as negatives instead of mining; needs no --model."
)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of random negatives.")


def main(argv: list[str]) -> None:
    del argv
    given = [
        flag.name
        for flag in (_MARGIN, _RANGE_MIN, _RANGE_MAX, teacher.MODEL, teacher.APPROXIMATE_ABOVE)
        if flag.present
    ]
    if _RANDOM.value and given:
        raise ValueError(f"--random has neither a teacher nor ranks nor scores: leave --{given[0]} out")
    ranks = (_K.value if _RANGE_MAX.value is None else min(_K.value, _RANGE_MAX.value)) - _RANGE_MIN.value
    options = MiningOptions(
        k=_K.value,
        margin=_MARGIN.value,
        range_min=_RANGE_MIN.value,
        range_max=_RANGE_MAX.value,
        num_negatives=max(1, min(7, ranks)) if _NUM_NEGATIVES.value is None else _NUM_NEGATIVES.value,
        too_few=_TOO_FEW.value,
        seed=_SEED.value,
        approximate_above=teacher.APPROXIMATE_ABOVE.value,
    )
    if _RANDOM.value and engine.SHARD.present:
        raise ValueError("--random embeds and searches nothing that shards could share: leave --shard out")
    files, output = teacher.INPUT.value, teacher.OUTPUT.value
    common: dict[str, Any] = {"on_bad_row": teacher.ON_BAD_ROW.value}
    if not _RANDOM.value:
        common["engine"] = teacher.engine()
    if is_mixture(files):
        if _CORPUS.value:
            raise ValueError("--corpus cannot be used with a mixture; mine each source of the mixture by itself")
        encoder = None if _RANDOM.value else teacher.load_teacher()
        summary = mine_mixture(files, output, encoder, options, **common)
    else:
        expand_files(files)  # report a mistyped path before loading the model
        summary = mine_negatives(
            files,
            output,
            None if _RANDOM.value else teacher.load_teacher(),
            options,
            query_column=teacher.QUERY_COLUMN.value,
            document_column=teacher.DOCUMENT_COLUMN.value,
            corpus=_CORPUS.value,
            corpus_column=_CORPUS_COLUMN.value or teacher.DOCUMENT_COLUMN.value,
            **common,
        )
    by_margin, others = (summary[f"dropped_{why}"] for why in ("by_margin", "for_want_of_documents"))
    print(
        f"wrote {summary['written']:,} of {summary['pairs']:,} pairs, dropped {summary['dropped_too_few']:,} with "
        f"too few negatives ({by_margin:,} by --margin, {others:,} for "
        f"want of other documents), rejected {summary['rejected']:,}; see {teacher.OUTPUT.value}/report.md"
    )
    for line in quarantine_lines(summary):
        print(line)
    if not summary["written"]:
        raise ValueError(
            "no pair is left, so there is nothing to train on: see the report, lower --num_negatives, raise --k or "
            "--margin, add a --corpus, or set --too_few=random"
        )


if __name__ == "__main__":
    run(main, shares_gpu_memory=True)  # with faiss, whose GPU build searches there

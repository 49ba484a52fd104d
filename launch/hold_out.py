"""Splits each source of pairs into a held-out retrieval task, pairs for finetuning and pairs for pretraining.

    nomic-jax hold-out --input=pairs.yaml --output=data [--queries=1000] [--documents=2000] [--most_pairs=50000]

    data/held_out/<source>/           a retrieval task; the other files contain none of its texts
    data/pairs.yaml, pairs/           pairs for contrastive pretraining
    data/labelled.yaml, labelled/     pairs for finetuning, in which launch.mine finds hard negatives
    data/summary.json                 counts and settings; written last: if it exists, the other files are complete

Rows with the same document, or the same --group, stay on one side of the split. The result depends only on the rows and
the settings. To remove the texts of the tasks from the masked-LM texts, run
`launch.clean --evaluation=data/held_out --remove_contaminated=any`.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from tqdm import tqdm

from nomic_jax.curate.engine.settings import fingerprints
from nomic_jax.curate.hold_out import HeldOut, Split
from nomic_jax.curate.mixtures import replace_files
from nomic_jax.data.formats.file_format import sha256_of_file
from nomic_jax.data.formats.paths import expand_files
from nomic_jax.data.formats.reading import read_rows
from nomic_jax.data.formats.writing import write_rows
from nomic_jax.data.mixture import Source, read_pairs
from nomic_jax.data.prompts import prompt_name
from nomic_jax.files.folders import check_only
from nomic_jax.files.writing import atomic_file, write_json

from .errors import run

FLAGS = flags.FLAGS
UNLIKELY = 1e-6  # that chance alone leaves no pair for finetuning
OUTPUTS = {"held_out", "pairs", "labelled", "pairs.yaml", "labelled.yaml", "summary.json"}


def hold_out(
    mixture: str,
    output: Path,
    *,
    queries: int,
    documents: int,
    labelled_share: float,
    most_pairs: int | None,
    group: str | None,
    seed: int,
) -> dict[str, Any]:
    """Writes the files listed above and returns the summary. Existing files of the same input and settings are kept.

    Raises:
      BadRow, MixtureError: the input has an unusable row, or the mixture is invalid.
      ValueError: ``output`` holds a result of another input or of other settings, or a source has too few pairs, or
        those of another hold-out with this seed.
    """
    settings: dict[str, Any] = {
        "queries": queries,
        "documents": documents,
        "labelled_share": labelled_share,
        "most_pairs": most_pairs,
        "group": group,
        "seed": seed,
    }
    sources = read_pairs(mixture)
    # The rest of the mixture, such as weights and prefixes, is in its text.
    settings["mixture"] = sha256_of_file(mixture)
    for source in sources:
        settings |= fingerprints(f"file of {source.name}", expand_files(source.files))
    check_only(output, OUTPUTS.__contains__, "launch.hold_out")
    summary_file = output / "summary.json"
    if summary_file.exists():
        found = json.loads(summary_file.read_text(encoding="utf-8"))
        before = found.get("settings") or {}
        if names := [name for name in before | settings if before.get(name) != settings.get(name)]:
            changes = "; ".join(f"{name} was {before.get(name)!r}, is {settings.get(name)!r}" for name in names[:3])
            raise ValueError(f"{output} was made with other settings or another input: {changes}; use another folder")
        return found
    plans = []
    for source in sources:
        query, document = source.columns[:2]
        split = Split((query, document), group or document, seed, labelled_share)
        plans.append(_plan(source, split, queries, documents, most_pairs))
    # Everything that may be refused has been read, so that a refused input leaves no files.
    counts = {plan.source.name: _write(plan, output, queries) for plan in plans}
    for part in ("pairs", "labelled"):
        with atomic_file(output / f"{part}.yaml") as file:
            file.write_text(replace_files(mixture, f"{part}/{{name}}.jsonl"), encoding="utf-8")
    summary = {"settings": settings, "pairs": counts}
    write_json(summary_file, summary)
    return summary


class _Plan(NamedTuple):
    """How the rows of a source are divided. ``share`` is the share of the training pairs to write."""

    source: Source
    split: Split
    held: HeldOut
    rows_found: int
    share: float

    def rows_of(self, part: str) -> Iterator[dict[str, Any]]:
        """Yields the rows of "pairs" or "labelled"."""
        for row in _rows(self.source, self.split):
            if (
                self.split.is_labelled(row) == (part == "labelled")
                and self.split.is_sampled(row, "sample", self.share)
                and self.split.is_for_training(row, self.held)
            ):
                yield row


def _rows(source: Source, split: Split) -> Iterator[dict[str, Any]]:
    columns = dict.fromkeys({*split.columns, split.group}, str)
    yield from tqdm(read_rows(source.files, columns), desc=source.name, unit=" rows")


def _plan(source: Source, split: Split, queries: int, documents: int, most_pairs: int | None) -> _Plan:
    """Reads a source to its end, and checks that pairs for training are left."""
    found = labelled = 0

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal found, labelled
        found = labelled = 0
        for row in _rows(source, split):
            found += 1
            labelled += split.is_labelled(row)
            yield row

    held = split.hold_out(rows, queries, documents)
    plan = _Plan(source, split, held, found, min(1.0, most_pairs / found) if most_pairs else 1.0)
    if next(plan.rows_of("pairs"), None) is None:
        raise ValueError(
            f"{source.name}: its {found:,} pairs do not exceed what is held out ({queries:,} queries, {documents:,} "
            "documents), so none is left for training; lower --queries and --documents"
        )
    if not labelled and (1 - split.labelled_share) ** len(held.groups) < UNLIKELY:
        raise ValueError(
            f"{source.name}: none of its {found:,} pairs falls to finetuning. They must be the pairs of another "
            f"hold-out with --seed={split.seed}, which has taken these away; give another --seed"
        )
    return plan


def _write(plan: _Plan, output: Path, queries: int) -> dict[str, int]:
    source = plan.source
    task = plan.split.write_task(
        output / "held_out" / source.name,
        plan.held,
        queries,
        prompt_name(source.query_prefix, "query"),
        prompt_name(source.document_prefix, "document"),
    )
    parts = ("pairs", "labelled")
    written = {part: write_rows(output / part / f"{source.name}.jsonl", plan.rows_of(part)) for part in parts}
    return {
        "rows_found": plan.rows_found,
        **written,
        "held_out_queries": task[0],
        "held_out_documents": task[1],
    }


def main(argv: list[str]) -> None:
    del argv
    if not FLAGS.input.endswith((".yaml", ".yml")):
        raise ValueError(f"--input={FLAGS.input}: name a mixture .yaml of pairs (docs/data.md shows one)")
    summary = hold_out(
        FLAGS.input,
        Path(FLAGS.output),
        queries=FLAGS.queries,
        documents=FLAGS.documents,
        labelled_share=FLAGS.labelled_share,
        most_pairs=FLAGS.most_pairs,
        group=FLAGS.group,
        seed=FLAGS.seed,
    )
    for name, counts in summary["pairs"].items():
        print(f"{name:10} " + " · ".join(f"{value:,} {key.replace('_', ' ')}" for key, value in counts.items()))


if __name__ == "__main__":
    flags.DEFINE_string("input", None, "A mixture .yaml of pairs.", required=True)
    flags.DEFINE_string("output", None, "Folder for the result.", required=True)
    flags.DEFINE_integer("queries", 1000, "Queries in each held-out task.", lower_bound=1)
    flags.DEFINE_integer("documents", 1000, "Least number of documents in each held-out task.", lower_bound=1)
    flags.DEFINE_float("labelled_share", 0.15, "Share of the remaining pairs for finetuning.", 0.0, 1.0)
    flags.DEFINE_integer(
        "most_pairs", None, "Approximate number of training pairs from each source. [all]", lower_bound=1
    )
    flags.DEFINE_string("group", None, "Rows with the same value in this column stay together. [the document column]")
    flags.DEFINE_integer("seed", 0, "Seed of the split.")
    run(main)

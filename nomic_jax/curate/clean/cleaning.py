"""What every corpus needs before anything else: no empty, short or repeated rows, none that give an evaluation away."""

import dataclasses
import itertools
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nomic_jax.curate.clean.contamination import NGRAM, Contamination, EvaluationTexts
from nomic_jax.curate.clean.duplicates import NearDuplicates
from nomic_jax.curate.clean.words import words_of
from nomic_jax.curate.engine.locks import exclusive_lock
from nomic_jax.curate.engine.report import Sample, quarantine, table
from nomic_jax.curate.engine.row_blocks import no_usable_row
from nomic_jax.curate.engine.text_store import text_key
from nomic_jax.data.formats.paths import expand_files
from nomic_jax.data.formats.reading import read_rows
from nomic_jax.data.formats.row_checks import RejectedRows
from nomic_jax.data.formats.writing import atomic_file, json_line, write_json, write_rows

ROWS_AT_ONCE = 1024
REASONS = ("empty", "short", "exact duplicate", "near duplicate", "contaminated")


@dataclasses.dataclass(frozen=True)
class CleaningOptions:
    """Which rows go. The steps take a row in the order of REASONS, and the first that finds something removes it.

    Attributes:
      min_words, min_chars: a row goes if one of its texts has fewer; an empty text always makes it go.
      exact: a row goes if all its texts equal those of an earlier row, surrounding whitespace aside.
      near: a row goes if its texts, together, are at least so similar to those of an earlier row that stays (see
        ``NearDuplicates``); None for no such step.
      ngram: words in a run shared with an evaluation text that make an overlap (see ``Contamination``).
      remove_contaminated: rows that overlap with "queries" of a task, with "any" text of it, or "none": they are
        counted in any case.
    """

    min_words: int = 0
    min_chars: int = 0
    exact: bool = True
    near: float | None = None
    ngram: int = NGRAM
    remove_contaminated: str = "none"

    def __post_init__(self):
        if self.remove_contaminated not in ("none", "queries", "any"):
            raise ValueError(f'remove_contaminated is {self.remove_contaminated!r}; write "none", "queries" or "any"')


def clean_rows(
    files: str,
    output: str | os.PathLike,
    columns: Sequence[str],
    options: CleaningOptions,
    evaluation: Mapping[str, EvaluationTexts] | None = None,
    *,
    on_bad_row: str = "raise",
    progress: bool = True,
) -> dict[str, Any]:
    """Writes the rows that stay, and of every other why it went. One pass over the rows; of equal ones the first stays.

    Memory: about 150 bytes a row for exact duplicates, 2 KB for near ones, and 100 bytes for each word of the
    evaluation texts. A run that was killed begins again. ``output`` receives

        kept.jsonl      the rows that stay, as they were, in input order
        removed.jsonl   {row, reason, of, removed}: the number of the row (from 0, without rejected ones), which step
                        took it, the row or the tasks it repeats, and the row itself
        rejected.jsonl  rows that could not be used and files that were set aside, under on_bad_row="skip"
        summary.json    the dictionary that is returned
        report.md       the same to read, with a sample of removed rows

    Args:
      columns: those that hold the texts. An empty one is a reason to go, a missing one makes a bad row.
      evaluation: texts of each task that the rows should not overlap with.

    Raises:
      BadRow: a row that cannot be used, under on_bad_row="raise".
      ValueError: there is no usable row.
    """
    output = Path(output)
    with exclusive_lock(output / ".lock"):
        (output / "summary.json").unlink(missing_ok=True)
        rejected = RejectedRows(output / "rejected.jsonl")
        contamination = Contamination(evaluation or {}, options.ngram)
        counts: Counter[str] = Counter()
        samples = {reason: Sample(5) for reason in REASONS}

        def kept(removed_file) -> Iterator[dict[str, Any]]:
            rows = _read(files, columns, on_bad_row, rejected, progress)
            for number, row, reason, of in _judge(rows, output, columns, options, contamination):
                counts["rows"] += 1
                if not reason:
                    yield row
                    continue
                counts[reason] += 1
                samples[reason].add((number, str(of), *(row[column] for column in columns)))
                line = {"row": number, "reason": reason, "of": of, "removed": row}
                removed_file.write(json_line(line))

        with atomic_file(output / "removed.jsonl") as part, part.open("wb") as removed_file:
            stayed = write_rows(output / "kept.jsonl", kept(removed_file))
        if not counts["rows"]:
            raise no_usable_row(files, rejected)
        summary = {
            "rows": counts["rows"],
            "kept": stayed,
            "removed": {reason: counts[reason] for reason in REASONS},
            "rejected": rejected.count,
            "quarantined": [one._asdict() for one in rejected.quarantined],
            "options": dataclasses.asdict(options),
            "contamination": contamination.report(),
        }
        with atomic_file(output / "report.md") as part:
            part.write_text(_report(files, columns, summary, samples), encoding="utf-8")
        write_json(output / "summary.json", summary)
    return summary


def _read(
    files: str, columns: Sequence[str], on_bad_row: str, rejected: RejectedRows, progress: bool
) -> Iterator[dict[str, Any]]:
    with tqdm(desc="cleaning", unit=" rows", disable=not progress) as bar:
        for file in expand_files(files):
            checked = dict.fromkeys(columns, str)
            for row in read_rows(file, checked, allow_empty=True, on_bad_row=on_bad_row, rejected=rejected):
                yield row
                bar.update()


Judged = tuple[int, dict[str, Any], str, Any]


def _judge(
    rows: Iterator[dict[str, Any]],
    output: Path,
    columns: Sequence[str],
    options: CleaningOptions,
    contamination: Contamination,
) -> Iterator[Judged]:
    """(number, row, reason or "", what it repeats) of every row."""
    judged = _drop_short_and_equal(enumerate(rows), columns, options)
    if options.near is not None:
        judged = _drop_near(judged, columns, options.near, output / ".texts.part")
    for number, row, reason, of in judged:
        if not reason:
            places = contamination.check((row[column] for column in columns), number)
            rule = options.remove_contaminated
            tasks = sorted({task for task, part in places if rule == "any" or (rule, part) == ("queries", "queries")})
            if tasks:
                reason, of = "contaminated", tasks
        yield number, row, reason, of


def _drop_short_and_equal(
    rows: Iterator[tuple[int, dict[str, Any]]], columns: Sequence[str], options: CleaningOptions
) -> Iterator[Judged]:
    first_of: dict[bytes, int] = {}
    for number, row in rows:
        texts = [row[column].strip() for column in columns]
        reason, of = "", None
        if not all(texts):
            reason = "empty"
        elif any(len(text) < options.min_chars or len(words_of(text)) < options.min_words for text in texts):
            reason = "short"
        elif options.exact:
            first = first_of.setdefault(text_key("\0".join(texts)), number)
            if first != number:
                reason, of = "exact duplicate", first
        yield number, row, reason, of


def _drop_near(judged: Iterator[Judged], columns: Sequence[str], threshold: float, file: Path) -> Iterator[Judged]:
    with NearDuplicates(threshold, file) as seen:
        while batch := list(itertools.islice(judged, ROWS_AT_ONCE)):
            asked = [(number, row) for number, row, reason, _ in batch if not reason]
            texts = ["\n".join(row[column] for column in columns) for _, row in asked]
            found = dict(zip((number for number, _ in asked), seen.check(texts, [number for number, _ in asked])))
            for number, row, reason, of in batch:
                other = found.get(number)
                yield (number, row, reason, of) if other is None else (number, row, "near duplicate", other)


def _report(files: str, columns: Sequence[str], summary: dict[str, Any], samples: Mapping[str, Sample]) -> str:
    steps = [(reason, count, count / summary["rows"]) for reason, count in summary["removed"].items()]
    text = (
        f"# Cleaning of {files}\n\nKept {summary['kept']:,} of {summary['rows']:,} rows; rejected "
        f"{summary['rejected']:,}.\n\n{quarantine(summary)}{table(('removed as', 'rows', 'share'), steps)}\n"
    )
    if summary["contamination"]:
        lines = []
        for line in summary["contamination"]:
            example = line["example"] or {"row": "", "words": ""}
            counts = (line["task"], line["part"], line["texts"], line["texts_met"], line["share_met"])
            lines.append((*counts, line["training_rows"], example["row"], example["words"]))
        header = ("task", "part", "texts", "met in training", "share", "training rows", "first row", "words")
        text += (
            f"## Overlap with evaluation\n\nRuns of {summary['options']['ngram']} words in common; shorter texts as a "
            f"whole.\n\n{table(header, lines)}\n"
        )
    for reason, sample in samples.items():
        if sample.items:
            text += f"## Removed as {reason}, a sample\n\n{table(('row', 'of', *columns), sorted(sample.items))}\n"
    return text

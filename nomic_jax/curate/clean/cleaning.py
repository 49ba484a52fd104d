"""Basic cleaning of a corpus: removes empty, short, duplicate and evaluation-contaminated rows."""

import dataclasses
import itertools
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nomic_jax.curate.clean.contamination import NGRAM, Contamination, EvaluationTexts
from nomic_jax.curate.clean.duplicates import WORK_FILES, Near, NearDuplicates
from nomic_jax.curate.engine.report import Sample, quarantine, table
from nomic_jax.curate.engine.row_blocks import no_usable_row
from nomic_jax.curate.engine.text_store import text_key
from nomic_jax.data.formats.paths import input_files
from nomic_jax.data.formats.reading import read_rows
from nomic_jax.data.formats.row_checks import RejectedRows
from nomic_jax.data.formats.writing import json_line, write_rows
from nomic_jax.data.words import words_of
from nomic_jax.files.folders import check_only
from nomic_jax.files.locks import exclusive_lock
from nomic_jax.files.printable import code
from nomic_jax.files.writing import atomic_file, write_json

ROWS_AT_ONCE = 1024
OUTPUTS = {"kept.jsonl", "removed.jsonl", "rejected.jsonl", "summary.json", "report.md", *WORK_FILES}
REASONS = ("empty", "short", "exact duplicate", "near duplicate", "contaminated")


@dataclasses.dataclass(frozen=True)
class CleaningOptions:
    """Which rows are removed. Rows are checked in the order of REASONS; the first reason that applies is recorded.

    Attributes:
      min_words, min_chars: remove a row if one of its texts has fewer. A row with an empty text is always removed.
      exact: remove a row if all its texts equal those of an earlier row, ignoring surrounding whitespace and the
        difference between composed and decomposed characters (NFC, NFD).
      near: remove a row if the similarity of each of its texts to that of an earlier kept row is at least this (see
        ``NearDuplicates``); None disables this step.
      near_columns: the columns whose texts have to be similar; () for all columns with texts.
      ngram: number of words in a run shared with an evaluation text that counts as an overlap (see ``Contamination``).
      remove_contaminated: remove rows that overlap with the "queries" of a task, with "any" text of it, or "none".
        Overlaps are counted in every case.
    """

    min_words: int = 0
    min_chars: int = 0
    exact: bool = True
    near: float | None = None
    near_columns: tuple[str, ...] = ()
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
    rows_at_once: int = ROWS_AT_ONCE,
    progress: bool = True,
) -> dict[str, Any]:
    """Writes the kept rows, and the removed rows with the reasons, in one pass. Of duplicates, the first row is kept.

    Memory: about 150 bytes per row for exact duplicates, 2.5 KB per row for near-duplicates, and 100 bytes per word of
    the evaluation texts. A killed run starts over. ``output`` receives

        kept.jsonl      the kept rows, unchanged, in input order
        removed.jsonl   {row, reason, of, removed}: the number of the row (from 0, without rejected rows), the step that
                        removed it, the row or the tasks that it repeats, and the row itself
        rejected.jsonl  rows that cannot be used and files that were set aside, with on_bad_row="skip"
        summary.json    the returned dictionary
        report.md       the summary as a page, with a sample of removed rows

    Args:
      columns: the columns with the texts. A row with an empty text is removed, a row without the column is a bad row.
      evaluation: the texts of each task to compare the rows with.
      rows_at_once: rows whose near-duplicates are searched in one call; the result does not depend on it.

    Raises:
      BadRow: a row cannot be used, with on_bad_row="raise".
      ValueError: there is no usable row.
    """
    output = Path(output)
    near_columns = options.near_columns or tuple(columns)
    if unknown := [name for name in near_columns if name not in columns]:
        raise ValueError(f"near_columns names {unknown[0]!r}; the columns with texts are {', '.join(columns)}")
    check_only(output, OUTPUTS.__contains__, "launch.clean")
    inputs = input_files(files, output)
    with exclusive_lock(output / ".lock"):
        (output / "summary.json").unlink(missing_ok=True)
        rejected = RejectedRows(output / "rejected.jsonl")
        contamination = Contamination(evaluation or {}, options.ngram)
        counts: Counter[str] = Counter()
        samples = {reason: Sample(5) for reason in REASONS}

        def kept(removed_file) -> Iterator[dict[str, Any]]:
            rows = _read(inputs, columns, on_bad_row, rejected, progress)
            for number, row, reason, of in _judge(rows, output, columns, options, contamination, rows_at_once):
                counts["rows"] += 1
                if not reason:
                    yield row
                    continue
                counts[reason] += 1
                texts = [row[column] for column in columns]
                if isinstance(of, Near):
                    texts, of = texts + of.texts, of.row
                samples[reason].add((number, str(of), *texts))
                line = {"row": number, "reason": reason, "of": of, "removed": row}
                removed_file.write(json_line(line))

        with atomic_file(output / "removed.jsonl") as part, part.open("wb") as removed_file:
            kept_count = write_rows(output / "kept.jsonl", kept(removed_file))
        if not counts["rows"]:
            raise no_usable_row(files, rejected)
        summary = {
            "rows": counts["rows"],
            "kept": kept_count,
            "removed": {reason: counts[reason] for reason in REASONS},
            "rejected": rejected.count,
            "quarantined": [entry._asdict() for entry in rejected.quarantined],
            "options": dataclasses.asdict(options),
            "contamination": contamination.report(),
        }
        with atomic_file(output / "report.md") as part:
            part.write_text(_report(files, columns, summary, samples), encoding="utf-8")
        write_json(output / "summary.json", summary)
    return summary


def _read(
    files: list[str], columns: Sequence[str], on_bad_row: str, rejected: RejectedRows, progress: bool
) -> Iterator[dict[str, Any]]:
    with tqdm(desc="cleaning", unit=" rows", disable=not progress) as bar:
        for file in files:
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
    rows_at_once: int,
) -> Iterator[Judged]:
    """Yields (number, row, reason for its removal or "", the row or tasks that it repeats) for every row."""
    judged = _drop_short_and_equal(enumerate(rows), columns, options)
    if options.near is not None:
        judged = _drop_near(judged, options.near_columns or columns, options.near, output, rows_at_once)
    for number, row, reason, of in judged:
        if not reason:
            overlaps = contamination.check((row[column] for column in columns), number)
            rule = options.remove_contaminated
            tasks = sorted({task for task, part in overlaps if rule == "any" or (rule, part) == ("queries", "queries")})
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


def _drop_near(
    judged: Iterator[Judged], columns: Sequence[str], threshold: float, output: Path, rows_at_once: int
) -> Iterator[Judged]:
    with NearDuplicates(threshold, output) as seen:
        while batch := list(itertools.islice(judged, rows_at_once)):
            candidates = [(number, row) for number, row, reason, _ in batch if not reason]
            texts = [[row[column] for column in columns] for _, row in candidates]
            found = dict(
                zip((number for number, _ in candidates), seen.check(texts, [number for number, _ in candidates]))
            )
            for number, row, reason, of in batch:
                other = found.get(number)
                yield (number, row, reason, of) if other is None else (number, row, "near duplicate", other)


def _report(files: str, columns: Sequence[str], summary: dict[str, Any], samples: Mapping[str, Sample]) -> str:
    steps = [(reason, count, count / summary["rows"]) for reason, count in summary["removed"].items()]
    text = (
        f"# Cleaning of {code(files)}\n\nKept {summary['kept']:,} of {summary['rows']:,} rows; rejected "
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
            f"## Overlap with evaluation\n\nAn overlap is a run of {summary['options']['ngram']} shared words; "
            f"a shorter text must match as a whole.\n\n{table(header, lines)}\n"
        )
    for reason, sample in samples.items():
        if sample.items:
            compared = (summary["options"]["near_columns"] or columns) if reason == "near duplicate" else ()
            names = ["row", "of", *columns, *(f"{column} of the kept row" for column in compared)]
            text += f"## Removed as {reason}, a sample\n\n{table(names, sorted(sample.items))}\n"
    return text

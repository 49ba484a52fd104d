"""Basic cleaning of a corpus: removes empty, short, duplicate and evaluation-contaminated rows."""

import contextlib
import dataclasses
import itertools
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nomic_jax.curate.clean.contamination import NGRAM, Contamination, EvaluationTexts
from nomic_jax.curate.clean.description import (
    Batch,
    Describer,
    DescribingTask,
    NewBatch,
    Repeated,
    StoredBatch,
    blocks_of_file,
)
from nomic_jax.curate.clean.duplicates import WORK_FILES, Near, NearDuplicates
from nomic_jax.curate.engine.report import Sample, quarantine, table
from nomic_jax.curate.engine.row_blocks import no_usable_row
from nomic_jax.data.formats.paths import input_files
from nomic_jax.data.formats.reading import read_rows
from nomic_jax.data.formats.row_checks import Quarantined, RejectedRows
from nomic_jax.data.formats.writing import json_line, write_rows
from nomic_jax.data.tokens.scans import one_scans, scan_files
from nomic_jax.files.folders import check_only, remove_folder
from nomic_jax.files.locks import exclusive_lock
from nomic_jax.files.printable import code
from nomic_jax.files.writing import atomic_file, write_json
from nomic_jax.jobs.tasks import Engine

ROWS_AT_ONCE = 1024
OUTPUTS = {"kept.jsonl", "removed.jsonl", "rejected.jsonl", "summary.json", "report.md", "work", *WORK_FILES}
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
    engine: Engine | None = None,
    is_shard: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Writes the kept rows, and the removed rows with the reasons. Of duplicates, the first row is kept.

    Without an engine, in one pass: a killed run starts over. With one, rows are first described block by block
    (``nomic_jax.curate.clean.description``), and a killed run keeps the finished blocks; then one process compares the
    descriptions and reads the rows again to write them. The bytes of the result are the same.

    Memory: about 150 bytes per row for exact duplicates, 2.5 KB per row for near-duplicates, and 100 bytes per word of
    the evaluation texts. With an engine, that is per row that shares something with another; finding these takes 8
    bytes per row. ``output`` receives

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
      engine: describes the rows. [here, in one pass]
      is_shard: the engine makes a share of the blocks, and others may make theirs meanwhile.

    Raises:
      ShardEnded: a shard has made its share; the last step, a merge, writes the rows.
      BadRow: a row cannot be used, with on_bad_row="raise".
      ValueError: there is no usable row.
    """
    output = Path(output)
    near_columns = options.near_columns or tuple(columns)
    if unknown := [name for name in near_columns if name not in columns]:
        raise ValueError(f"near_columns names {unknown[0]!r}; the columns with texts are {', '.join(columns)}")
    check_only(output, OUTPUTS.__contains__, "launch.clean")
    inputs = input_files(files, output)
    contamination = Contamination(evaluation or {}, options.ngram)
    describer = Describer(columns, options, contamination.runs)
    with contextlib.nullcontext() if is_shard else exclusive_lock(output / ".lock"):
        described = repeated = None
        if engine is not None:
            described = _describe(inputs, output / "work", describer, on_bad_row, engine, is_shard, progress)
            repeated = described[0].repeated()
        (output / "summary.json").unlink(missing_ok=True)
        rejected = RejectedRows(output / "rejected.jsonl")
        counts: Counter[str] = Counter()
        samples = {reason: Sample(5) for reason in REASONS}

        def kept(batches: Iterator[Batch], removed_file) -> Iterator[dict[str, Any]]:
            for number, row, reason, of in _judge(batches, output, columns, options, contamination, repeated):
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

        with (
            atomic_file(output / "removed.jsonl") as part,
            part.open("wb") as removed_file,
            tqdm(desc="cleaning", unit=" rows", disable=not progress) as bar,
        ):
            if described is None or repeated is None:
                batches = _new(inputs, describer, on_bad_row, rejected, rows_at_once, bar)
            else:
                batches = _stored(*described, repeated, inputs, rejected, bar)
            kept_count = write_rows(output / "kept.jsonl", kept(batches, removed_file))
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
        remove_folder(output / "work")
    return summary


def _describe(
    files: list[str], work: Path, describer: Describer, on_bad_row: str, engine: Engine, is_shard: bool, progress: bool
) -> tuple[DescribingTask, list[Quarantined]]:
    """Describes the rows of all blocks, and returns the task and the files that were set aside."""
    columns = dict.fromkeys(describer.columns, str)
    with one_scans(work) if is_shard else contextlib.nullcontext():
        scans = scan_files(files, columns, work, numbers=None, on_bad_row=on_bad_row, distinct=False, progress=progress)
    blocks = [block for file, scan in zip(files, scans) for block in blocks_of_file(file, scan)]
    task = DescribingTask(blocks, describer, work, on_bad_row, progress)
    engine(task, None, True)
    set_aside = [Quarantined(file, scan.broken, scan.rows) for file, scan in zip(files, scans) if scan.broken]
    return task, set_aside


def _new(
    files: list[str], describer: Describer, on_bad_row: str, rejected: RejectedRows, rows_at_once: int, bar: tqdm
) -> Iterator[Batch]:
    checked = dict.fromkeys(describer.columns, str)
    for file in files:
        rows = read_rows(file, checked, allow_empty=True, on_bad_row=on_bad_row, rejected=rejected)
        while batch := list(itertools.islice(rows, rows_at_once)):
            yield NewBatch(batch, describer)
            bar.update(len(batch))


def _stored(
    task: DescribingTask,
    set_aside: list[Quarantined],
    repeated: Repeated,
    files: list[str],
    rejected: RejectedRows,
    bar: tqdm,
) -> Iterator[Batch]:
    by_file = {entry.file: entry for entry in set_aside}
    block = 0
    for file in files:
        if file in by_file:
            rejected.quarantine(by_file[file])
        while block < len(task) and task.blocks[block].file == file:
            yield StoredBatch(rows := list(task.read(block, rejected)), task.file(block), repeated)
            bar.update(len(rows))
            block += 1


Judged = tuple[int, dict[str, Any], str, Any]


def _judge(
    batches: Iterator[Batch],
    output: Path,
    columns: Sequence[str],
    options: CleaningOptions,
    contamination: Contamination,
    repeated: Repeated | None,
) -> Iterator[Judged]:
    """Yields (number, row, reason for its removal or "", the row or tasks that it repeats) for every row."""
    first_of: dict[bytes, int] = {}
    begin = 0  # number of the first row of the batch
    with contextlib.ExitStack() as stack:
        seen = None
        if options.near is not None:
            bands = repeated.bands if repeated else None
            seen = stack.enter_context(NearDuplicates(options.near, output, bands))
        for batch in batches:
            verdicts: list[tuple[str, Any]] = []
            for place in range(len(batch.rows)):
                reason, key = batch.first(place)
                first = first_of.setdefault(key, begin + place) if key else begin + place
                verdicts.append((reason, None) if first == begin + place else ("exact duplicate", first))
            if seen is not None:
                places = [place for place, (reason, _) in enumerate(verdicts) if not reason]
                texts = [[batch.rows[place][name] for name in options.near_columns or columns] for place in places]
                found = seen.check(texts, [begin + place for place in places], batch.compared(places))
                for place, near in zip(places, found):
                    if near is not None:
                        verdicts[place] = ("near duplicate", near)
            for place, row in enumerate(batch.rows):
                reason, of = verdicts[place]
                if not reason:
                    texts_of_row = [row[column] for column in columns]
                    overlaps = contamination.check(texts_of_row, begin + place, batch.shared(place))
                    rule = options.remove_contaminated
                    tasks = sorted(
                        {task for task, part in overlaps if rule == "any" or (rule, part) == ("queries", "queries")}
                    )
                    if tasks:
                        reason, of = "contaminated", tasks
                yield begin + place, row, reason, of
            begin += len(batch.rows)


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

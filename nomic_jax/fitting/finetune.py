"""Finetunes an embedder on a user's own pairs, and says whether that helped: what ``launch.finetune`` runs.

    OUTPUT/                 the finetuned model as a Hugging Face directory, report.md and report.html
    OUTPUT/training/        plan.json, train.jsonl, held_out/ (a retrieval task), run/ (a run of ``nomic_jax.fit``),
                            rankings of the task before and after; it may be deleted

A part of the pairs is held out before training. The model is trained by ``nomic_jax.fit`` on the others.
"""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nomic_jax.curate.hold_out import HeldOut
from nomic_jax.data.formats.file_format import sha256_of_file
from nomic_jax.data.formats.paths import expand_files
from nomic_jax.data.formats.text.zip_members import stored_in
from nomic_jax.data.formats.writing import write_rows
from nomic_jax.data.prompts import prompt_for, prompt_text, read_prefix
from nomic_jax.evals.report.document import Heading, Paragraph, Part, write_document
from nomic_jax.evals.report.record import average, figures
from nomic_jax.evals.suites.side_by_side import METRIC, rank, report_parts, verdict
from nomic_jax.evals.tasks import bm25
from nomic_jax.evals.tasks.comparison import Comparison
from nomic_jax.evals.tasks.retrieval import RetrievalTask
from nomic_jax.extras import MissingPackage
from nomic_jax.files.folders import check_only, is_folder
from nomic_jax.files.reading import read_json
from nomic_jax.files.writing import atomic_file, write_json
from nomic_jax.fitting import amounts
from nomic_jax.fitting.amounts import Amounts
from nomic_jax.fitting.fit import fit
from nomic_jax.fitting.own_pairs import OwnPairs
from nomic_jax.fitting.rows import DataError
from nomic_jax.hf import CardData, write_checkpoint
from nomic_jax.hf.hub import is_hub_name, split_revision
from nomic_jax.inference.embedder import Embedder
from nomic_jax.run.pretrained import identify, read_pretrained

WORK = "training"
OUTPUTS = {"plan.json", "train.jsonl", "held_out", "run", "token_cache", "before.npy", "after.npy", "done"}
OUTPUTS |= {"rejected.jsonl"}
CORPUS = 2000  # documents of the held-out task, those of training pairs included
Say = Callable[[str], None]


class Finetuned(NamedTuple):
    """The result.

    Attributes:
      comparison: the rankings of the held-out task by the base and by the finetuned model.
      baselines: name -> metric -> figure; BM25 where bm25s is installed.
      verdict: whether the model is better, in a sentence.
      advice: what to try if it is not; empty if it is.
    """

    comparison: Comparison
    baselines: Mapping[str, Mapping[str, float]]
    verdict: str
    advice: tuple[str, ...]


NAMES = ("the base", "The finetuned model")


def finetune(
    data: str,
    base: str,
    output: str | Path,
    *,
    columns: Sequence[str] = (),
    held_out: int | None = None,
    minutes: float = amounts.MINUTES,
    most_pairs: int | None = None,
    epochs: float | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    seed: int = 0,
    on_bad_row: str = "raise",
    say: Say = print,
) -> Finetuned:
    """Trains ``base`` on pairs and exports the model to ``output``. The same call resumes, or reads what is done.

    Args:
      data: files of pairs, see ``nomic_jax.data.formats.paths.expand_files``.
      base: a run, a Hugging Face directory or a name on the hub.
      columns: query, document and, if there are any, negatives; () to find them by their names or their order.
      held_out: number of queries to hold out with their documents; None for a tenth of the pairs, at most 300.
      minutes: what training on a CPU of 2 cores may take, roughly. It decides how many pairs are used, and how often.
      most_pairs, epochs, batch_size, lr: these instead of what follows from the number of pairs and ``minutes``.
      seed: of the choice of pairs, and of their order.
      on_bad_row: "raise", or "skip" to leave rows out that cannot be read.
      say: prints a line.

    Raises:
      DataError: the columns are unclear, or there are too few different texts; the message says of what.
      BadRow, OSError: a file cannot be read, or has a bad row; the message names the line.
      ValueError: ``output`` holds the result of other data or settings.
      FileRefused: ``output`` holds something else.
      Others as ``nomic_jax.fit``.
    """
    output = Path(output)
    work = output / WORK
    if is_folder(work):
        check_only(work, OUTPUTS.__contains__, "finetuning")
    else:
        check_only(output, lambda name: False, "finetuning")
    pairs = OwnPairs.find(data, tuple(columns), on_bad_row, work / "rejected.jsonl")
    asked = {
        "columns": list(pairs.columns),
        "held_out": held_out,
        "minutes": minutes,
        "most_pairs": most_pairs,
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": lr,
        "seed": seed,
        "on_bad_row": on_bad_row,
        "base": identify(base)["sha256"],
        "data": [sha256_of_file(stored_in(file)) for file in expand_files(data)],
    }
    plan = _recorded(work, asked)
    if plan is not None and (work / "done").exists():
        say(f"{output} is complete")
        task = RetrievalTask.read(work / "held_out")
        return _result(task, np.load(work / "before.npy"), np.load(work / "after.npy"), plan)
    before = Embedder.from_pretrained(base)
    prefixes = _prefixes(before, base)
    if plan is None:
        plan = {"asked": asked, **_prepare(pairs, before, prefixes, work, asked, say)}
        write_json(work / "plan.json", plan)
    chosen = Amounts(**plan["chosen"])
    task = RetrievalTask.read(work / "held_out")
    say(f"held out: {len(task.queries):,} queries, to be found among {len(task.documents):,} documents")
    before_QK = _once(work / "before.npy", lambda: rank(task, before))
    scores = dict(task.score(before_QK))
    say(f"before: nDCG@10 {scores[METRIC]:.3f}, recall@1 {scores['recall@1']:.3f}")
    steps = round(chosen.epochs * (chosen.pairs // chosen.batch_size))
    say(
        f"training on {chosen.pairs:,} pairs, {chosen.epochs:g} times: {steps:,} steps of {chosen.batch_size}; "
        f"about {max(1, round(chosen.seconds / 60))} min on 2 cores, the bar says what is left here"
    )
    run = fit(
        base,
        work / "train.jsonl",
        workdir=work / "run",
        columns=pairs.columns,
        query_prefix=prefixes[0],
        document_prefix=prefixes[1],
        epochs=chosen.epochs,
        batch_size=chosen.batch_size,
        lr=chosen.lr,
        query_length=chosen.query_length,
        document_length=chosen.document_length,
        cache_dir=str(work / "token_cache"),
        seed=seed,
        checkpoint={"every": max(20, steps // 5), "keep": 1},
    )
    source = read_pretrained(run.workdir)
    # Texts are cut where the base cuts them, not where training did.
    encoder = {"encoder": source.params["encoder"]}
    trained = dataclasses.replace(source, params=encoder, max_length=before.max_length)
    after_QK = _once(work / "after.npy", lambda: rank(task, Embedder.from_checkpoint(trained)))
    found = _result(task, before_QK, after_QK, plan)
    tasks = {"held_out": figures(task, task.score(after_QK), None, None)}
    write_checkpoint(
        output,
        trained,
        evaluations={"held-out pairs": {"suite": "local", "tasks": tasks, "average": average(tasks.values())}},
        card=CardData(base_model=split_revision(base)[0] if is_hub_name(base) else None),
    )
    write_document(output, _parts(found, plan, data, base))
    (work / "done").touch()
    return found


def _prefixes(embedder: Embedder, base: str) -> tuple[str, str]:
    """Returns the base's own prompts for queries and documents, which it is trained with further."""
    query, document = (prompt_for(embedder.prompts, role) for role in ("query", "document"))
    for prompt in (query, document):
        if prompt_text(read_prefix(prompt)) != prompt:
            raise ValueError(
                f"{base}: its prompt {prompt!r} does not end in a space, colon or line break, and training would add a "
                f"colon to it; save the model with another prompt"
            )
    return query, document


def _recorded(work: Path, asked: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the plan of an earlier call. Raises ValueError if it was asked for something else."""
    if not (work / "plan.json").exists():
        return None
    plan = read_json(work / "plan.json")
    before = plan["asked"]
    names = [name for name in {**before, **asked} if before.get(name) != asked.get(name)]
    if names:
        changes = "; ".join(f"{name} was {before.get(name)!r:.80}, is {asked.get(name)!r:.80}" for name in names[:3])
        raise ValueError(
            f"{work.parent}: was made with other data or settings: {changes}. Give another --output, or delete it"
        )
    return plan


def _prepare(
    pairs: OwnPairs,
    embedder: Embedder,
    prefixes: tuple[str, str],
    work: Path,
    asked: Mapping[str, Any],
    say: Say,
) -> dict[str, Any]:
    """Writes held_out/ and train.jsonl, and returns what was found and chosen."""
    summary = pairs.summarize()
    query, document = pairs.columns[:2]
    shown = " -> ".join(map(repr, (query, document)))
    out = [f"{summary.empty:,} with an empty cell"] if summary.empty else []
    out += [f"{summary.rejected:,} that cannot be read (see {pairs.rejected_file})"] if summary.rejected else []
    say(f"{pairs.files}: {summary.rows:,} rows, {shown}{'; left out: ' if out else ''}{' and '.join(out)}")
    amounts.check_enough(pairs.files, pairs.columns, summary.pairs, summary.queries, summary.documents)
    (query_length, query_tokens), (document_length, document_tokens) = (
        amounts.lengths_of(embedder, [row[column] for row in summary.sample], prefix)
        for column, prefix in zip((query, document), prefixes)
    )
    each = amounts.flops_per_pair(embedder, query_tokens, document_tokens)

    wanted = asked["held_out"] or amounts.held_out_queries(summary.pairs)
    split = pairs.split(asked["seed"])
    held = split.hold_out(lambda: pairs.rows("holding out"), wanted, 1)
    most = asked["most_pairs"] or amounts.most_pairs(each, asked["minutes"], asked["epochs"])
    train = pairs.sample(most, asked["seed"], held)
    _check_rest(pairs, held, len(train), wanted)
    if len(train) == most:
        flag = "--most_pairs" if asked["most_pairs"] else f"--minutes={asked['minutes']:g}"
        say(f"taking {most:,} of the pairs to train on, at random: {flag} decides it, more may be better")
    work.mkdir(parents=True, exist_ok=True)
    further = [row[document] for row in train][: max(0, CORPUS - len(held.rows))]
    split.write_task(work / "held_out", held, wanted, "query", "document", further)
    write_rows(work / "train.jsonl", ({name: row[name] for name in pairs.columns if name in row} for row in train))
    chosen = amounts.amounts_for(
        len(train),
        (query_length, document_length),
        each,
        minutes=asked["minutes"],
        epochs=asked["epochs"],
        batch_size=asked["batch_size"],
        lr=asked["lr"],
    )
    return {"found": summary._replace(sample=[])._asdict(), "chosen": chosen._asdict()}


def _check_rest(pairs: OwnPairs, held: HeldOut, rest: int, wanted: int) -> None:
    """Raises DataError if too few pairs share no text with the held-out ones."""
    if rest < amounts.LEAST_PAIRS // 2:
        raise DataError(
            f"{pairs.files}: only {rest} pairs are left to train on beside the {len(held.rows):,} that hold out "
            f"{wanted} queries, because a pair that shares a text with them is left out: the same texts of "
            f"{pairs.columns[0]!r} or {pairs.columns[1]!r} are in many rows. Hold out fewer with --held_out, or give "
            f"other --columns"
        )


def _once(file: Path, compute: Callable[[], np.ndarray]) -> np.ndarray:
    """Returns the array in a file, which is computed and written first if it is missing."""
    if not file.exists():
        found = compute()
        with atomic_file(file) as part, part.open("wb") as f:
            np.save(f, found)
    return np.load(file)


def _result(task: RetrievalTask, before_QK: np.ndarray, after_QK: np.ndarray, plan: Mapping[str, Any]) -> Finetuned:
    comparison = Comparison(task, before_QK, after_QK)
    differences = comparison.differences()
    baselines = {}
    with contextlib.suppress(MissingPackage):  # the extra `report` brings it
        baselines["BM25"] = dict(bm25.run(task))
    advice = () if differences[METRIC].is_better else _advice(plan["chosen"], differences[METRIC].before)
    return Finetuned(comparison, baselines, verdict(differences, NAMES, len(task.queries)), advice)


def _advice(chosen: Mapping[str, Any], before: float) -> tuple[str, ...]:
    tried = [
        f"More pairs: {chosen['pairs']:,} were trained on, and a few thousand change a model most.",
        f"Other settings: --epochs (now {chosen['epochs']:g}) and --lr (now {chosen['lr']:g}), half or twice of each.",
        "Hard negatives: nomic-jax mine finds documents that look right and are not; give its triplets.jsonl as the "
        "data, with --columns=QUERY,DOCUMENT,negatives.",
        "A look at the queries below: pairs that do not belong together teach what is wrong.",
    ]
    if before > 0.9:
        tried.insert(0, f"Nothing: the base finds nearly everything already (nDCG@10 {before:.3f}). Keep it.")
    return tuple(tried)


def _parts(found: Finetuned, plan: Mapping[str, Any], data: str, base: str) -> list[Part]:
    chosen, rows = Amounts(**plan["chosen"]), plan["found"]
    first, *rest = report_parts(found.comparison, ("before", "after"), found.baselines)
    return [
        Heading("Finetuned on own pairs", 1),
        Paragraph(found.verdict),
        *([Paragraph(f"What to try: {' '.join(found.advice)}")] if found.advice else []),
        first,
        *rest,
        Heading("Training"),
        Paragraph(
            f"{os.path.basename(base.rstrip('/')) or base} was trained on {chosen.pairs:,} pairs of {data} "
            f"({rows['rows']:,} rows, {rows['empty']:,} with an empty cell), {chosen.epochs:g} times in batches of "
            f"{chosen.batch_size}, with a learning rate of {chosen.lr:g}, on queries of up to {chosen.query_length} "
            f"and documents of up to {chosen.document_length} tokens. The held-out queries and documents were left "
            f"out, and so was every pair that shares a text with them. The other documents to search are those of "
            f"training pairs."
        ),
    ]

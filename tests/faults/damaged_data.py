"""Gives damaged data to every command that reads data: damaged-data."""

import itertools
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from nomic_jax.data.prompts import prompt_text
from nomic_jax.data.tokens.tokenizer import Tokenizer
from tests.corpus import find_minilm, pairs_of_words, write_teacher
from tests.faults import processes, runs
from tests.faults.damaged_files import KINDS
from tests.faults.results import Results
from tests.faults.shards import SHARDS, Damaged

ROWS = 12  # per shard
# The commands that read the faults. Commands that compute take five times as long, so they read a fifth of the faults.
READERS, COMPUTING = ("clean", "pretokenize", "mine"), ("filter", "train", "embed")
SECONDS = 60  # limit for one command


def damaged_data(counts: dict[str, int], seed: int, folder: Path, results: Results) -> None:
    """Damages one place of one shard and reads it with one command, with on_bad_row=raise and on_bad_row=skip.

    ``counts["places"]`` is the number of faults per kind. If ``counts["computing"]`` is 0, only READERS read them.
    """
    results.expect(len(KINDS) * counts["places"])
    teacher = folder / "teacher"
    if counts["computing"]:
        processes.call(write_teacher, teacher, folder=folder)
    rows = pairs_of_words(SHARDS * ROWS, seed)
    tokens = processes.call(_tokens, rows, folder=folder)
    faults_read = {}
    for number, (kind, damage) in enumerate(sorted(KINDS.items())):
        for place in range(counts["places"]):
            rng = random.Random(f"{seed} {kind} {place}")
            computes = counts["computing"] and place % 5 == 4
            among = [reader for reader in (COMPUTING if computes else READERS) if reader in damage.readers]
            among = among or list(damage.readers)
            reader = among[(number + place) % len(among)]
            here = folder / f"{number}-{place}"
            here.mkdir()
            damaged = damage.make(rng, here, rows, reader)
            what = f"{kind}, read by {reader}: {damaged.what}"
            refusing = _start(reader, damaged, here / "refused", teacher, "raise")
            skipping = _start(reader, damaged, here / "skipped", teacher, "skip") if damage.can_be_skipped else None
            problems = list(_refused(refusing, damaged, results))
            if skipping:
                problems += _skipped(skipping, reader, damaged, here / "skipped", tokens)
            faults_read[reader] = faults_read.get(reader, 0) + 1
            if results.add(not problems, what, "; ".join(problems)[:1500]):
                shutil.rmtree(here)
    results.note(kinds=len(KINDS), **{f"read_by_{reader}": count for reader, count in sorted(faults_read.items())})


def _tokens(rows: list[dict[str, Any]]) -> dict[tuple[int, ...], int]:
    """Maps the token ids of each query to the id of its row."""
    queries = [prompt_text("search_query") + row["query"] for row in rows]
    encoded = Tokenizer.from_directory(find_minilm()).encode(queries)
    return {tuple(ids.tolist()): row["id"] for ids, row in zip(encoded, rows)}


def _start(reader: str, damaged: Damaged, output: Path, teacher: Path, policy: str) -> processes.Process:
    common = [f"--input={damaged.pattern}", f"--output={output}"]
    model, policies = f"--model={teacher}", [f"--on_bad_row={policy}"]
    log = output.with_name(f"{output.name}.txt")
    cache = damaged.cache or output
    match reader:
        case "clean":
            return processes.command("launch.clean", common + policies, log)
        case "mine":
            drawn = ["--random", "--k=2", "--num_negatives=1"]
            return processes.command("launch.mine", common + policies + drawn, log)
        case "filter":
            return processes.command("launch.filter", [*common, *policies, model, "--k=1000"], log)
        case "pretokenize":
            arguments = ["--stage=contrastive", f"--mixture={damaged.pattern}", f"--tokenizer={find_minilm()}"]
            arguments += [f"--cache_dir={cache}", "--workers=1", *policies]
            return processes.command("launch.pretokenize", arguments, log)
        case "embed":
            arguments = [f"--input={damaged.pattern}", f"--output={output}.parquet", "--text_column=document"]
            return processes.command("launch.embed", [*arguments, *policies, model, "--keep_columns=id"], log)
    if reader == "train":
        changes = {"data__mixture": damaged.pattern, "data__on_bad_row": policy, "steps": 1, "data__cache_dir": cache}
        return runs.start("contrastive", output.parent, output.with_name(f"run-{policy}"), output=log, **changes)
    assert reader == "classify"
    arguments = [f"--config={processes.ROOT}/configs/glue.py:debug", f"--workdir={output}"]
    arguments += [f"--config.data.mixture={damaged.pattern}", f"--config.data.tokenizer={find_minilm()}"]
    return processes.command("launch.train", arguments, log)


def _refused(process: processes.Process, damaged: Damaged, results: Results) -> Iterator[str]:
    """Yields problems with the refusal, which is exit code 2 and one line with file, place and reason."""
    try:
        code = process.wait(SECONDS)
    except processes.Hang as hang:
        yield str(hang)
        return
    message = process.last_line().rpartition("\r")[2]
    if code != 2 or not message.startswith("error: ") or "Traceback" in process.text():
        yield f"exit {code} after {process.text()[-600:]!r}"
    yield from (f"{message[:600]!r} lacks {word!r}" for word in damaged.words if word not in message)
    if len(message) > 1500:
        yield f"a line of {len(message)} characters"
    results.maximum(len(message), "characters in a message")


def _skipped(
    process: processes.Process, reader: str, damaged: Damaged, output: Path, tokens: dict[tuple[int, ...], int]
) -> Iterator[str]:
    """Yields problems with on_bad_row=skip: lost rows other than the bad row or file, and missing records of it."""
    try:
        code = process.wait(SECONDS)
    except processes.Hang as hang:
        yield str(hang)
        return
    if code != 0 or "Traceback" in process.text():
        yield f"on_bad_row=skip, exit {code} after {process.text()[-600:]!r}"
        return
    store = next((path.parent for path in output.glob("*/manifest.json")), output)  # the token store
    match reader:
        case "clean" | "filter":
            kept = [json.loads(line)["id"] for line in _lines(output / "kept.jsonl")]
        case "mine":
            kept = [json.loads(line)["id"] for line in _lines(output / "triplets.jsonl")]
        case "embed":
            kept = pq.read_table(f"{output}.parquet", columns=["id"], use_threads=False)["id"].to_pylist()
        case _:
            ids, ends = np.load(store / "query.ids.npy"), np.load(store / "query.offsets.npy")
            kept = [tokens.get(tuple(ids[start:end].tolist()), -1) for start, end in itertools.pairwise(ends)]
    if kept != damaged.good:
        yield f"on_bad_row=skip kept {len(kept)} rows of {len(damaged.good)}"
    side_file = Path(f"{output}.parquet.rejected.jsonl") if reader == "embed" else store / "rejected.jsonl"
    entries = [json.loads(line) for line in _lines(side_file)] if side_file.exists() else []
    if len(entries) != 1 or any(word not in entries[0]["reason"] for word in damaged.words):
        yield f"the side file has {[entry['reason'][:300] for entry in entries]}"
    elif damaged.raw is not None and damaged.raw.decode("utf-8", "replace").strip() != entries[0]["row"].strip():
        yield f"the side file has another row: {entries[0]['row'][:300]!r}"
    if damaged.set_aside and f"set aside: {damaged.set_aside}" not in process.text():
        yield f"the output does not name the file that was set aside: {process.text()[-600:]!r}"


def _lines(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8").splitlines()

"""R9: damaged data, read by every command that reads data."""

import itertools
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from nomic_jax.data.mixture import with_prefix
from nomic_jax.data.tokens.tokenizer import Tokenizer
from tests.corpus import find_minilm, pairs_of_words, write_teacher
from tests.faults import processes, runs
from tests.faults.damage import KINDS
from tests.faults.shards import SHARDS, Damaged
from tests.faults.tally import Tally

ROWS = 12  # of a shard
# The commands that meet a fault. Those that compute take five times as long, so they meet a fifth of them.
READERS, COMPUTING = ("clean", "pretokenize", "mine"), ("filter", "train", "embed")
SECONDS = 60


def damaged_data(counts: dict[str, int], seed: int, folder: Path, tally: Tally) -> None:
    """Of each kind, ``counts["places"]`` faults: in one place of one shard, met by one command, under both policies.

    Without ``counts["computing"]``, only those of READERS meet them.
    """
    tally.ask(len(KINDS) * counts["places"])
    teacher = folder / "teacher"
    if counts["computing"]:
        processes.call(write_teacher, teacher, folder=folder)
    rows = pairs_of_words(SHARDS * ROWS, seed)
    tokens = processes.call(_tokens, rows, folder=folder)
    readers = {}
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
            what = f"{kind}, met by {reader}: {damaged.what}"
            refusing = _start(reader, damaged, here / "refused", teacher, "raise")
            skipping = _start(reader, damaged, here / "skipped", teacher, "skip") if damage.can_be_skipped else None
            problems = list(_refused(refusing, damaged, tally))
            if skipping:
                problems += _skipped(skipping, reader, damaged, here / "skipped", tokens)
            readers[reader] = readers.get(reader, 0) + 1
            if tally.held(not problems, what, "; ".join(problems)[:1500]):
                shutil.rmtree(here)
    tally.note(kinds=len(KINDS), **{f"met_by_{reader}": count for reader, count in sorted(readers.items())})


def _tokens(rows: list[dict[str, Any]]) -> dict[tuple[int, ...], int]:
    """The tokens of a query -> the row's id."""
    queries = [with_prefix("search_query", row["query"]) for row in rows]
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


def _refused(process: processes.Process, damaged: Damaged, tally: Tally) -> Iterator[str]:
    """What is wrong with the answer to the fault: exit code 2 after one line with file, place and reason."""
    try:
        code = process.wait(SECONDS)
    except processes.Hang as hang:
        yield str(hang)
        return
    said = process.last_line().rpartition("\r")[2]
    if code != 2 or not said.startswith("error: ") or "Traceback" in process.text():
        yield f"exit {code} after {process.text()[-600:]!r}"
    yield from (f"{said[:600]!r} lacks {word!r}" for word in damaged.words if word not in said)
    if len(said) > 1500:
        yield f"a line of {len(said)} characters"
    tally.worst(len(said), "characters of a message")


def _skipped(
    process: processes.Process, reader: str, damaged: Damaged, output: Path, tokens: dict[tuple[int, ...], int]
) -> Iterator[str]:
    """What is lost but the bad row, or the bad file, or not recorded."""
    try:
        code = process.wait(SECONDS)
    except processes.Hang as hang:
        yield str(hang)
        return
    if code != 0 or "Traceback" in process.text():
        yield f"skipping, exit {code} after {process.text()[-600:]!r}"
        return
    store = next((path.parent for path in output.glob("*/manifest.json")), output)  # of tokens
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
        yield f"skipping, {len(kept)} rows are kept of {len(damaged.good)}"
    side_file = Path(f"{output}.parquet.rejected.jsonl") if reader == "embed" else store / "rejected.jsonl"
    entries = [json.loads(line) for line in _lines(side_file)] if side_file.exists() else []
    if len(entries) != 1 or any(word not in entries[0]["reason"] for word in damaged.words):
        yield f"the side file has {[entry['reason'][:300] for entry in entries]}"
    elif damaged.raw is not None and damaged.raw.decode("utf-8", "replace").strip() != entries[0]["row"].strip():
        yield f"the side file has another row: {entries[0]['row'][:300]!r}"
    if damaged.set_aside and f"set aside: {damaged.set_aside}" not in process.text():
        yield f"the file set aside is not told of: {process.text()[-600:]!r}"


def _lines(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8").splitlines()

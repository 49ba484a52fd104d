"""Repeats runs and compares rows and bits: data-order, determinism, and reproduce-and-lineage."""

import functools
import hashlib
import itertools
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np

from nomic_jax.data.batches.loader import read_ahead
from nomic_jax.data.batches.stream import Stream
from nomic_jax.train.config import PairData
from nomic_jax.train.watch.metrics import read_metrics
from tests.faults import processes, runs
from tests.faults.results import Results

SAMPLINGS = ("rows", "shards", "temperature", "weights")


def data_order(counts: dict[str, int], seed: int, folder: Path, results: Results) -> None:
    """Reads the streams of a mixture in spans of random length, each with other devices, processes and threads."""
    runs.prepare(folder)
    text = (folder / "corpus" / "pairs.yaml").read_text(encoding="utf-8")
    weights = iter((3, 1))
    text = re.sub(r"\{name", lambda _: f"{{weight: {next(weights)}, name", text)
    (folder / "corpus" / "weighted.yaml").write_text(text, encoding="utf-8")
    rng = random.Random(seed)
    samplings = SAMPLINGS[: counts["samplings"]]
    results.expect(len(samplings) * (counts["resumes"] + 1))
    steps = counts["steps"] // len(samplings)
    for sampling in samplings:
        settings = {
            "data.sampling": sampling,
            "data.sampling_temperature": 2.0,
            "data.mixture": str(folder / "corpus" / ("weighted.yaml" if sampling == "weights" else "pairs.yaml")),
            "data.remainder": rng.choice(("drop", "carry")),
        }
        wanted = processes.call(_read_step_by_step, settings, folder, steps, folder=folder)
        cuts = [0, *sorted(rng.sample(range(1, steps), counts["resumes"])), steps]
        found = []
        for number, (start, stop) in enumerate(itertools.pairwise(cuts)):
            # Every number of processes, devices and threads occurs.
            shards = (1, 2, 4)[number // 4 % 3] if number else 1
            devices = max(shards, (1, 2, 4, 8)[number % 4])
            threads = rng.choice((0, 1, 2, 4)) if number >= 4 else (0, 1, 2, 4)[number]
            layout = rng.choice(("padded", "packed", "bucketed"))
            shape = settings | {"data.layout": layout}
            parts = [folder / f"rows-{shard}" for shard in range(shards)]
            readers = [
                processes.fork(
                    functools.partial(_read, shape, folder, devices, (start, stop), (shard, shards), threads, part),
                    folder / "readers.txt",
                )
                for shard, part in enumerate(parts)
            ]
            codes = [reader.wait() for reader in readers]
            what = (
                f"{sampling}: steps {start}-{stop}, {devices} devices, {shards} processes, {threads} threads, {layout}"
            )
            same = False
            if not any(codes):
                rows = np.concatenate([np.load(f"{part}.npy") for part in parts], axis=1)
                expected = wanted[start:stop]
                same = np.array_equal(np.sort(rows, axis=1), np.sort(expected, axis=1))
                # Other layouts distribute the rows of a batch over devices by length; "padded" keeps their order, too.
                same = same and (layout != "padded" or np.array_equal(rows, expected))
                found.append(np.sort(rows, axis=1))
            results.add(same, what, f"exit codes {codes}" if any(codes) else "the rows differ")
        in_order = (np.sort(wanted, axis=1), np.concatenate(found))
        hashes = [hashlib.sha256(np.ascontiguousarray(x)).hexdigest() for x in in_order]
        results.note(**{f"sha256_{sampling}": hashes[0], f"steps_{sampling}": steps})
        if hashes[0] != hashes[1]:
            results.fail(f"{sampling}: hash {hashes[0]} in one pass, {hashes[1]} in {len(found)} spans")


def _stream(settings: dict[str, object], folder: Path, devices: int) -> Stream:
    from nomic_jax.data.tokens.tokenizer import Tokenizer
    from nomic_jax.train.objectives import make_stream
    from tests.corpus import find_minilm

    config = runs.configuration("contrastive", folder, **settings)
    assert isinstance(config.data, PairData)
    return make_stream(config, Tokenizer.from_directory(find_minilm()), devices)


def _read_step_by_step(settings: dict[str, object], folder: Path, steps: int) -> np.ndarray:
    """Reads one step after the other, without threads. Returns uint64 [steps, batch], see ``_hash_rows``."""
    stream = _stream(settings, folder, 1)
    return np.stack([_hash_rows(stream.batch(step, 0, 1).arrays) for step in range(steps)])


def _hash_rows(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """Hashes query and document of each row to uint64 [batch]; no two rows of this corpus share both texts."""
    query = np.ascontiguousarray(arrays["query_hash"]).view("<u8")[:, 0]
    document = np.ascontiguousarray(arrays["document_hash"][:, 0]).view("<u8")[:, 0]
    return query * np.uint64(0x9E3779B97F4A7C15) + document


def _read(
    settings: dict[str, object],
    folder: Path,
    devices: int,
    steps: tuple[int, int],
    shard: tuple[int, int],
    threads: int,
    part: Path,
) -> None:
    batches = read_ahead(_stream(settings, folder, devices), *steps, *shard, threads=threads)
    np.save(part, np.stack([_hash_rows(batch.arrays) for batch in batches]))


def determinism(counts: dict[str, int], seed: int, folder: Path, results: Results) -> None:
    """Repeats a run in new Python processes, then on other numbers of devices."""
    runs.prepare(folder)
    stages = runs.STAGES[: counts["stages"]]
    device_counts = (1, 2, 4, 8)[: counts["device_counts"]]
    results.expect(len(stages) * (counts["processes"] + len(device_counts) - 1))
    for stage in stages:
        settings = dict(steps=counts["steps"], checkpoint__every=10**6, seed=seed % 1000)
        hashes = []
        for number in range(counts["processes"]):
            workdir = folder / f"{stage}-{number}"
            command = [sys.executable, "-m", "launch.train", *runs.arguments(stage, folder, workdir, **settings)]
            environment = processes.environment(JAX_NUM_CPU_DEVICES="8")
            done = subprocess.run(command, cwd=processes.ROOT, env=environment, capture_output=True, text=True)
            hashes.append(runs.state_hash(workdir, folder) if done.returncode == 0 else done.stderr[-300:])
            results.add(hashes[-1] == hashes[0] and len(hashes[0]) == 64, f"{stage}: process {number}", hashes[-1])
        settings["steps"] = counts["steps_across"]
        for devices in device_counts:
            runs.finish(stage, folder, folder / f"{stage}-on-{devices}", devices, **settings)
        workdirs = [folder / f"{stage}-on-{devices}" for devices in device_counts]
        for devices, difference in zip(
            device_counts[1:], processes.call(_relative_differences, workdirs, folder=folder)
        ):
            results.maximum(difference, "relative difference between device counts", limit=1e-5)
            results.add(
                difference <= 1e-5, f"{stage}: {devices} devices and one", f"relative difference {difference:.2e}"
            )


def _relative_differences(workdirs: list[Path]) -> list[float]:
    """For each run after the first: the norm of the difference of all parameters, divided by the first run's norm."""
    import jax

    from nomic_jax.run.pretrained import read_pretrained

    def norm(tree: dict) -> float:
        return float(np.sqrt(sum(np.sum(np.square(x, dtype=np.float64)) for x in jax.tree.leaves(tree))))

    first, *others = [read_pretrained(workdir).params for workdir in workdirs]
    return [norm(jax.tree.map(np.subtract, other, first)) / norm(first) for other in others]


def reproduce_and_lineage(counts: dict[str, int], seed: int, folder: Path, results: Results) -> None:
    """Runs launch.reproduce, launch.data_order and, without JAX, launch.lineage on checkpoints of each stage."""
    runs.prepare(folder)
    rng = random.Random(seed)
    stages = runs.STAGES[: counts["stages"]]
    results.expect(len(stages) * (3 + counts["steps"]))
    previous = ""
    for stage in stages:
        workdir = folder / stage
        runs.finish(stage, folder, workdir, 2, init_from=previous)
        step = rng.choice(runs.steps_in(workdir))
        checkpoint = f"{workdir}/checkpoints/{step}"
        process = processes.command(
            "launch.reproduce",
            [checkpoint, "--recorded_paths", f"--workdir={folder}/{stage}-again"],
            folder / f"{stage}-again.txt",
            2,
        )
        code = process.wait()
        results.add(code == 0 and "identical: every array" in process.text(), f"{stage}: step {step}", process.text())
        _lineage(checkpoint, stage, folder, results)
        rows = processes.call(_rows_of_steps, stage, folder, previous, folder=folder)
        previous = str(workdir)
        sources = {line["step"]: line["source"] for line in read_metrics(workdir)}
        for step in rng.sample(range(1, runs.STEPS + 1), counts["steps"]):
            output = folder / f"{stage}-{step}.txt"
            process = processes.command(
                "launch.data_order", [str(workdir), "--recorded_paths", f"--step={step}"], output
            )
            code = process.wait()
            lines = [json.loads(line) for line in process.text().splitlines() if line.startswith("{")]
            found = {line["source"]: line["rows"] for line in lines}
            passed = (
                code == 0 and found == rows[step] and sources[step] in (*found, "text")
            )  # a masked-LM step mixes all sources
            results.add(passed, f"{stage}: rows of step {step}", f"{found}, not {rows[step]}")


def _lineage(checkpoint: str, stage: str, folder: Path, results: Results) -> None:
    """Runs launch.lineage in a Python that cannot import jax, then again with a flipped bit in a data file."""
    command = [sys.executable, "-c", WITHOUT_JAX, checkpoint, "--recorded_paths"]

    def run() -> tuple[int, str]:
        done = subprocess.run(command, cwd=processes.ROOT, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    code, text = run()
    results.add(code == 0 and ", 0 changed, 0 not found, 0 not recorded" in text, f"lineage of {checkpoint}", text)
    file = folder / "corpus" / {"mlm": "text.jsonl", "contrastive": "a.jsonl", "finetune": "triplets.jsonl"}[stage]
    content = file.read_bytes()
    file.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
    code, text = run()
    file.write_bytes(content)
    is_named = any(line.startswith("changed") and str(file) in line for line in text.splitlines())
    results.add(code == 1 and is_named, f"lineage with a bit flipped in {file.name}", text)


# Runs launch.lineage as if these packages were not installed.
WITHOUT_JAX = """
import runpy, sys
for name in ("jax", "jaxlib", "flax", "optax", "orbax", "torch", "transformers", "tokenizers", "numpy"):
    sys.modules[name] = None
sys.argv = ["launch.lineage", *sys.argv[1:]]
runpy.run_module("launch.lineage", run_name="__main__", alter_sys=True)
"""


def _rows_of_steps(stage: str, folder: Path, init_from: str) -> dict[int, dict[str, list[int]]]:
    """Maps step -> source -> rows. Rows of pairs and triplets are found by their texts in the data files."""
    from nomic_jax.data.batches.shapes import hash_texts
    from nomic_jax.data.tokens.tokenizer import Tokenizer
    from nomic_jax.train.objectives import make_stream
    from tests.corpus import find_minilm

    tokenizer = Tokenizer.from_directory(find_minilm())
    stream = make_stream(runs.configuration(stage, folder, init_from=init_from), tokenizer)
    if stage == "mlm":
        rows = {step: stream.row_numbers(step - 1) for step in range(1, runs.STEPS + 1)}
        epoch = stream.steps_per_epoch
        seen = [row for step in range(1, epoch + 1) for row in stream.row_numbers(step - 1)["data"]]
        assert len(set(seen)) == len(seen) == epoch * 8, "a row occurs twice in an epoch"
        return rows
    files = {"contrastive": [("a", "query"), ("b", "title")], "finetune": [("triplets", "query")]}[stage]
    row_of: dict[bytes, tuple[str, int]] = {}
    for store, (file, column) in zip(stream.stores, files):
        name, prefix = store.name, store.manifest["source"]["query_prefix"]
        lines = (folder / "corpus" / f"{file}.jsonl").read_text(encoding="utf-8").splitlines()
        texts = [f"{prefix}: {json.loads(line)[column]}" if prefix else json.loads(line)[column] for line in lines]
        for row, ids in enumerate(tokenizer.encode(texts, 8)):
            row_of[hash_texts(ids, np.array([len(ids)])).tobytes()] = name, row
    found: dict[int, dict[str, list[int]]] = {}
    for step in range(1, runs.STEPS + 1):
        rows_of_source: dict[str, list[int]] = {}
        for query in stream.batch(step - 1, 0, 1).arrays["query_hash"]:
            name, row = row_of[query.tobytes()]
            rows_of_source.setdefault(name, []).append(row)
        found[step] = rows_of_source
    return found

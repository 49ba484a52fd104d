"""R4, R5, R14: the same rows and the same bits again, and how far other numbers of devices are from them."""

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
from tests.faults.tally import Tally

SAMPLINGS = ("rows", "shards", "temperature", "weights")


def order(counts: dict[str, int], seed: int, folder: Path, tally: Tally) -> None:
    """Streams of a mixture, read by processes in turns of random length, each with devices and threads of its own."""
    runs.prepare(folder)
    text = (folder / "corpus" / "pairs.yaml").read_text(encoding="utf-8")
    weights = iter((3, 1))
    text = re.sub(r"\{name", lambda _: f"{{weight: {next(weights)}, name", text)
    (folder / "corpus" / "weighted.yaml").write_text(text, encoding="utf-8")
    rng = random.Random(seed)
    samplings = SAMPLINGS[: counts["samplings"]]
    tally.ask(len(samplings) * (counts["resumes"] + 1))
    steps = counts["steps"] // len(samplings)
    for sampling in samplings:
        settings = {
            "data.sampling": sampling,
            "data.sampling_temperature": 2.0,
            "data.mixture": str(folder / "corpus" / ("weighted.yaml" if sampling == "weights" else "pairs.yaml")),
            "data.remainder": rng.choice(("drop", "carry")),
        }
        wanted = processes.call(_rows_by_the_step, settings, folder, steps, folder=folder)
        cuts = [0, *sorted(rng.sample(range(1, steps), counts["resumes"])), steps]
        found = []
        for number, (start, stop) in enumerate(itertools.pairwise(cuts)):
            # Every number of them comes, in an order of its own.
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
                # Chunks are dealt to devices by length; without them the order inside a batch is the same, too.
                same = same and (layout != "padded" or np.array_equal(rows, expected))
                found.append(np.sort(rows, axis=1))
            tally.held(same, what, f"exit codes {codes}" if any(codes) else "other rows")
        in_order = (np.sort(wanted, axis=1), np.concatenate(found))
        hashes = [hashlib.sha256(np.ascontiguousarray(x)).hexdigest() for x in in_order]
        tally.note(**{f"sha256_{sampling}": hashes[0], f"steps_{sampling}": steps})
        if hashes[0] != hashes[1]:
            tally.fail(f"{sampling}: {hashes[0]} in one go, {hashes[1]} in {len(found)} turns")


def _stream(settings: dict[str, object], folder: Path, devices: int) -> Stream:
    from nomic_jax.data.tokens.tokenizer import Tokenizer
    from nomic_jax.train.objectives import make_stream
    from tests.corpus import find_minilm

    config = runs.configuration("contrastive", folder, **settings)
    assert isinstance(config.data, PairData)
    return make_stream(config, Tokenizer.from_directory(find_minilm()), devices)


def _rows_by_the_step(settings: dict[str, object], folder: Path, steps: int) -> np.ndarray:
    """Step by step, without threads: [steps, batch], see ``_of``."""
    stream = _stream(settings, folder, 1)
    return np.stack([_of(stream.batch(step, 0, 1).arrays) for step in range(steps)])


def _of(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """uint64 [batch]: of each row the hash of its query and of its document; in this corpus no two rows share both."""
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
    np.save(part, np.stack([_of(batch.arrays) for batch in batches]))


def bits(counts: dict[str, int], seed: int, folder: Path, tally: Tally) -> None:
    """New Pythons that know nothing of each other; then the same steps on other numbers of devices."""
    runs.prepare(folder)
    stages = runs.STAGES[: counts["stages"]]
    device_counts = (1, 2, 4, 8)[: counts["device_counts"]]
    tally.ask(len(stages) * (counts["processes"] + len(device_counts) - 1))
    for stage in stages:
        settings = dict(steps=counts["steps"], checkpoint__every=10**6, seed=seed % 1000)
        hashes = []
        for number in range(counts["processes"]):
            workdir = folder / f"{stage}-{number}"
            command = [sys.executable, "-m", "launch.train", *runs.arguments(stage, folder, workdir, **settings)]
            environment = processes.environment(JAX_NUM_CPU_DEVICES="8")
            done = subprocess.run(command, cwd=processes.ROOT, env=environment, capture_output=True, text=True)
            hashes.append(runs.state_hash(workdir, folder) if done.returncode == 0 else done.stderr[-300:])
            tally.held(hashes[-1] == hashes[0] and len(hashes[0]) == 64, f"{stage}: process {number}", hashes[-1])
        settings["steps"] = counts["steps_across"]
        for devices in device_counts:
            runs.finish(stage, folder, folder / f"{stage}-on-{devices}", devices, **settings)
        workdirs = [folder / f"{stage}-on-{devices}" for devices in device_counts]
        for devices, distance in zip(device_counts[1:], processes.call(_distances, workdirs, folder=folder)):
            tally.worst(distance, "relative distance across device counts", limit=1e-5)
            tally.held(distance <= 1e-5, f"{stage}: {devices} devices and one", f"{distance:.2e} apart")


def _distances(workdirs: list[Path]) -> list[float]:
    """Of all parameters of each but the first one, as a share of the first one's norm."""
    import jax

    from nomic_jax.run.pretrained import read_pretrained

    def norm(tree: dict) -> float:
        return float(np.sqrt(sum(np.sum(np.square(x, dtype=np.float64)) for x in jax.tree.leaves(tree))))

    first, *others = [read_pretrained(workdir).params for workdir in workdirs]
    return [norm(jax.tree.map(np.subtract, other, first)) / norm(first) for other in others]


def reproduce(counts: dict[str, int], seed: int, folder: Path, tally: Tally) -> None:
    """The commands of the README: a checkpoint made again, the rows of a step, and the lineage without JAX."""
    runs.prepare(folder)
    rng = random.Random(seed)
    stages = runs.STAGES[: counts["stages"]]
    tally.ask(len(stages) * (3 + counts["steps"]))
    before = ""
    for stage in stages:
        workdir = folder / stage
        runs.finish(stage, folder, workdir, 2, init_from=before)
        step = rng.choice(runs.steps_in(workdir))
        checkpoint = f"{workdir}/checkpoints/{step}"
        process = processes.command(
            "launch.reproduce", [checkpoint, f"--workdir={folder}/{stage}-again"], folder / f"{stage}-again.txt", 2
        )
        code = process.wait()
        tally.held(code == 0 and "identical: every array" in process.text(), f"{stage}: step {step}", process.text())
        _lineage(checkpoint, stage, folder, tally)
        rows = processes.call(_rows_of_steps, stage, folder, before, folder=folder)
        before = str(workdir)
        sources = {line["step"]: line["source"] for line in read_metrics(workdir)}
        for step in rng.sample(range(1, runs.STEPS + 1), counts["steps"]):
            output = folder / f"{stage}-{step}.txt"
            process = processes.command("launch.data_order", [str(workdir), f"--step={step}"], output)
            code = process.wait()
            told = [json.loads(line) for line in process.text().splitlines() if line.startswith("{")]
            found = {line["source"]: line["rows"] for line in told}
            passed = code == 0 and found == rows[step] and sources[step] in (*found, "text")  # masked-LM mixes them
            tally.held(passed, f"{stage}: rows of step {step}", f"{found}, not {rows[step]}")


def _lineage(checkpoint: str, stage: str, folder: Path, tally: Tally) -> None:
    """By a Python that cannot import jax; then with a flipped bit in a file of the data."""
    command = [sys.executable, "-c", WITHOUT_JAX, checkpoint]

    def run() -> tuple[int, str]:
        done = subprocess.run(command, cwd=processes.ROOT, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    code, text = run()
    tally.held(code == 0 and ", 0 changed, 0 not at hand, 0 not recorded" in text, f"lineage of {checkpoint}", text)
    file = folder / "corpus" / {"mlm": "text.jsonl", "contrastive": "a.jsonl", "finetune": "triplets.jsonl"}[stage]
    content = file.read_bytes()
    file.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
    code, text = run()
    file.write_bytes(content)
    named = any(line.startswith("changed") and str(file) in line for line in text.splitlines())
    tally.held(code == 1 and named, f"lineage with a bit flipped in {file.name}", text)


# As where no jax is installed.
WITHOUT_JAX = """
import runpy, sys
for name in ("jax", "jaxlib", "flax", "optax", "orbax", "torch", "transformers", "tokenizers", "numpy"):
    sys.modules[name] = None
sys.argv = ["launch.lineage", *sys.argv[1:]]
runpy.run_module("launch.lineage", run_name="__main__", alter_sys=True)
"""


def _rows_of_steps(stage: str, folder: Path, init_from: str) -> dict[int, dict[str, list[int]]]:
    """Step -> source -> rows: of pairs and triplets, found by the hashes of their texts in the files themselves."""
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
        assert len(set(seen)) == len(seen) == epoch * 8, "a row of an epoch comes twice"
        return rows
    files = {"contrastive": [("a", "query"), ("b", "title")], "finetune": [("triplets", "query")]}[stage]
    place: dict[bytes, tuple[str, int]] = {}
    for store, (file, column) in zip(stream.stores, files):
        name, prefix = store.name, store.manifest["source"]["query_prefix"]
        lines = (folder / "corpus" / f"{file}.jsonl").read_text(encoding="utf-8").splitlines()
        texts = [f"{prefix}: {json.loads(line)[column]}" if prefix else json.loads(line)[column] for line in lines]
        for row, ids in enumerate(tokenizer.encode(texts, 8)):
            place[hash_texts(ids, np.array([len(ids)])).tobytes()] = name, row
    found: dict[int, dict[str, list[int]]] = {}
    for step in range(1, runs.STEPS + 1):
        of_step: dict[str, list[int]] = {}
        for query in stream.batch(step - 1, 0, 1).arrays["query_hash"]:
            name, row = place[query.tobytes()]
            of_step.setdefault(name, []).append(row)
        found[step] = of_step
    return found

"""Plants numbers that overflow in labels of the data, and NaN in the initial model: non-finite-steps."""

import dataclasses
import hashlib
import importlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from nomic_jax.train.config import TrainConfig
from nomic_jax.train.watch.metrics import read_metrics
from nomic_jax.train.watch.skipped import MOST_IN_A_ROW
from tests.corpus import find_minilm
from tests.faults import processes, runs
from tests.faults.results import Results

# The loss of a regression is the squared error. The first label overflows the loss; the second only the norm of the
# gradient, if the batch is one row on each of two devices.
LABELS = {"loss": 1e30, "gradient": 1.84e19}
BATCH = 2


def non_finite_steps(counts: dict[str, int], seed: int, folder: Path, results: Results) -> None:
    """``counts`` gives the number of steps with an infinite loss, an infinite gradient, and NaN caused by one text."""
    runs.prepare(folder)
    rng = random.Random(seed)
    kinds = ("loss", "gradient", "input")
    results.expect(sum(counts[kind] for kind in kinds) + 1)
    _train_to_divergence(folder, results)
    processes.use_devices(2)
    of_labels = {kind: counts[kind] for kind in LABELS}
    steps = 2 * sum(of_labels.values()) + 6
    _run(_regression(folder, "numbers", steps), of_labels, _plant_labels, rng, folder / "regression", results)
    steps = 2 * counts["input"] + 6
    _run(_pairs(folder, steps), {"input": counts["input"]}, _plant_words, rng, folder / "pairs", results)


def _train_to_divergence(folder: Path, results: Results) -> None:
    """If all steps are non-finite, training ends after MOST_IN_A_ROW of them, and again when restarted."""
    config = _regression(folder, "all-overflow", 30)
    file = Path(config.data.mixture)
    rows = [json.loads(line) | {"label": LABELS["loss"]} for line in file.read_text(encoding="utf-8").splitlines()]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    workdir, problems = folder / "diverged", []
    for attempt in range(2):
        process = processes.fork(lambda: _train(config, workdir), folder / f"diverged-{attempt}.txt")
        process.wait()
        expected = f"DivergedError: the steps 1 to {MOST_IN_A_ROW} were not finite"
        if expected not in process.last_line():
            problems.append(process.last_line())
        if len(read_metrics(workdir, "skipped.jsonl")) != MOST_IN_A_ROW:
            problems.append(f"{len(read_metrics(workdir, 'skipped.jsonl'))} steps recorded")
    results.add(not problems, f"{MOST_IN_A_ROW} non-finite steps in a row", "; ".join(problems))


def _train(config: TrainConfig, workdir: Path) -> None:
    from nomic_jax.train.loop import train

    train(config, workdir)


def _regression(folder: Path, name: str, steps: int) -> TrainConfig:
    """A regression on texts with small labels, enough for ``steps`` batches."""
    lines = (folder / "corpus" / "text.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [" ".join(json.loads(line)["text"].split()[i : i + 8]) for i in (0, 4, 8, 12) for line in lines]
    rows = [{"sentence": text, "label": i % 5 / 5} for i, text in enumerate(texts[: steps * BATCH])]
    file = folder / "corpus" / name / "train.jsonl"
    file.parent.mkdir()
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = importlib.import_module("configs.glue").get_config("debug")
    config.update_from_flattened_dict(
        {"model.hidden_size": 16, "model.num_heads": 2, "model.intermediate_size": 32, "model.num_layers": 1}
        | {"model.max_positions": 2048, "batch_size": BATCH, "steps": steps, "log_every": 1, "data.seq_len": 16}
        | {"data.mixture": str(file), "data.tokenizer": str(find_minilm()), "data.num_labels": 1}
        | {"checkpoint.every": 10, "checkpoint.keep": 1000}
    )
    return TrainConfig.from_mapping(config.to_dict())


def _pairs(folder: Path, steps: int) -> TrainConfig:
    lines = (folder / "corpus" / "text.jsonl").read_text(encoding="utf-8").splitlines()
    words = [json.loads(line)["text"].split() for line in lines]
    rows = [
        {"query": " ".join(text[i : i + 3]), "document": " ".join(text[i + 3 : i + 9])}
        for i in (0, 5, 10)
        for text in words
    ]
    file = folder / "corpus" / "few.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return runs.configuration(
        "contrastive", folder, data__mixture=str(file), steps=steps, checkpoint__every=10, checkpoint__keep=1000
    )


def _plant_labels(config: TrainConfig, rows: dict[int, str], folder: Path) -> TrainConfig:
    """Replaces labels in the data file; ``rows`` maps a row to the kind of its label."""
    file = Path(config.data.mixture)
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    for row, kind in rows.items():
        lines[row]["label"] = LABELS[kind]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return config


def _plant_words(config: TrainConfig, rows: dict[int, str], folder: Path) -> TrainConfig:
    """Adds a word to these rows of the data file; its embedding is NaN in the model that the run starts from."""
    import jax

    from nomic_jax.data.tokens.tokenizer import Tokenizer
    from nomic_jax.hf import Checkpoint
    from nomic_jax.model import EmbeddingConfig, init_encoder
    from nomic_jax.run.pretrained import write_pretrained

    file = Path(config.data.mixture)
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        column = ("query", "document")[row % 2]
        lines[row][column] = f"[unused7] {lines[row][column]}"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    tokenizer = Tokenizer.from_directory(find_minilm())
    (ids,) = tokenizer.encode(["[unused7]"])
    assert not any("[unused7]" in line["query"] for i, line in enumerate(lines) if i not in rows)
    params = jax.device_get(init_encoder(jax.random.key(0), config.model))
    table = np.array(params["embeddings"]["word"]["embedding"])
    common = set(
        np.concatenate(
            tokenizer.encode([text for line in lines for text in line.values() if "[unused7]" not in text])
        ).tolist()
    )
    table[[i for i in ids.tolist() if i not in common]] = np.nan
    params["embeddings"]["word"]["embedding"] = table
    write_pretrained(folder / "planted", Checkpoint(EmbeddingConfig(config.model), {"encoder": params}, tokenizer))
    return dataclasses.replace(config, init_from=str(folder / "planted"))


def _run(
    config: TrainConfig,
    counts: dict[str, int],
    plant: Callable[[TrainConfig, dict[int, str], Path], TrainConfig],
    rng: random.Random,
    folder: Path,
    results: Results,
) -> None:
    """Plants one bad row in each of some steps, trains, and checks every step."""
    import jax

    from nomic_jax.data.tokens.tokenizer import Tokenizer
    from nomic_jax.model import EmbeddingConfig
    from nomic_jax.run.pretrained import read_pretrained
    from nomic_jax.train import loop
    from nomic_jax.train.objectives import make_stage
    from nomic_jax.train.optim import learning_rate, make_optimizer
    from nomic_jax.train.sharding import make_mesh, put_rows
    from nomic_jax.train.state import make_train_step

    tokenizer = Tokenizer.from_directory(find_minilm())
    (name,) = loop.make_stream(config, tokenizer, 2).row_numbers(0)
    kinds = [kind for kind, count in counts.items() for _ in range(count)]
    steps = sorted(_spread(rng, len(kinds), config.steps))
    rng.shuffle(kinds)
    stream = loop.make_stream(config, tokenizer, 2)
    bad = {step: (rng.choice(stream.row_numbers(step - 1)[name]), kind) for step, kind in zip(steps, kinds)}
    config = plant(config, dict(bad.values()), folder.parent)

    before: dict[int, Any] = {}
    hashes: list[str] = []
    make = loop.make_train_step

    def make_and_watch(*arguments: Any) -> Any:
        step = make(*arguments)

        def watched(state: Any, *rest: Any) -> Any:
            number = int(state.step) + 1
            if number in bad:
                before[number] = jax.device_get(state)
            if not hashes:
                hashes.append(_hash(state))
            state, metrics = step(state, *rest)
            hashes.append(_hash(state))
            return state, metrics

        return watched

    loop.make_train_step = make_and_watch
    try:
        loop.train(config, folder, jax.devices()[:2])
    finally:
        loop.make_train_step = make
    recorded = {line["step"]: line for line in read_metrics(folder, "skipped.jsonl")}
    untouched = {step for step in range(1, config.steps + 1) if hashes[step] == hashes[step - 1]}
    if extra := (recorded.keys() | untouched) - bad.keys():
        results.fail(f"steps skipped without a planted fault: {sorted(extra)}")

    # Repeat each step from its rows and the state before it, with a separately compiled program.
    mesh = make_mesh(jax.devices()[:2])
    stream = loop.make_stream(config, tokenizer, 2)
    pretrained = read_pretrained(config.init_from) if config.init_from else None
    model = pretrained.config if pretrained else EmbeddingConfig(config.model)
    stage = make_stage(config, model, stream.layout)
    optimizer = make_optimizer(config.optim, learning_rate(config.optim, config.steps))
    repeat = make_train_step(stage, optimizer, mesh)
    for step, (row, kind) in bad.items():
        line, problems = recorded.get(step), []
        if step not in untouched:
            problems.append("parameters or optimizer state changed")
        if line is None:
            problems.append("the step is not recorded")
        else:
            if row not in line["rows"][name] or line["rows"] != stream.row_numbers(step - 1):
                problems.append(f"recorded rows are {line['rows']}, the planted one is {row}")
            figures = {"loss": "inf", "gradient": "inf", "input": "nan"}
            if line["grad_norm" if kind == "gradient" else "loss"] != figures[kind]:
                problems.append(f"the record is {line}")
            if kind == "gradient" and not np.isfinite(float(line["loss"])):
                problems.append(f"the loss is {line['loss']}")
            _, metrics = repeat(before[step], put_rows(stream.batch(step - 1, 0, 1).arrays, mesh), {})
            if [str(float(metrics[figure])) for figure in ("loss", "grad_norm")] != [line["loss"], line["grad_norm"]]:
                problems.append(f"repeating the step gives other figures: {metrics}")
        results.add(not problems, f"{kind} at step {step}, row {row}", "; ".join(problems))

    # Resume from the checkpoint at half of the steps; it must record the same skipped steps.
    text = (folder / "skipped.jsonl").read_text(encoding="utf-8")
    half = config.steps // 20 * 10
    for saved in runs.steps_in(folder):
        if saved > half:
            shutil.rmtree(folder / "checkpoints" / str(saved))
    loop.train(config, folder, jax.devices()[:2])
    if (folder / "skipped.jsonl").read_text(encoding="utf-8") != text:
        results.fail(f"resuming from step {half} recorded other skipped steps")


def _spread(rng: random.Random, count: int, steps: int) -> list[int]:
    """Draws ``count`` steps, without MOST_IN_A_ROW consecutive ones."""
    while True:
        chosen = set(rng.sample(range(1, steps + 1), count))
        if not any(all(i + j in chosen for j in range(MOST_IN_A_ROW)) for i in chosen):
            return list(chosen)


def _hash(state: Any) -> str:
    """SHA-256 of parameters and optimizer state; NaN are compared by their bits."""
    import jax

    digest = hashlib.sha256()
    for leaf in jax.tree.leaves((state.params, state.opt_state)):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()

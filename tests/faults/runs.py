"""Tiny runs of all three training stages for the checks, and the figures and hashes that are compared."""

import importlib
from pathlib import Path

from nomic_jax.train.config import TrainConfig
from nomic_jax.train.watch.metrics import read_metrics
from tests.corpus import find_minilm, write_corpus
from tests.faults import processes

STAGES = ("mlm", "contrastive", "finetune")
FIGURES = ("step", "loss", "grad_norm", "accuracy", "lr", "source", "real_tokens", "padded_tokens")
_MIXTURES = {"mlm": "text.jsonl", "contrastive": "pairs.yaml", "finetune": "triplets.jsonl"}
# The same in all checks, so that they share compiled programs: the schedule makes the number part of the program.
STEPS = 40
# The vocabulary is the full one of the tokenizer, so a checkpoint has 6 MB, and most of it are arrays.
_FIELDS: dict[str, object] = {
    "batch_size": 8,
    "steps": STEPS,
    "checkpoint.every": 4,
    "checkpoint.keep": 3,
    "model.hidden_size": 16,
    "model.intermediate_size": 32,
    "model.num_layers": 1,
}
_OF_STAGE: dict[str, dict[str, object]] = {
    "mlm": {"data.seq_len": 16},
    # Only one shape, so that a step is compiled once.
    "contrastive": {"data.query_length": 8, "data.document_length": 16},
    "finetune": {"data.query_length": 8, "data.document_length": 16},
}


def prepare(folder: Path) -> None:
    """Writes the corpus of the runs to ``folder``."""
    (folder / "corpus").mkdir(parents=True)
    write_corpus(folder / "corpus", find_minilm())


def fields(stage: str, folder: Path, **changes: object) -> dict[str, object]:
    """The configuration fields of a run by their dotted names; in ``changes``, __ stands for the dot."""
    values = {
        "data.mixture": str(folder / "corpus" / _MIXTURES[stage]),
        "data.tokenizer": str(find_minilm()),
        "data.cache_dir": str(folder / "cache"),
    }
    changed = {name.replace("__", "."): value for name, value in changes.items()}
    return values | _FIELDS | _OF_STAGE[stage] | changed


def arguments(stage: str, folder: Path, workdir: Path, **changes: object) -> list[str]:
    """The arguments of launch.train."""
    values = fields(stage, folder, **changes)
    return [
        f"--config={processes.ROOT}/configs/{stage}.py:debug",
        f"--workdir={workdir}",
        *(f"--config.{name}={value}" for name, value in values.items()),
    ]


def configuration(stage: str, folder: Path, **changes: object) -> TrainConfig:
    """The configuration that ``arguments`` describes."""
    config = importlib.import_module(f"configs.{stage}").get_config("debug")
    config.update_from_flattened_dict(fields(stage, folder, **changes))
    return TrainConfig.from_mapping(config.to_dict())


def start(
    stage: str, folder: Path, workdir: Path, devices: int = 1, output: Path | None = None, **changes: object
) -> processes.Process:
    """Starts launch.train in a new process."""
    output = output or workdir.with_name(f"{workdir.name}.txt")
    return processes.command("launch.train", arguments(stage, folder, workdir, **changes), output, devices)


def finish(stage: str, folder: Path, workdir: Path, devices: int = 1, **changes: object) -> None:
    """Trains to the last step; fails if the process fails."""
    process = start(stage, folder, workdir, devices, **changes)
    assert process.wait() == 0, process.text()[-3000:]


def shares(count: int, parts: int) -> list[int]:
    """Divides ``count`` into ``parts`` integers that differ by at most one."""
    return [count // parts + (i < count % parts) for i in range(parts)]


def steps_in(workdir: Path) -> list[int]:
    """The steps of the finished checkpoints, in ascending order."""
    return sorted(int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdecimal())


def steps_done(workdir: Path) -> int:
    """The last step that has a line in metrics.jsonl."""
    lines = read_metrics(workdir)
    return lines[-1]["step"] if lines else 0


def figures(workdir: Path) -> list[dict]:
    """The figures in metrics.jsonl that do not depend on time."""
    return [{name: line[name] for name in FIGURES} for line in read_metrics(workdir)]


def state_hash(workdir: Path, folder: Path) -> str:
    """SHA-256 of parameters, optimizer state and step of the latest checkpoint, read in a new process."""
    return processes.call(_state_hash, workdir, folder=folder)


def _state_hash(workdir: Path) -> str:
    from nomic_jax.train.reproduce import hash_state

    return hash_state(workdir / "checkpoints" / str(steps_in(workdir)[-1]))

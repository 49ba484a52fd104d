"""The files in the working directory of a run, and the search for sound checkpoints.

    config.json          the resolved configuration
    tokenizer.json       the tokenizer that made the tokens
    metrics.jsonl        one line every config.log_every steps
    goodput.json         how the time was spent, over all restarts
    evaluation.jsonl     the scores of each evaluation
    skipped.jsonl        the steps whose loss or gradient was not finite, if there were any
    checkpoints/<step>/  orbax: `params`, `training` (step, optimizer state), and a record of config, data and versions;
                         SHA-256 of every file, see ``nomic_jax.run.manifest``
    best                 a link to the checkpoint with the best evaluation figure, if there are evaluations
    rejected/<step>/     damaged checkpoints, moved aside when the run resumed from an earlier one

A stream is a function of the step, so the step is also the position in the data. The record's fingerprint identifies
the stream.

A checkpoint is written as checkpoints/<step>.part, hashed, and renamed to checkpoints/<step> once it is finished. Its
hashes are checked before it is read.
"""

from pathlib import Path

from nomic_jax.hf import CheckpointError
from nomic_jax.run.manifest import find_damage, write_manifest


class DamagedCheckpoint(CheckpointError):
    """The requested checkpoint, or every checkpoint, is damaged; the message names the files."""


def finished_steps(directory: Path) -> list[int]:
    """Returns the steps of the finished checkpoints, in ascending order."""
    return sorted(int(path.name) for path in directory.glob("*") if path.name.isdecimal() and path.is_dir())


def latest_intact(directory: Path) -> tuple[int | None, dict[int, str]]:
    """Returns (the latest step without damaged files, or None; what is wrong with each later step)."""
    damaged: dict[int, str] = {}
    for step in reversed(finished_steps(directory)):
        problem = find_damage(directory / str(step))
        if problem is None:
            return step, damaged
        damaged[step] = f"{directory / str(step)}: {problem}"
    return None, damaged


def list_damage(damaged: dict[int, str]) -> str:
    return "; ".join(damaged.values())


def commit(part: Path) -> None:
    write_manifest(part)
    part.rename(part.with_suffix(""))

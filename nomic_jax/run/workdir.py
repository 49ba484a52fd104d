"""The working directory of a run: what lies where, and which of its checkpoints are sound.

    config.json          the resolved configuration
    tokenizer.json       the tokenizer that made the tokens
    metrics.jsonl        one line every config.log_every steps
    goodput.json         where the time went, over all restarts
    evaluation.jsonl     the scores of each evaluation
    skipped.jsonl        the steps whose loss or gradient was not finite, if there were any
    checkpoints/<step>/  orbax: `params`, `training` (step, optimizer state), and a record of config, data and versions;
                         SHA-256 of every file, see ``nomic_jax.run.manifest``
    best                 a link to the checkpoint with the best evaluation figure, if there are evaluations
    rejected/<step>/     checkpoints with a damaged file, moved out of the way of a run that went on from an earlier one

The place in the data is the step, because a stream is a function of it; the record's fingerprint says of which stream.

A checkpoint is written as checkpoints/<step>.part, hashed, and renamed: under its own name it is finished. Its hashes
are checked before it is read.
"""

from pathlib import Path

from nomic_jax.hf import CheckpointError
from nomic_jax.run.manifest import find_damage, write_manifest


class DamagedCheckpoint(CheckpointError):
    """No checkpoint, or not the one that was asked for, is as it was written; the message names the files."""


def finished_steps(directory: Path) -> list[int]:
    """Of the finished checkpoints, in order."""
    return sorted(int(path.name) for path in directory.glob("*") if path.name.isdecimal() and path.is_dir())


def latest_sound(directory: Path) -> tuple[int | None, dict[int, str]]:
    """(the latest step whose files are as they were written, what is wrong with each one after it)."""
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

"""The files in the working directory of a run, and the search for sound checkpoints.

    config.json          the resolved configuration
    tokenizer.json       the tokenizer that made the tokens, and special_tokens_map.json if these have their own names
    metrics.jsonl        one line every config.log_every steps
    goodput.json         how the time was spent, over all restarts
    evaluation.jsonl     the scores of each evaluation
    skipped.jsonl        the steps whose loss or gradient was not finite, if there were any
    checkpoints/<step>/  orbax: `params`, `training` (step, optimizer state), `ema` if there is a moving average, and a
                         record of config, data and versions; SHA-256 of every file, see ``nomic_jax.run.manifest``
    best                 a link to the checkpoint with the best evaluation figure, if there are evaluations
    lock                 while a process trains: which one; see ``nomic_jax.files.locks``
    rejected/<step>/     damaged checkpoints, moved aside when the run resumed from an earlier one

A stream is a function of the step, so the step is also the position in the data. The record's fingerprint identifies
the stream.

A checkpoint is written as checkpoints/<step>.part, hashed, and renamed to checkpoints/<step> once it is finished. Its
hashes are checked before it is read. Nothing here is a link except ``best``.
"""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from nomic_jax.files.folders import check_no_link, entries_of, is_file, is_folder, remove_folder, walk_files
from nomic_jax.files.locks import held
from nomic_jax.files.reading import FileRefused, read_json
from nomic_jax.hf import CheckpointError
from nomic_jax.run.manifest import find_damage, write_manifest

LOCK = "lock"
_FILES = (
    "config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "metrics.jsonl",
    "goodput.json",
    "evaluation.jsonl",
    "skipped.jsonl",
    "wandb_id",
)
_FOLDERS = ("checkpoints", "rejected", "tensorboard", "profile", "wandb")
# An unfinished or deleted checkpoint, and what orbax makes of the name while it writes.
_PART = re.compile(r"(\d+)(\.old)?\.part(\.orbax-checkpoint-tmp.*)?")


class DamagedCheckpoint(CheckpointError):
    """The requested checkpoint, or every checkpoint, is damaged; the message names the files."""


@contextlib.contextmanager
def used_workdir(workdir: Path) -> Iterator[None]:
    """Makes the working directory, or checks that it is that of a run, and keeps other trainings out while entered.

    Raises:
      FileRefused: it holds something else than a run, or a link out of the run, or checkpoints cannot be written to a
        folder of this name. Nothing was written.
      InUse: another process trains there; the message says which one.
    """
    if "[" in str(workdir.absolute()):
        # It gathers the arrays of all processes with a glob. Without a match, the checkpoint has no arrays.
        raise FileRefused(
            f"{workdir}: orbax, which writes the checkpoints, takes a [ in the path for a pattern and would lose the "
            f"arrays; choose a folder whose whole path has no ["
        )
    is_new = not workdir.exists()
    if not is_new:
        _check_is_run(workdir)
        _check_links(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    try:
        with held(workdir / LOCK, "another training"):
            yield
    finally:
        if is_new:
            with contextlib.suppress(OSError):  # not empty
                workdir.rmdir()


def _check_is_run(workdir: Path) -> None:
    if not workdir.is_dir():
        raise FileRefused(f"{workdir}: is not a folder; choose another one for the run")
    found = entries_of(workdir)
    if not found or is_file(workdir / LOCK):
        return
    check_no_link(workdir, "checkpoints")
    if is_folder(workdir / "checkpoints"):
        names = os.listdir(workdir / "checkpoints")
        if names and all(name.isdecimal() or _PART.fullmatch(name) for name in names):
            return
        # The run failed before its first checkpoint.
        if not names and (not is_file(workdir / "config.json") or "stage" in read_json(workdir / "config.json")):
            return
    more = f" and {len(found) - 3:,} more" if len(found) > 3 else ""
    raise FileRefused(
        f"{workdir}: holds {', '.join(found[:3])}{more}, and is not the working directory of a run. Nothing was "
        f"written; choose a new or empty folder"
    )


def _check_links(workdir: Path) -> None:
    check_no_link(workdir, LOCK, *_FILES, *_FOLDERS)
    if is_folder(workdir / "checkpoints"):
        check_no_link(workdir / "checkpoints", *os.listdir(workdir / "checkpoints"))
    for folder in ("tensorboard", "profile"):
        if is_folder(workdir / folder):
            for _ in walk_files(workdir / folder):  # refuses links
                pass
    best = workdir / "best"
    if os.path.lexists(best) and not (best.is_symlink() and re.fullmatch(r"checkpoints/\d+", os.readlink(best))):
        raise FileRefused(f"{best}: is not a link to a checkpoint of this run; remove it")


def remove_parts(directory: Path, step: int | None = None) -> None:
    """Removes unfinished checkpoints, known by their names; of one step, or all. Links are left alone."""
    for name in os.listdir(directory):
        match = _PART.fullmatch(name)
        if match and is_folder(directory / name) and (step is None or int(match[1]) == step):
            remove_folder(directory / name)


def finished_steps(directory: Path) -> list[int]:
    """Returns the steps of the finished checkpoints, in ascending order.

    Raises:
      DamagedCheckpoint: ``directory``, or a checkpoint in it, is a link.
    """
    if directory.is_symlink():
        raise DamagedCheckpoint(f"{directory}: is a link; checkpoints are written without links")
    paths = [path for path in directory.glob("*") if path.name.isdecimal()]
    if link := next((path for path in sorted(paths) if path.is_symlink()), None):
        raise DamagedCheckpoint(f"{link}: is a link; checkpoints are written without links")
    return sorted(int(path.name) for path in paths if path.is_dir())


def latest_intact(directory: Path) -> tuple[int | None, dict[int, str]]:
    """Returns (the latest step without damaged files, or None; what is wrong with each later step)."""
    damaged: dict[int, str] = {}
    for step in reversed(finished_steps(directory)):
        problem = find_damage(directory / str(step))
        if problem is None:
            return step, damaged
        damaged[step] = f"{directory / str(step)}: {problem}"
    return None, damaged


def best_step(workdir: Path) -> int | None:
    """Returns the step that <workdir>/best links to: the best one in the evaluations; None without such a link."""
    link = workdir / "best"
    found = re.fullmatch(r"checkpoints/(\d+)", os.readlink(link)) if link.is_symlink() else None
    return int(found[1]) if found else None


def list_damage(damaged: dict[int, str]) -> str:
    return "; ".join(damaged.values())


def commit(part: Path) -> None:
    write_manifest(part)
    part.rename(part.with_suffix(""))

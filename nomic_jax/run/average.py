"""The average of checkpoints: of the last steps of a run, or of several runs (model soups, arXiv:2203.05482).

Runs that started from the same weights often average to a better model than each of them is. Nothing is trained.
"""

import dataclasses
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from nomic_jax.hf import NOMIC_PROMPTS, Checkpoint
from nomic_jax.hf.hub import is_hub_name
from nomic_jax.run.manifest import follow
from nomic_jax.run.pretrained import Weights, identify, read_pretrained, resolve, write_pretrained
from nomic_jax.run.workdir import finished_steps

# Fields of the encoder that change speed or memory, or random weights, but no vector.
_FREE = ("dtype", "attention", "recompute", "norm_kernel", "init_std")


def average(
    paths: Sequence[str | Path],
    workdir: str | Path,
    *,
    shares: Sequence[float] | None = None,
    weights: Weights | None = None,
) -> list[dict[str, Any]]:
    """Writes the weighted mean of models as a run of one checkpoint, which ``read_pretrained`` and all commands open.

    The sum is in float64 in the order of ``paths``, so that it has the same bits everywhere. Encoder, masked-LM head
    and learnt temperature are averaged; a head or temperature that one of the models lacks is left out, and so is a
    classifier. Prompts and other settings are those of the first model.

    Args:
      paths: two or more runs, checkpoints of runs, Hugging Face directories or models of the hub, see
        ``read_pretrained``.
      workdir: where to write it; it may be a new or an empty folder.
      shares: a positive number for each of ``paths``; they are divided by their sum. None for equal ones.
      weights: of runs with a moving average, see ``read_pretrained``.

    Returns:
      The record of each member: path, hash and step as of ``identify``, share, weights (of a run with an average), and
      the training records that not all members have.

    Raises:
      ValueError: the models have another architecture or tokenizer than the first one, or the shares cannot be used.
      FileExistsError, FileRefused: see ``write_pretrained``; other exceptions: see ``read_pretrained``.
    """
    normalized = _normalized(shares, len(paths))
    if (Path(workdir) / "checkpoints").exists():  # before the work
        raise FileExistsError(f"{workdir} already holds checkpoints; choose another directory")
    # A run that still trains writes more: which checkpoint counts is decided once.
    places = [resolve(path) for path in paths]
    members: list[dict[str, Any]] = []
    trainings: list[tuple[dict[str, Any], ...]] = []
    first, total = None, {}
    for path, place, share in zip(paths, tqdm(places, unit="checkpoint", desc="average"), normalized):
        member = identify(place)
        read = read_pretrained(place, _weights_of(place, weights))
        if first is None:
            first = read
            total = {name: read.params[name] for name in ("encoder", "mlm_head", "temperature") if name in read.params}
            total = jax.tree.map(lambda x: np.zeros(np.shape(x)), total)
        _check_same(first, read, str(paths[0]), str(path))
        total = {name: _add(part, share, read.params[name]) for name, part in total.items() if name in read.params}
        last = read.training[-1] if read.training else {}
        members.append(member | {"share": share} | ({"weights": last["weights"]} if "weights" in last else {}))
        trainings.append(read.training)
    assert first is not None
    common = _common(trainings)
    for member, training in zip(members, trainings):
        member["training"] = list(training[len(common) :])
    params = jax.tree.map(lambda x: x.astype(np.float32), total)
    mean = dataclasses.replace(first, params=params, labels=(), training=tuple(common))
    write_pretrained(workdir, mean, average=members)
    return members


def _add(total: dict, share: float, params: dict) -> dict:
    return jax.tree.map(lambda sum, x: sum + share * np.asarray(x, np.float64), total, params)


def last_checkpoints(path: str | Path, count: int) -> list[Path]:
    """Returns the last ``count`` checkpoints of a run, the earliest first.

    Raises:
      ValueError: ``path`` is no run, or has fewer.
    """
    directory = (Path() if is_hub_name(path) else follow(path)) / "checkpoints"
    steps = finished_steps(directory) if directory.is_dir() else []
    if not steps:
        raise ValueError(f"{path} is not the working directory of a run")
    if count < 2 or count > len(steps):
        raise ValueError(f"{path} has the checkpoints {', '.join(map(str, steps))}; take the last 2 to {len(steps)}")
    return [directory / str(step) for step in steps[-count:]]


def _normalized(shares: Sequence[float] | None, count: int) -> list[float]:
    if count < 2:
        raise ValueError("an average takes two checkpoints or more")
    given = [1.0] * count if shares is None else [float(share) for share in shares]
    if len(given) != count:
        raise ValueError(f"there are {len(given)} shares for {count} checkpoints; give one for each")
    if not all(share > 0 and math.isfinite(share) for share in given):
        raise ValueError(f"the shares are {', '.join(f'{share:g}' for share in given)}; each must be positive")
    return [share / math.fsum(given) for share in given]


def _weights_of(place: Path, weights: Weights | None) -> Weights | None:
    """Only runs have a choice; Hugging Face directories may be among the members."""
    return weights if weights != "ema" or place.parent.name == "checkpoints" else None


def _check_same(first: Checkpoint, other: Checkpoint, first_path: str, path: str) -> None:
    """Raises ValueError, with the field, if two models cannot be averaged; warns of settings that the result loses."""
    ours, theirs = ((dataclasses.asdict(x.config.encoder) | {"pooling": x.config.pooling}) for x in (first, other))
    for name in ours.keys() - set(_FREE):
        if ours[name] != theirs[name]:
            raise ValueError(
                f"{path} has {name} {theirs[name]!r}, {first_path} has {ours[name]!r}; only models of one architecture "
                f"can be averaged"
            )
    hashes = [x.tokenizer.sha256 if x.tokenizer else "none" for x in (first, other)]
    if hashes[0] != hashes[1]:
        raise ValueError(
            f"{path} has another tokenizer ({hashes[1][:16]}) than {first_path} ({hashes[0][:16]}): the rows of their "
            f"word embeddings stand for other tokens"
        )
    ours, theirs = (_settings(x) for x in (first, other))
    for name, value in ours.items():
        if value != theirs[name]:
            warnings.warn(f"{path} has another {name} than {first_path}, whose is kept", stacklevel=3)


def _settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """Returns what is taken of the first model."""
    return {
        "prompts": dict(NOMIC_PROMPTS) if checkpoint.prompts is None else checkpoint.prompts,
        "default_prompt_name": checkpoint.default_prompt_name,
        "similarity": checkpoint.similarity,
        "max_length": checkpoint.max_length or checkpoint.config.encoder.max_positions,
        "matryoshka_dims": checkpoint.matryoshka_dims,
    }


def _common(trainings: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Returns the records that all begin with."""
    common = []
    for records in zip(*trainings):
        if any(record != records[0] for record in records):
            break
        common.append(records[0])
    return common

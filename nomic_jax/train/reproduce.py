"""Trains a stage again from the record in its checkpoint, and compares the two results bit for bit."""

import dataclasses
import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from nomic_jax.hf.files import check_file
from nomic_jax.hf.hub import is_hub_name, split_revision
from nomic_jax.run.average import average
from nomic_jax.run.manifest import find_damage, stored_bytes
from nomic_jax.run.pretrained import Weights, check_sizes, explained
from nomic_jax.run.record import changed_environment, check_format, describe_environment, parse_model
from nomic_jax.run.workdir import DamagedCheckpoint
from nomic_jax.train.config import CheckpointConfig, ConfigurationError, EvaluationConfig, TrainConfig
from nomic_jax.train.loop import train
from nomic_jax.train.sharding import make_mesh, replicated


class Reproduction(NamedTuple):
    """Attributes:
    step: step of the checkpoint.
    expected, found: SHA-256 of all arrays (parameters, optimizer state, step) of the checkpoint and of the repetition.
    differing: array -> norm of the difference as a share of the array's norm.
    environment_changes: versions, devices and code that differ from those of the original run.
    """

    step: int
    expected: str
    found: str
    differing: dict[str, float]
    environment_changes: list[str]

    @property
    def identical(self) -> bool:
        return self.expected == self.found


def reproduce(
    checkpoint: str | Path,
    workdir: str | Path,
    *,
    mixture: str = "",
    init_from: str = "",
    guide: str = "",
    cache_dir: str = "",
    recorded_paths: bool = False,
) -> Reproduction:
    """Trains from the start to the step of a checkpoint of a run, in another working directory.

    The tokenizer is the one in the run. The record of a stranger's run may name any file of this machine, so its other
    paths are opened only where the caller asks for it.

    Args:
      checkpoint: <workdir of the run>/checkpoints/<step>, or a link to it.
      workdir: working directory of the repetition; an interrupted repetition is resumed.
      mixture, init_from, guide: where the data, the initial model and the guide of the loss are. Data with other
        content are refused, because the record holds their fingerprint.
      cache_dir: folder for the tokenised data; by default one beside ``workdir``, never that of the record.
      recorded_paths: open the paths that the record names, where an argument does not replace them.

    Raises:
      DamagedCheckpoint, ConfigurationError, ResumeError: the checkpoint cannot be reproduced; the message says why.
    """
    path = Path(checkpoint).resolve()
    if path.parent.name != "checkpoints" or not path.is_dir():
        raise ConfigurationError(f"{checkpoint} is not a checkpoint; give RUN/checkpoints/STEP, or RUN/best")
    if problem := find_damage(path):
        raise DamagedCheckpoint(f"{path}: {problem}")
    if members := _members(path):
        return _average_again(path, members, workdir, recorded_paths)
    record, config = _read_record(path)
    given = {"mixture": mixture, "init_from": init_from, "guide": guide}
    named = {"mixture": config.data.mixture, "init_from": config.init_from, "guide": config.loss.guide}
    places = {what: given[what] or named[what] for what in named}
    foreign = [what for what in named if named[what] and not given[what]]
    if foreign and not recorded_paths:
        raise ConfigurationError(
            f"the record names files outside of the run: {', '.join(f'{what} {named[what]!r}' for what in foreign)}. "
            f"If the run is yours, or you trust it, write --recorded_paths to open them; or say where your copies are "
            f"with {', '.join(f'--{what}' for what in foreign)}"
        )
    if is_hub_name(places["init_from"]):
        # The branch may have moved. The folder of a model of the hub has the name of its commit.
        commit = Path((record["parent"] or {}).get("path", "")).name
        places["init_from"] = f"{split_revision(places['init_from'])[0]}@{commit}"
    elif places["init_from"] and not Path(places["init_from"]).exists():
        raise ConfigurationError(
            f"the run started from {places['init_from']}, which is not here; say where it is with --init_from"
        )
    devices = jax.devices()
    if len(devices) < record["device_count"]:
        raise ConfigurationError(
            f"the run had {record['device_count']} devices, here are {len(devices)}: the last bits of a sum depend on "
            f"their number. On a CPU, JAX_NUM_CPU_DEVICES={record['device_count']} provides them"
        )
    step = record["step"]
    data: dict[str, Any] = {"mixture": places["mixture"], "tokenizer": str(path.parent.parent)}
    if hasattr(config.data, "cache_dir"):
        data["cache_dir"] = cache_dir or f"{Path(workdir).absolute()}-tokens"
    config = dataclasses.replace(
        config,
        init_from=places["init_from"],
        loss=dataclasses.replace(config.loss, guide=places["guide"]),
        data=dataclasses.replace(config.data, **data),
        # Saving, logging and evaluating do not change the steps.
        checkpoint=CheckpointConfig(every=config.checkpoint.every, keep=1),
        evaluation=EvaluationConfig(),
        wandb="",
        trackio="",
        profile="",
    )
    if not step and config.steps:
        raise DamagedCheckpoint(f"{path}: a run of {config.steps} steps does not save step 0")
    train(config, workdir, devices[: record["device_count"]], stop=step or None, repeated=record)
    again = Path(workdir).absolute() / "checkpoints" / str(step)
    expected, found = _arrays(path), _arrays(again)
    return Reproduction(
        step,
        _sha256(expected),
        _sha256(found),
        dict(_differences(expected, found)),
        changed_environment(record, describe_environment())
        + [f"config.deterministic is off, so a {devices[0].device_kind} computes other last bits in every run"]
        * (devices[0].platform == "gpu" and not config.deterministic),
    )


def _members(path: Path) -> list[dict[str, Any]]:
    """Returns the members of the average that a checkpoint is; [] if it is none."""
    with explained(path, "record"):
        return list(dict(ocp.checkpointables_metadata(path).custom_metadata or {}).get("average", []))


def _average_again(
    path: Path, members: list[dict[str, Any]], workdir: str | Path, recorded_paths: bool
) -> Reproduction:
    if not recorded_paths:
        raise ConfigurationError(
            f"the record names the averaged checkpoints: {', '.join(repr(member['path']) for member in members)}. If "
            f"the average is yours, or you trust it, write --recorded_paths to open them"
        )
    with explained(path, "record"):
        paths = [member["path"] for member in members]
        shares = [member["share"] for member in members]
        weights: Weights | None = "raw" if any(member.get("weights") == "raw" for member in members) else None
    again = average(paths, workdir, shares=shares, weights=weights)
    for before, now in zip(members, again):
        if before["sha256"] != now["sha256"]:
            raise ConfigurationError(
                f"{before['path']}: its sha256 is {now['sha256'][:16]}, it had {before['sha256'][:16]}; the average "
                f"was of another checkpoint"
            )
    expected, found = _arrays(path), _arrays(Path(workdir).absolute() / "checkpoints" / "0")
    differing = dict(_differences(expected, found))
    return Reproduction(0, _sha256(expected), _sha256(found), differing, [])


def _read_record(path: Path) -> tuple[dict[str, Any], TrainConfig]:
    """Returns the record of a checkpoint and its settings, with the types that a repetition needs.

    Raises:
      DamagedCheckpoint: the record has other types, or does not describe the arrays of the checkpoint.
      ConfigurationError: the checkpoint was imported, or its settings cannot be used.
    """
    with explained(path, "record"):
        saved = ocp.checkpointables_metadata(path)
        record = dict(saved.custom_metadata or {})
    check_format(record, path)
    if "config" not in record:
        raise ConfigurationError(f"{path} was imported, not trained")
    for field, least, most in (("step", 0, 1 << 53), ("device_count", 1, 1 << 20)):
        value = record.get(field)
        if type(value) is not int or not least <= value <= most:
            raise DamagedCheckpoint(f"{path}: its record has the {field} {value!r:.100}; expected a whole number")
    if record["step"] != int(path.name):
        raise DamagedCheckpoint(f"{path}: its record is that of step {record['step']}")
    if not isinstance(record.get("data_fingerprint"), str):
        raise DamagedCheckpoint(f"{path}: its record has no data_fingerprint")
    for name in ("tokenizer.json", "special_tokens_map.json"):
        if (path.parent.parent / name).exists():
            check_file(path.parent.parent / name)
    config = TrainConfig.from_mapping(record["config"])
    with explained(path, "record"):
        model = parse_model(record)
        check_sizes(record, model, saved.metadata, stored_bytes(path))
    trained = dataclasses.replace(model.encoder, **{name: getattr(config.model, name) for name in _FREE_OF_MODEL})
    if not config.init_from and trained != config.model:
        raise DamagedCheckpoint(f"{path}: config.model of its record is another model than that of its arrays")
    return record, config


# Fields of the model that a stage takes from its settings, also where its weights come from another model.
_FREE_OF_MODEL = ("dtype", "attention", "recompute", "norm_kernel")


def hash_state(checkpoint: str | Path) -> str:
    """SHA-256 of all arrays of a checkpoint of a run: parameters, optimizer state, step."""
    return _sha256(_arrays(Path(checkpoint).absolute()))


def _arrays(checkpoint: Path) -> dict[str, np.ndarray]:
    # Onto one device: the sharding in the file needs the original number of devices.
    sharding = replicated(make_mesh(jax.local_devices()[:1]))
    saved = ocp.checkpointables_metadata(checkpoint).metadata
    abstract = {
        name: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), saved[name])
        for name in ("params", "training", "ema")
        if name in saved
    }
    trees = ocp.load_checkpointables(checkpoint, abstract)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in jax.tree.leaves_with_path(trees)
    }


def _sha256(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _differences(expected: dict[str, Any], found: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for name, array in expected.items():
        if not np.array_equal(array, found[name], equal_nan=True):
            exact = array.astype(np.float64)
            norm = float(np.linalg.norm(exact))
            yield name, float(np.linalg.norm(exact - found[name])) / norm if norm else math.inf

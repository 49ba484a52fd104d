"""Reads the weights of a run, of one of its checkpoints, or of a Hugging Face directory."""

import contextlib
import dataclasses
import json
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from nomic_jax.data.tokens.tokenizer import LARGEST_FILE, Tokenizer
from nomic_jax.files.folders import make_folder
from nomic_jax.files.merging import READY
from nomic_jax.files.reading import read_json
from nomic_jax.hf import Checkpoint, CheckpointError, read_checkpoint
from nomic_jax.hf.adapters.files import ADAPTER, base_of, merged
from nomic_jax.hf.adapters.lora import Adapter, abstract_adapter
from nomic_jax.hf.files import MAIN_FILE, check_file
from nomic_jax.hf.hub import download, is_hub_name, pinned
from nomic_jax.model import EmbeddingConfig
from nomic_jax.model.heads import abstract_classifier, abstract_embedder, abstract_mlm_head
from nomic_jax.run.manifest import MANIFEST, find_damage, follow, hash_files, model_files, stored_bytes
from nomic_jax.run.record import (
    FORMAT,
    check_format,
    check_same_arrays,
    model_fields,
    parse_import,
    parse_model,
    trained_matryoshka_dims,
    trained_prompts,
)
from nomic_jax.run.workdir import (
    DamagedCheckpoint,
    best_step,
    commit,
    finished_steps,
    latest_intact,
    list_damage,
    remove_parts,
    used_workdir,
)

# Arrays of real checkpoints are up to four times as large as their files: the optimizer's start as zeros.
LARGEST_RATIO = 32
# Of a run with ``config.optim.ema``: the moving average of its weights, or the weights after its last update.
Weights = Literal["ema", "raw"]


def read_pretrained(path: str | Path, weights: Weights | None = None) -> Checkpoint:
    """Reads a run, one of its checkpoints (``best`` too), a Hugging Face directory, or a model of the hub.

    Of a run's working directory, it reads the best checkpoint if the run was evaluated, and warns if that is not the
    latest one; else the latest. If that one is damaged, it warns and reads the latest sound one. A model of the hub is
    ORGANISATION/NAME or ORGANISATION/NAME@REVISION.

    Args:
      path: what to read.
      weights: which weights of a run; None for the average of a run that has one.

    Raises:
      FileNotFoundError: ``path`` is none of these.
      DamagedCheckpoint: the checkpoint at ``path``, or every checkpoint of the run, is damaged.
      ValueError: ``weights`` is "ema", and there is no average.
    """
    if is_hub_name(path):
        _check_average(path, weights, exists=False)
        return read_checkpoint(download(str(path)))
    path = Path(path)
    named, path = path, follow(path)
    path = path if named.is_symlink() else named
    if (path / "checkpoints").is_dir():
        return _read_run(path, None, weights)
    # An export in progress removes the main file, but only while READY exists.
    if any((path / name).exists() for name in (MAIN_FILE, ADAPTER, READY, MAIN_FILE, ADAPTER)):
        _check_average(path, weights, exists=False)
        return read_checkpoint(path)
    if path.parent.name == "checkpoints" and path.name.isdigit() and path.is_dir():
        return _read_run(path.parent.parent, int(path.name), weights)
    raise FileNotFoundError(
        f"{path} is neither the working directory of a run, nor a checkpoint in it, nor a Hugging Face directory"
    )


def _check_average(path: str | Path, weights: Weights | None, *, exists: bool) -> None:
    if weights == "ema" and not exists:
        raise ValueError(f"{path} has no moving average of its weights; runs with config.optim.ema have one")


def resolve(path: str | Path) -> Path:
    """Returns the folder that ``read_pretrained`` reads now: of a run, the checkpoint.

    A run that still trains writes more, and a branch of the hub moves: for a model of the hub, it returns its name with
    the commit. What is returned reads the same weights later, and in every process.
    """
    if is_hub_name(path):
        return Path(pinned(str(path)))
    named = Path(path)
    path = follow(named)
    if not (path / "checkpoints").is_dir():
        return path if named.is_symlink() else named
    try:
        step = _chosen_step(path)
    except (DamagedCheckpoint, FileNotFoundError):  # ``read_pretrained`` says why
        return path
    return path / "checkpoints" / str(step)


def at_step(path: str | Path, step: str) -> Path:
    """Returns the checkpoint of a run that a flag --step names; without one, ``path`` itself.

    Args:
      path: the working directory of a run, if ``step`` is given.
      step: "best" (in the evaluations), "last", a number, or "" for none.

    Raises:
      ValueError: ``path`` is no run, ``step`` is none of these, or the run was not evaluated.
      FileNotFoundError: the run has no such checkpoint; the message lists those that it has.
      DamagedCheckpoint: it has no sound checkpoint.
    """
    if not step:
        return Path(path)
    workdir = follow(path)
    directory = workdir / "checkpoints"
    if not directory.is_dir():
        raise ValueError(f"--step={step} is for the working directory of a run, and {path} is none; leave it out")
    if step == "last":
        return directory / str(_latest_step(workdir))
    if step == "best" and (found := best_step(workdir)) is not None:
        return directory / str(found)
    if step == "best":
        raise ValueError(f"{path} has no best checkpoint, because it was not evaluated; write --step=last")
    if not step.isdecimal():
        raise ValueError(f"--step={step}: write best, last, or the number of a step")
    if not (directory / str(int(step))).is_dir():
        steps = ", ".join(map(str, finished_steps(directory))) or "none"
        raise FileNotFoundError(f"{path} has no checkpoint of step {step}; it has {steps}")
    return directory / str(int(step))


def _chosen_step(workdir: Path) -> int:
    """Returns the step of a run that is read if none is named: the best one if the run was evaluated, else the latest.

    Raises:
      DamagedCheckpoint, FileNotFoundError: there is no sound checkpoint.
    """
    best = best_step(workdir)
    if best is None:
        step = _latest_step(workdir)
        if (workdir / "evaluation.jsonl").exists():
            warnings.warn(f"{workdir} was evaluated, but has no {workdir / 'best'}; reading step {step}", stacklevel=1)
        return step
    problem = find_damage(workdir / "checkpoints" / str(best))
    if problem:
        step = _latest_step(workdir)
        warnings.warn(f"{workdir / 'best'}: {problem}; reading step {step} instead", stacklevel=1)
        return step
    last = max(finished_steps(workdir / "checkpoints"))
    if best != last:
        warnings.warn(
            f"{workdir}: reading step {best}, the best in its evaluations, not the last one, {last} (--step=last, or "
            f"{workdir}/checkpoints/{last})",
            stacklevel=1,
        )
    return best


def _latest_step(workdir: Path) -> int:
    """Returns the latest sound checkpoint of a run, and warns of damaged later ones."""
    directory = (workdir / "checkpoints").absolute()
    step, damaged = latest_intact(directory)
    if damaged and step is None:
        raise DamagedCheckpoint(f"{directory} holds no sound checkpoint: {list_damage(damaged)}")
    if damaged:
        warnings.warn(f"{list_damage(damaged)}; reading step {step} instead", stacklevel=1)
    if step is None:
        raise FileNotFoundError(f"{directory} holds no finished checkpoint")
    return step


def identify(path: str | Path) -> dict[str, Any]:
    """Returns the path, the step (only for a run) and a hash of the files that ``read_pretrained`` reads at ``path``.

    For a checkpoint of a run, the hash is that of its manifest, which holds the hashes of its files. For a Hugging Face
    directory, the same kind of hash is computed from its configuration, tokenizer, modules and weights: from all that
    changes a vector.
    """
    path = download(str(path)) if is_hub_name(path) else follow(path)
    if (path / "checkpoints").is_dir():
        path = path / "checkpoints" / str(_chosen_step(path))
    if path.parent.name == "checkpoints":
        manifest = read_json(path / MANIFEST, within=path)
        return {"path": str(path), "step": int(path.name), "sha256": manifest["sha256"]}
    identity: dict[str, Any] = {"path": str(path), "sha256": hash_files(path, model_files(path))}
    if (path / ADAPTER).exists():
        identity["base"] = identify(base_of(path))
    return identity


def _read_run(workdir: Path, step: int | None, weights: Weights | None) -> Checkpoint:
    from orbax.checkpoint import v1 as ocp  # takes seconds to import, and only runs need it

    directory = (workdir / "checkpoints").absolute()
    if step is not None:
        problem = find_damage(directory / str(step))
        if problem:
            others = ", ".join(str(other) for other in finished_steps(directory) if other != step)
            raise DamagedCheckpoint(f"{directory / str(step)}: {problem}; the other steps are: {others or 'none'}")
    else:
        step = _chosen_step(workdir)
    path = directory / str(step)
    # The hashes match. Any fault found from here on was written that way, by another program or with intent.
    with explained(path, "metadata"):
        saved = ocp.checkpointables_metadata(path)
        record = dict(saved.custom_metadata or {})
        json.dumps(record, ensure_ascii=False).encode()  # rejects unpaired surrogates, which are not text
    check_format(record, path)
    with explained(path, "record"):
        model = parse_model(record)
    # What trained it computed norms with is of that machine. A run that goes on takes it from the record.
    model = dataclasses.replace(model, encoder=dataclasses.replace(model.encoder, norm_kernel="auto"))
    has_average = "ema" in dict(saved.metadata)
    _check_average(path, weights, exists=has_average)
    with explained(path, "arrays"):
        # Check before reading the arrays, because memory is allocated for the sizes that the record states.
        abstract = check_sizes(record, model, saved.metadata, stored_bytes(path))
        sharding = SingleDeviceSharding(jax.local_devices()[0])
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), abstract)
        trees = {"params": abstract}
        if has_average and weights != "raw":
            # The average of an adapter does not have its base. A tree is read as a whole.
            trees = (trees if "lora" in abstract else {}) | {"ema": _trained(abstract)}
        loaded = ocp.load_checkpointables(path, trees)
        params = loaded.get("params", {}) | loaded.get("ema", {})
        params.pop("projection", None)  # to a teacher's width: of the loss, not of the model
    try:
        for name in ("tokenizer.json", "special_tokens_map.json"):
            if (workdir / name).exists():
                check_file(workdir / name, limit=LARGEST_FILE)
        tokenizer = Tokenizer.from_directory(workdir)
    except (KeyboardInterrupt, SystemExit, FileNotFoundError, CheckpointError):
        raise
    except BaseException as error:  # the tokenizers package raises bare Exceptions, and BaseExceptions when it panics
        raise DamagedCheckpoint(f"{workdir / 'tokenizer.json'}: the tokenizer cannot be read ({error})") from error
    if tokenizer.sha256 != (trained_with := str(record.get("tokenizer_sha256", tokenizer.sha256))):
        raise DamagedCheckpoint(
            f"{workdir / 'tokenizer.json'} is damaged or is another tokenizer: step {step} was trained with "
            f"{trained_with[:16]}, this one is {tokenizer.sha256[:16]}; restore the right file"
        )
    if tokenizer.vocab_size > model.encoder.vocab_size:
        raise DamagedCheckpoint(
            f"{workdir / 'tokenizer.json'} produces ids up to {tokenizer.vocab_size - 1}, but the embedding table of "
            f"step {step} has {model.encoder.vocab_size} rows; restore the right file"
        )
    with explained(path, "record"):
        earlier = record.pop("earlier")
        if not isinstance(earlier, list) or not all(isinstance(stage, dict) for stage in earlier):
            raise ValueError("earlier should be a list of records")
        read = Checkpoint(model, jax.device_get(params), tokenizer, training=tuple(earlier))
        if "imported" in record:
            read = dataclasses.replace(read, **parse_import(record["imported"], model))
            averaged = {name: record[name] for name in ("average",) if name in record}
            return dataclasses.replace(read, training=(*read.training, averaged)) if averaged else read
        if has_average:
            record["weights"] = "ema" if "ema" in trees else "raw"
        if "lora" in params:
            read = merged(read, _adapter(record, read.params))
        return dataclasses.replace(
            read,
            prompts=trained_prompts(record),
            matryoshka_dims=trained_matryoshka_dims(record),
            training=(*read.training, record),
        )


def check_sizes(record: dict[str, Any], model: EmbeddingConfig, saved: Any, stored: int) -> dict[str, Any]:
    """Returns the parameters that a record describes, as shapes and types.

    Args:
      record: the record of a checkpoint.
      model: see ``parse_model``.
      saved: the checkpoint's metadata: trees of shapes and types.
      stored: size of its files in bytes.

    Raises:
      ResumeError: the checkpoint's arrays are others.
      ValueError: they are far larger than its files. Other exceptions: the record has fields of another type.
    """
    abstract: dict[str, Any] = {"encoder": abstract_embedder(model)}
    if record["has_mlm_head"]:
        abstract["mlm_head"] = abstract_mlm_head(model.encoder)
    if record.get("has_temperature") or record.get("config", {}).get("loss", {}).get("learn_temperature"):
        abstract["temperature"] = {"log_scale": jax.ShapeDtypeStruct((), jnp.float32)}
    if teacher_width := _projection(record):
        abstract["projection"] = {
            "kernel": jax.ShapeDtypeStruct((model.output_dim, teacher_width), jnp.float32),
            "bias": jax.ShapeDtypeStruct((teacher_width,), jnp.float32),
        }
    if num_labels := record.get("num_labels", 0):
        abstract["classifier"] = abstract_classifier(model.encoder, num_labels)
    lora = record.get("config", {}).get("lora", {})
    if lora.get("rank"):
        abstract["lora"] = abstract_adapter(model.encoder, tuple(lora["target_modules"]), lora["rank"])
    check_same_arrays({"params": saved["params"]}, {"params": abstract})
    if "ema" in dict(saved):
        check_same_arrays({"ema": saved["ema"]}, {"ema": _trained(abstract)})
    # Missing parts of an array are read as zeros, so that a few bytes can stand for an array of any size.
    size = sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(dict(saved)))
    if size > LARGEST_RATIO * stored + 2**20:
        raise ValueError(f"its arrays would take {size:,} bytes, its files have {stored:,}")
    return abstract


def _projection(record: dict[str, Any]) -> int:
    """Returns the components that the loss of a run projects embeddings to; 0 if it does not."""
    config = record.get("config", {})
    return int(config["loss"].get("projection_dim", 0)) if config.get("stage") in ("contrastive", "finetune") else 0


def _trained(params: dict[str, Any]) -> dict[str, Any]:
    """Returns the parameters that a run trains: all, or with an adapter all but the encoder."""
    return {name: part for name, part in params.items() if name != "encoder" or "lora" not in params}


def _adapter(record: dict[str, Any], params: dict[str, Any]) -> Adapter:
    lora = record["config"]["lora"]
    base = str(record["config"]["init_from"])
    return Adapter(params["lora"], lora["rank"], float(lora["alpha"]), bool(lora["rslora"]), base)


@contextlib.contextmanager
def explained(path: Path, what: str) -> Iterator[None]:
    """Reports errors caused by invalid content as DamagedCheckpoint. They occur if another program wrote the files."""
    try:
        yield
    except (DamagedCheckpoint, OSError):
        raise
    except Exception as error:
        reason = str(error).strip().partition("\n")[0][:300]
        raise DamagedCheckpoint(f"{path}: its {what} cannot be used ({type(error).__name__}: {reason})") from error


def write_pretrained(workdir: str | Path, source: Checkpoint, average: list[dict[str, Any]] | None = None) -> None:
    """Writes weights as a working directory with one checkpoint, which ``read_pretrained`` and ``init_from`` accept.

    A classifier is omitted, because it belongs to one task.

    Args:
      workdir: a new or empty folder.
      source: the weights.
      average: what they are the average of, see ``nomic_jax.run.average``.

    Raises:
      FileExistsError: the directory already holds checkpoints.
      FileRefused: it holds something else than a run.
    """
    from orbax.checkpoint import v1 as ocp  # takes seconds to import, and only runs need it

    workdir = Path(workdir)
    if source.tokenizer is None:
        raise ValueError("the checkpoint has no tokenizer; a run needs the tokenizer of its embeddings")
    imported = ("prompts", "default_prompt_name", "similarity", "max_length", "matryoshka_dims")
    record = {
        "format": FORMAT,
        "model": model_fields(source.config),
        "has_mlm_head": "mlm_head" in source.params,
        "has_temperature": "temperature" in source.params,
        "tokenizer_sha256": source.tokenizer.sha256,
        "earlier": list(source.training),
        "imported": {name: getattr(source, name) for name in imported},
        "step": 0,
    } | ({"average": average} if average else {})
    params = {name: part for name, part in source.params.items() if name != "classifier"}
    with used_workdir(workdir):
        if finished_steps(workdir / "checkpoints"):
            raise FileExistsError(f"{workdir} already holds checkpoints; choose another directory")
        make_folder(workdir / "checkpoints")
        remove_parts(workdir / "checkpoints")
        source.tokenizer.save(workdir)
        part = (workdir / "checkpoints" / "0.part").absolute()
        ocp.save_checkpointables(part, {"params": params}, custom_metadata=record, overwrite=True)
        commit(part)

"""Checkpoints of a run, and the weights of whatever a run can start from.

A working directory holds

    config.json          the resolved configuration
    tokenizer.json       the tokenizer that made the tokens
    metrics.jsonl        one line every config.log_every steps
    goodput.json         where the time went, over all restarts
    evaluation.jsonl     the scores of each evaluation
    skipped.jsonl        the steps whose loss or gradient was not finite, if there were any
    checkpoints/<step>/  orbax: `params`, `training` (step, optimizer state), and a record of config, data and versions;
                         SHA-256 of every file, see ``nomic_jax.train.manifest``
    best                 a link to the checkpoint with the best evaluation figure, if there are evaluations
    rejected/<step>/     checkpoints with a damaged file, moved out of the way of a run that went on from an earlier one

The place in the data is the step, because a stream is a function of it; the record's fingerprint says of which stream.

A checkpoint is written as checkpoints/<step>.part, hashed, and renamed: under its own name it is finished. Its hashes
are checked before it is read.
"""

import contextlib
import dataclasses
import itertools
import json
import shutil
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from nomic_jax.data.tokenizer import Tokenizer
from nomic_jax.hf import Checkpoint, CheckpointError, read_checkpoint
from nomic_jax.hf.files import check_file
from nomic_jax.model import abstract_encoder
from nomic_jax.model.heads import abstract_classifier, abstract_mlm_head
from nomic_jax.train import hosts
from nomic_jax.train.config import CheckpointConfig
from nomic_jax.train.loss import init_temperature
from nomic_jax.train.manifest import MANIFEST, find_damage, hash_files, weight_files, write_manifest
from nomic_jax.train.record import (
    FORMAT,
    check_format,
    check_same_arrays,
    check_same_run,
    import_of,
    model_of,
    trained_prompts,
)
from nomic_jax.train.sharding import make_mesh, replicated
from nomic_jax.train.state import TrainState


class DamagedCheckpoint(CheckpointError):
    """No checkpoint, or not the one that was asked for, is as it was written; the message names the files."""


class SaveError(OSError):
    """A checkpoint could not be written; the message says where, why, and what is left to go on from."""


class Checkpoints:
    """The checkpoints of one working directory, for the run in it.

    On opening, what a killed run left unfinished is removed, and checkpoints that are damaged and newer than the latest
    sound one are moved aside, with a warning.

    Attributes:
      latest_step: of the latest sound checkpoint, that under way included; None if there is none at all.
      best_step: the one that is never pruned, and that <workdir>/best is a link to; None if there is none.

    Raises:
      DamagedCheckpoint: there are checkpoints, and none is sound; they stay where they are.
    """

    def __init__(self, workdir: Path, config: CheckpointConfig, record: dict[str, Any]):
        self.record, self._config = record, config
        self._directory = (workdir / "checkpoints").absolute()
        self.best_step: int | None = None
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._saving: Future[None] | None = None
        # By one process: others would find gone what it moves.
        self.latest_step: int | None = hosts.of_first(self._open)

    def _open(self) -> int | None:
        self._directory.mkdir(parents=True, exist_ok=True)
        for path in self._directory.glob("*.part*"):
            shutil.rmtree(path, ignore_errors=True)
        step, damaged = _latest_sound(self._directory)
        if damaged and step is None:
            raise DamagedCheckpoint(
                f"{self._directory} holds no sound checkpoint: {_list(damaged)}. "
                f"Fetch one again, or take another --workdir to start from the beginning"
            )
        if damaged:
            warnings.warn(f"{_list(damaged)}; going on from step {step}", stacklevel=1)
        for bad in damaged:
            _move_aside(self._directory / str(bad))
        return step

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.wait()
        elif issubclass(kind, Exception):
            # What is being written will be of use; the error to hear of is the one that ends the run.
            with contextlib.suppress(OSError):
                self.wait()
        self._executor.shutdown(wait=False)

    def is_due(self, step: int) -> bool:
        return step % self._config.every == 0

    def save(self, step: int, state: TrainState) -> None:
        """Copies the state off the devices and writes it in the background, unless the step is saved already.

        Raises:
          SaveError: of this checkpoint or of the one before, which is waited for.
        """
        self.wait()
        if step == self.latest_step:
            return
        self.latest_step = step
        checkpointables = {"params": state.params, "training": {"step": state.step, "opt_state": state.opt_state}}
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(checkpointables))
        part = self._directory / f"{step}.part"
        with self._explained(step, size):
            metadata = self.record | {"step": step}
            response = ocp.save_checkpointables_async(part, checkpointables, custom_metadata=metadata)
        self._saving = self._executor.submit(self._finish, step, size, part, response)

    def _finish(self, step: int, size: int, part: Path, response: ocp.AsyncResponse[None]) -> None:
        """Runs beside the training: neither the writing nor the hashing holds Python's lock."""
        with self._explained(step, size):
            response.result()
            if hosts.is_first():
                _commit(part)
        if hosts.is_first():
            # Only now: until its hashes are written, the new checkpoint is none.
            self._prune()
            self._link_best()

    def _prune(self) -> None:
        every = self._config.keep_every
        for step in _steps(self._directory)[: -self._config.keep]:
            if step != self.best_step and not (every and step and step % every == 0):
                # By a rename first: a kill must not leave half a checkpoint under the name of a whole one.
                old = (self._directory / str(step)).rename(self._directory / f"{step}.old.part")
                shutil.rmtree(old, ignore_errors=True)

    def _link_best(self) -> None:
        if self.best_step is None or not (self._directory / str(self.best_step)).is_dir():
            return
        link = self._directory.parent / "best"
        new = link.with_name("best.part")
        new.unlink(missing_ok=True)
        new.symlink_to(Path("checkpoints") / str(self.best_step))
        new.rename(link)

    @contextlib.contextmanager
    def _explained(self, step: int, size: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            free = shutil.disk_usage(self._directory.parent).free
            if hosts.is_first():
                for path in self._directory.glob(f"{step}.part*"):
                    shutil.rmtree(path, ignore_errors=True)
            left = _steps(self._directory)
            # Orbax and tensorstore add what they were given, at length, in brackets and further lines.
            reason = str(error).strip().partition("\n")[0].partition(" [")[0][:300]
            raise SaveError(
                f"step {step} could not be saved to {self._directory} ({reason}): it takes up to {_megabytes(size)}, "
                f"{_megabytes(free)} are free there; "
                + (f"the same command goes on from step {left[-1]}" if left else "there is no earlier checkpoint")
            ) from error

    def check(self) -> None:
        """Raises SaveError if what was being written has failed; called every step, so that it is not for long."""
        if self._saving is not None and self._saving.done():
            self.wait()

    def wait(self) -> None:
        """Until nothing is being written.

        Raises:
          SaveError: it failed.
        """
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def check_same_run(self) -> None:
        """Before anything is compiled.

        Raises:
          ResumeError: the latest checkpoint was made from other data, another tokenizer or another configuration.
        """
        if self.latest_step is not None:
            path = self._directory / str(self.latest_step)
            check_same_run(dict(ocp.checkpointables_metadata(path).custom_metadata or {}), self.record, path)

    def restore(self, state: TrainState) -> TrainState:
        """The latest checkpoint, placed like ``state``.

        Raises:
          ResumeError: another optimizer made it, or another model.
        """
        path = self._directory / str(self.latest_step)
        saved = ocp.checkpointables_metadata(path)
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        wanted = {"params": abstract.params, "training": {"step": abstract.step, "opt_state": abstract.opt_state}}
        check_same_arrays(saved.metadata, wanted)
        loaded = ocp.load_checkpointables(path, wanted)
        return TrainState(loaded["training"]["step"], loaded["params"], loaded["training"]["opt_state"])


def _commit(part: Path) -> None:
    write_manifest(part)
    part.rename(part.with_suffix(""))


def _steps(directory: Path) -> list[int]:
    """Of the finished checkpoints, in order."""
    return sorted(int(path.name) for path in directory.glob("*") if path.name.isdecimal() and path.is_dir())


def _latest_sound(directory: Path) -> tuple[int | None, dict[int, str]]:
    """(the latest step whose files are as they were written, what is wrong with each one after it)."""
    damaged: dict[int, str] = {}
    for step in reversed(_steps(directory)):
        problem = find_damage(directory / str(step))
        if problem is None:
            return step, damaged
        damaged[step] = f"{directory / str(step)}: {problem}"
    return None, damaged


def _list(damaged: dict[int, str]) -> str:
    return "; ".join(damaged.values())


def _move_aside(path: Path) -> None:
    rejected = path.parent.parent / "rejected"
    rejected.mkdir(exist_ok=True)
    names = (f"{path.name}{f'-{i}' if i else ''}" for i in itertools.count())
    path.rename(next(rejected / name for name in names if not (rejected / name).exists()))


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def read_pretrained(path: str | Path) -> Checkpoint:
    """From a run's working directory (its latest checkpoint), one of its checkpoints (``best`` too), or a Hugging Face
    directory.

    What is wrong with a run's latest checkpoints is warned of, and the latest sound one taken.

    Raises:
      FileNotFoundError: none of these is at ``path``.
      DamagedCheckpoint: the checkpoint that ``path`` names, or every one of the run, is damaged.
    """
    path = Path(path)
    path = path.resolve() if path.is_symlink() else path
    if (path / "checkpoints").is_dir():
        return _read_run(path, None)
    if path.parent.name == "checkpoints" and path.name.isdigit() and path.is_dir():
        return _read_run(path.parent.parent, int(path.name))
    if (path / "config.json").exists():
        return read_checkpoint(path)
    raise FileNotFoundError(
        f"{path} is neither the working directory of a run, nor a checkpoint in it, nor a Hugging Face directory"
    )


def identify(path: str | Path) -> dict[str, Any]:
    """Of what ``read_pretrained`` reads at ``path``: where it is, its step if it is of a run, and a hash of its files.

    The hash is that of a checkpoint's manifest, which holds those of its files; of a Hugging Face directory the same is
    made from its configuration, tokenizer and weights.
    """
    path = Path(path).resolve()
    if (path / "checkpoints").is_dir():
        step, _ = _latest_sound(path / "checkpoints")
        path = path / "checkpoints" / str(step)
    if path.parent.name == "checkpoints":
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        return {"path": str(path), "step": int(path.name), "sha256": manifest["sha256"]}
    return {"path": str(path), "sha256": hash_files(path, weight_files(path))}


def _read_run(workdir: Path, step: int | None) -> Checkpoint:
    directory = (workdir / "checkpoints").absolute()
    if step is not None:
        problem = find_damage(directory / str(step))
        if problem:
            others = ", ".join(str(other) for other in _steps(directory) if other != step)
            raise DamagedCheckpoint(f"{directory / str(step)}: {problem}; there are also the steps: {others or 'none'}")
    else:
        step, damaged = _latest_sound(directory)
        if damaged and step is None:
            raise DamagedCheckpoint(f"{directory} holds no sound checkpoint: {_list(damaged)}")
        if damaged:
            warnings.warn(f"{_list(damaged)}; taking step {step} instead", stacklevel=1)
    if step is None:
        raise FileNotFoundError(f"{directory} holds no finished checkpoint")
    path = directory / str(step)
    # The hashes were right: what is wrong from here on was written so, by another program or with intent.
    with _explained(path, "metadata"):
        saved = ocp.checkpointables_metadata(path)
        record = dict(saved.custom_metadata or {})
        json.dumps(record, ensure_ascii=False).encode()  # half a surrogate pair is no text
    check_format(record, path)
    with _explained(path, "record"):
        model = model_of(record)
        abstract = {"encoder": abstract_encoder(model.encoder)}
        if record["has_mlm_head"]:
            abstract["mlm_head"] = abstract_mlm_head(model.encoder)
        if record.get("config", {}).get("loss", {}).get("learn_temperature"):
            abstract["temperature"] = jax.eval_shape(lambda: init_temperature(1.0))
        if num_labels := record.get("num_labels", 0):
            abstract["classifier"] = abstract_classifier(model.encoder, num_labels)
    with _explained(path, "arrays"):
        # Before any is read: their sizes are in the record, and memory is taken for what it says.
        check_same_arrays({"params": saved.metadata["params"]}, {"params": abstract})
        sharding = replicated(make_mesh(jax.local_devices()[:1]))
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), abstract)
        params = ocp.load_checkpointables(path, {"params": abstract})["params"]
    try:
        if (workdir / "tokenizer.json").exists():
            check_file(workdir / "tokenizer.json")
        tokenizer = Tokenizer.from_directory(workdir)
    except (KeyboardInterrupt, SystemExit, FileNotFoundError, CheckpointError):
        raise
    except BaseException as error:  # the tokenizers package raises bare Exceptions, and BaseExceptions where it panics
        raise DamagedCheckpoint(f"{workdir / 'tokenizer.json'}: the tokenizer cannot be read ({error})") from error
    if tokenizer.sha256 != (trained_with := str(record.get("tokenizer_sha256", tokenizer.sha256))):
        raise DamagedCheckpoint(
            f"{workdir / 'tokenizer.json'} is damaged or another: step {step} was trained with the tokenizer "
            f"{trained_with[:16]}, this one is {tokenizer.sha256[:16]}; put the right file there"
        )
    if tokenizer.vocab_size > model.encoder.vocab_size:
        raise DamagedCheckpoint(
            f"{workdir / 'tokenizer.json'} makes ids up to {tokenizer.vocab_size - 1}, the embedding table of step "
            f"{step} has {model.encoder.vocab_size} rows; put the right file there"
        )
    with _explained(path, "record"):
        earlier = record.pop("earlier")
        if not isinstance(earlier, list) or not all(isinstance(stage, dict) for stage in earlier):
            raise ValueError("earlier should be a list of records")
        read = Checkpoint(model, jax.device_get(params), tokenizer, training=tuple(earlier))
        if "imported" in record:
            return dataclasses.replace(read, **import_of(record["imported"], model))
        return dataclasses.replace(read, prompts=trained_prompts(record), training=(*read.training, record))


@contextlib.contextmanager
def _explained(path: Path, what: str) -> Iterator[None]:
    """Whatever orbax, tensorstore and our own reading raise where a checkpoint is not what its hashes make it seem."""
    try:
        yield
    except (DamagedCheckpoint, OSError):
        raise
    except Exception as error:
        reason = str(error).strip().partition("\n")[0][:300]
        raise DamagedCheckpoint(f"{path}: its {what} cannot be used ({type(error).__name__}: {reason})") from error


def write_pretrained(workdir: str | Path, source: Checkpoint) -> None:
    """Weights as a working directory with one checkpoint, which ``read_pretrained`` and ``init_from`` take.

    A classifier is left out: it belongs to one task.

    Raises:
      FileExistsError: the directory holds checkpoints already.
    """
    workdir = Path(workdir)
    if _steps(workdir / "checkpoints"):
        raise FileExistsError(f"{workdir} holds checkpoints already; choose another directory")
    if source.tokenizer is None:
        raise ValueError("the checkpoint has no tokenizer; a run needs the one that its embeddings belong to")
    workdir.mkdir(parents=True, exist_ok=True)
    source.tokenizer.save(workdir)
    imported = ("prompts", "default_prompt_name", "similarity", "max_length")
    record = {
        "format": FORMAT,
        "model": dataclasses.asdict(source.config),
        "has_mlm_head": "mlm_head" in source.params,
        "tokenizer_sha256": source.tokenizer.sha256,
        "earlier": list(source.training),
        "imported": {name: getattr(source, name) for name in imported},
        "step": 0,
    }
    params = {name: part for name, part in source.params.items() if name != "classifier"}
    part = (workdir / "checkpoints" / "0.part").absolute()
    ocp.save_checkpointables(part, {"params": params}, custom_metadata=record, overwrite=True)
    _commit(part)

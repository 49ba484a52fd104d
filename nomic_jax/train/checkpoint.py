"""Checkpoints of a run, and the weights of whatever a run can start from.

A working directory holds

    config.json          the resolved configuration
    tokenizer.json       the tokenizer that made the tokens
    metrics.jsonl        one line every config.log_every steps
    checkpoints/<step>/  orbax: `params`, `training` (step, optimizer state), and a record of config, data and versions

The place in the data is the step, because a stream is a function of it; the record's fingerprint says of which stream.
"""

import dataclasses
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from nomic_jax.data.loader import Stream
from nomic_jax.data.tokenizer import Tokenizer
from nomic_jax.hf import Checkpoint, read_checkpoint
from nomic_jax.model import EmbeddingConfig, EncoderConfig, abstract_encoder
from nomic_jax.model.heads import abstract_mlm_head
from nomic_jax.train.config import CheckpointConfig, TrainConfig
from nomic_jax.train.sharding import make_mesh, replicated
from nomic_jax.train.state import TrainState

FORMAT = 2
_PACKAGES = ("nomic_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tokenizers", "numpy")


class ResumeError(ValueError):
    """A working directory whose run was another one; the message says what differs."""


class Checkpoints:
    """The checkpoints of one working directory."""

    def __init__(self, workdir: Path, config: CheckpointConfig, record: dict[str, Any]):
        self.record = record
        self._checkpointer = ocp.training.Checkpointer(
            (workdir / "checkpoints").absolute(),
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(config.every),
            preservation_policy=ocp.training.preservation_policies.LatestN(config.keep),
            cleanup_tmp_directories=True,
        )

    @property
    def latest_step(self) -> int | None:
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def save(self, step: int, state: TrainState, *, force: bool = False) -> None:
        """Writes in the background, if it is time to or if forced."""
        if step == self.latest_step or not (force or self._checkpointer.should_save(step)):
            return
        checkpointables = {"params": state.params, "training": {"step": state.step, "opt_state": state.opt_state}}
        metadata = self.record | {"step": step}
        self._checkpointer.save_checkpointables_async(step, checkpointables, custom_metadata=metadata, force=force)

    def restore(self, state: TrainState) -> TrainState:
        """The latest checkpoint, placed like ``state``.

        Raises:
          ResumeError: it was made from other data, another tokenizer, or another configuration.
        """
        saved = self._checkpointer.metadata(self.latest_step).custom_metadata or {}
        _check_same_run(saved, self.record)
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        loaded = self._checkpointer.load_checkpointables(
            self.latest_step,
            {"params": abstract.params, "training": {"step": abstract.step, "opt_state": abstract.opt_state}},
        )
        return TrainState(loaded["training"]["step"], loaded["params"], loaded["training"]["opt_state"])

    def close(self) -> None:
        """Waits for what is being written."""
        self._checkpointer.close()


def make_record(
    config: TrainConfig, model: EmbeddingConfig, stream: Stream, tokenizer: Tokenizer, earlier: list[dict] | None = None
) -> dict:
    """What a checkpoint says of itself, as JSON; ``earlier`` are the stages before it, see ``Checkpoint.training``."""
    return {
        "format": FORMAT,
        "config": dataclasses.asdict(config),
        "model": dataclasses.asdict(model),
        "has_mlm_head": config.stage == "mlm",
        "earlier": earlier or [],
        "sources": [
            {
                "name": store.name,
                "rows": store.rows,
                "fingerprint": store.fingerprint,
                "query_prefix": store.manifest["source"]["query_prefix"],
                "document_prefix": store.manifest["source"]["document_prefix"],
            }
            for store in stream.stores
        ],
        "data_fingerprint": stream.fingerprint,
        "tokenizer_sha256": tokenizer.sha256,
        "device_kind": jax.devices()[0].device_kind,
        "device_count": jax.device_count(),
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
    }


# What may change between the parts of a run without making it another run.
_FREE_FIELDS = ("log_every", "checkpoint", "chunk_size")


def _check_same_run(saved: dict[str, Any], current: dict[str, Any]) -> None:
    if saved.get("format") != FORMAT:
        raise ResumeError(f"the checkpoint has format {saved.get('format')}; this version reads {FORMAT}")
    # Through JSON, as the saved one went: tuples become lists.
    current = json.loads(json.dumps(current))
    pairs = [("config." + key, saved["config"].get(key), value) for key, value in current["config"].items()]
    # The file names in config.data may change; the fingerprint knows whether the rows did.
    pairs = [pair for pair in pairs if pair[0].removeprefix("config.") not in (*_FREE_FIELDS, "data")]
    pairs += [(key, saved.get(key), current[key]) for key in ("model", "tokenizer_sha256", "data_fingerprint")]
    for name, before, now in pairs:
        if before != now:
            raise ResumeError(
                f"this working directory holds a run with another {name} ({before!r}, now {now!r}); "
                f"take another --workdir, or the same settings and data to go on"
            )


def read_pretrained(path: str | Path) -> Checkpoint:
    """From a run's working directory (its latest checkpoint), one of its checkpoints, or a Hugging Face directory.

    Raises:
      FileNotFoundError: none of these is at ``path``.
    """
    path = Path(path)
    if (path / "checkpoints").is_dir():
        return _read_run(path, None)
    if path.parent.name == "checkpoints" and path.name.isdigit() and path.is_dir():
        return _read_run(path.parent.parent, int(path.name))
    if (path / "config.json").exists():
        return read_checkpoint(path)
    raise FileNotFoundError(
        f"{path} is neither the working directory of a run, nor a checkpoint in it, nor a Hugging Face directory"
    )


def _read_run(workdir: Path, step: int | None) -> Checkpoint:
    checkpointer = ocp.training.Checkpointer((workdir / "checkpoints").absolute())
    if checkpointer.latest is None:
        raise FileNotFoundError(f"{workdir / 'checkpoints'} holds no finished checkpoint")
    step = checkpointer.latest.step if step is None else step
    record = dict(checkpointer.metadata(step).custom_metadata or {})
    if record.get("format") != FORMAT:
        raise ValueError(f"{workdir}: step {step} has format {record.get('format')}; this version reads {FORMAT}")
    fields = dict(record["model"])
    model = EmbeddingConfig(**fields | {"encoder": EncoderConfig(**fields["encoder"])})
    abstract = {"encoder": abstract_encoder(model.encoder)}
    if record["has_mlm_head"]:
        abstract["mlm_head"] = abstract_mlm_head(model.encoder)
    sharding = replicated(make_mesh(jax.local_devices()[:1]))
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), abstract)
    params = checkpointer.load_checkpointables(step, {"params": abstract})["params"]
    checkpointer.close()
    read = Checkpoint(
        model, jax.device_get(params), Tokenizer.from_directory(workdir), training=tuple(record.pop("earlier"))
    )
    if "imported" in record:
        return dataclasses.replace(read, **record["imported"])
    return dataclasses.replace(read, prompts=_prompts_of_training(record), training=(*read.training, record))


def _prompts_of_training(record: dict[str, Any]) -> dict[str, str] | None:
    """{} for a run whose pairs carried no prefix at all: its model must get none either."""
    prefixes = [source[side] for source in record["sources"] for side in ("query_prefix", "document_prefix")]
    return None if record["config"]["stage"] == "mlm" or any(prefixes) else {}


def write_pretrained(workdir: str | Path, source: Checkpoint) -> None:
    """Weights as a working directory with one checkpoint, which ``read_pretrained`` and ``init_from`` take.

    A classifier is left out: it belongs to one task.

    Raises:
      FileExistsError: the directory holds checkpoints already.
    """
    workdir = Path(workdir)
    if (workdir / "checkpoints").exists():
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
        "earlier": list(source.training),
        "imported": {name: getattr(source, name) for name in imported},
        "step": 0,
    }
    params = {name: part for name, part in source.params.items() if name != "classifier"}
    with ocp.training.Checkpointer((workdir / "checkpoints").absolute()) as checkpointer:
        checkpointer.save_checkpointables(0, {"params": params}, custom_metadata=record, force=True)

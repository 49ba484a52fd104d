"""The record of a run in its checkpoints, and the checks that a run may resume from a checkpoint."""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args, get_type_hints

import jax
import numpy as np

import nomic_jax
from nomic_jax.data.batches.permutation import VERSION
from nomic_jax.data.batches.stream import Stream
from nomic_jax.data.prompts import prompts_of
from nomic_jax.data.tokens.store import IDENTITY, TokenStore
from nomic_jax.data.tokens.tokenizer import Tokenizer
from nomic_jax.hf import NOMIC_PROMPTS
from nomic_jax.hf.checkpoint import SIMILARITIES
from nomic_jax.hf.config import config_json, encoder_config
from nomic_jax.model import EmbeddingConfig, EncoderConfig
from nomic_jax.model.modules import Module

FORMAT = 2
_PACKAGES = ("nomic_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tokenizers", "numpy")


class ResumeError(ValueError):
    """The working directory belongs to a different run; the message says what differs."""


def make_record(
    settings: Mapping[str, Any],
    model: EmbeddingConfig,
    stream: Stream,
    tokenizer: Tokenizer,
    *,
    device_count: int,
    parent: dict[str, Any] | None = None,
    guide: dict[str, Any] | None = None,
    earlier: list[dict] | None = None,
    recomputation: dict[str, Any] | None = None,
) -> dict:
    """Returns the record that a checkpoint holds, as JSON.

    Args:
      settings: the configuration of the run, as ``dataclasses.asdict`` gives it.
      model, stream, tokenizer: those of the run.
      device_count: number of devices of the run, over all processes.
      parent, guide: the identity of the initial weights (None for random ones) and of the guide of the loss; see
        ``nomic_jax.run.pretrained.identify``.
      earlier: the records of the previous stages, see ``Checkpoint.training``.
      recomputation: what was chosen for ``config.model.recompute=auto``; None if that is set by hand.
    """
    return {
        "format": FORMAT,
        "config": settings,
        "model": model_fields(model),
        "has_mlm_head": settings["stage"] == "mlm",
        "parent": parent,
        "guide": guide,
        "num_labels": settings["data"].get("num_labels", 0),
        "earlier": earlier or [],
        "sources": [_describe(store) for store in stream.stores],
        "data_fingerprint": stream.fingerprint,
        "shuffle": stream.shuffle,
        "tokenizer_sha256": tokenizer.sha256,
        "device_count": device_count,
        "recomputation": recomputation,
        **describe_environment(),
    }


def _describe(store: TokenStore) -> dict[str, Any]:
    """Returns a source with the inputs of its fingerprint, which ``nomic_jax.run.lineage`` verifies."""
    manifest = store.manifest
    source = {
        "name": store.name,
        "rows": store.rows,
        "fingerprint": store.fingerprint,
        "query_prefix": manifest["source"]["query_prefix"],
        "document_prefix": manifest["source"]["document_prefix"],
    }
    if "files" in manifest:
        paths = manifest.get("paths", [""] * len(manifest["files"]))
        source["identity"] = {name: manifest[name] for name in IDENTITY}
        source["files"] = [{"path": path, "sha256": sha256} for path, sha256 in zip(paths, manifest["files"])]
    return source


def describe_environment() -> dict[str, Any]:
    """Returns what determines the bits of a result besides the record's settings: devices, packages, our own code."""
    package = Path(__file__).parent.parent
    sources = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        sources.update(f"{file.relative_to(package).as_posix()} ".encode() + hashlib.sha256(file.read_bytes()).digest())
    commit = ""
    if (package.parent / ".git").exists():
        with contextlib.suppress(OSError):
            git = subprocess.run(
                ["git", "-C", str(package.parent), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
            )
            commit = git.stdout.strip()
    return {
        "device_kind": jax.devices()[0].device_kind,
        "versions": {"python": platform.python_version()} | installed_versions(_PACKAGES),
        # The hash covers the code that ran, even if it differs from the commit.
        "code": {"commit": commit, "sha256": sources.hexdigest()},
    }


def changed_environment(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Says how versions, devices and code of two records differ, such as "jax was 0.10.2, is 0.11.0"."""
    changes = []
    before, now = ({**record.get("versions", {}), "device": record.get("device_kind")} for record in (saved, current))
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            changes.append(f"{name} was {before.get(name) or 'absent'}, is {now.get(name) or 'absent'}")
    codes = [record.get("code", {}).get("sha256") for record in (saved, current)]
    if codes[0] != codes[1]:
        changes.append("the code of nomic_jax has changed")
    return changes


def installed_versions(names: Iterable[str]) -> dict[str, str]:
    """Returns the versions of the packages that are installed. nomic_jax may run from its checkout."""
    versions = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = nomic_jax.__version__ if name == "nomic_jax" else importlib.metadata.version(name)
    return versions


# Configuration fields that may change when a run resumes.
_FREE_FIELDS = (
    "checkpoint",
    "deterministic",
    "evaluation",
    "init_step",
    "kept_chunks",
    "log_every",
    "memory_gb",
    "peak_tflops",
    "profile",
    "sharding",
    "trackio",
    "wandb",
)
# Model fields that affect speed and memory, but not the result.
_FREE_OF_MODEL = ("encoder.attention", "encoder.recompute", "encoder.norm_kernel")


def check_format(record: dict[str, Any], path: Path) -> None:
    found = record.get("format")
    if found != FORMAT:
        newer = isinstance(found, int) and found > FORMAT
        advice = "update nomic_jax" if newer else "use the version of nomic_jax that wrote it"
        raise ResumeError(f"{path} has format {found!r:.100}; this version reads {FORMAT}: {advice}")


def shuffle_of(record: dict[str, Any]) -> int:
    """Returns the version of the permutation that ordered the rows of a run (``Stream.shuffle``).

    Raises:
      ResumeError: this version of nomic_jax does not have it.
    """
    version = record.get("shuffle", 1)  # records of before version 2 do not have the field
    if type(version) is not int or not 1 <= version <= VERSION:
        raise ResumeError(
            f"the run orders its rows with shuffle {version!r:.100}; this version of nomic_jax has 1 to {VERSION}: "
            f"update nomic_jax"
        )
    return version


def model_fields(model: EmbeddingConfig) -> dict[str, Any]:
    """Returns the field ``model`` of a record. Models without modules have none there, as in earlier records."""
    fields = dataclasses.asdict(model)
    return fields if fields["modules"] else {name: value for name, value in fields.items() if name != "modules"}


def parse_model(record: dict[str, Any]) -> EmbeddingConfig:
    """Returns the model that a record describes. An invalid record raises various exceptions."""
    fields = dict(record["model"])
    named = {"model_type": "bert" if fields["encoder"].get("position") == "absolute" else "nomic_bert"}
    encoder = EncoderConfig(**named | fields["encoder"])  # earlier records do not have model_type
    encoder_config(config_json(encoder), "model")  # checks the ranges that apply to a config.json
    floats: dict[str, Any] = {}
    for name, hint in get_type_hints(EncoderConfig).items():
        value = getattr(encoder, name)
        # The options of a Literal are texts.
        kinds = {option if isinstance(option, type) else str for option in get_args(hint) or (hint,)}
        if type(value) not in kinds and not (float in kinds and type(value) is int):
            raise TypeError(f"model.encoder.{name} is {value!r}")
        if float in kinds and value is not None:
            floats[name] = float(value)  # JAX does not accept integers beyond 64 bits
    fields["modules"] = tuple(Module(**module) for module in fields.get("modules", ()))
    model = EmbeddingConfig(**fields | {"encoder": dataclasses.replace(encoder, **floats)})
    if not isinstance(model.dim, int | None) or not all(
        isinstance(x, bool) for x in (model.layer_norm, model.normalize)
    ):
        raise TypeError("model.dim, model.layer_norm or model.normalize")
    return model


def parse_import(fields: dict[str, Any], model: EmbeddingConfig) -> dict[str, Any]:
    """Returns the fields that ``write_pretrained`` stores. Invalid fields raise various exceptions."""
    kinds = {"prompts": dict | None, "default_prompt_name": str | None, "similarity": str, "max_length": int | None}
    dims = fields.get("matryoshka_dims", [])  # earlier records do not have it
    wrong = next((name for name, kind in kinds.items() if not isinstance(fields[name], kind)), None)
    if wrong or not all(isinstance(text, str) for text in (fields["prompts"] or {}).values()):
        raise TypeError(f"imported.{wrong or 'prompts'} is {fields[wrong or 'prompts']!r}")
    name, length = fields["default_prompt_name"], fields["max_length"]
    if fields["similarity"] not in SIMILARITIES or name not in (None, *(fields["prompts"] or NOMIC_PROMPTS)):
        raise ValueError(f"imported.similarity is {fields['similarity']!r}, imported.default_prompt_name {name!r}")
    if length is not None and not 2 <= length <= model.encoder.max_positions:
        raise ValueError(f"imported.max_length is {length}, not within 2..{model.encoder.max_positions}")
    if not isinstance(dims, list) or not all(type(d) is int and 1 <= d <= model.width for d in dims):
        raise ValueError(f"imported.matryoshka_dims is {dims!r}")
    return {name: fields[name] for name in kinds} | {"matryoshka_dims": tuple(dims)}


# Fields that earlier versions do not record, and the values that do what these versions did.
_ADDED_FIELDS = {
    "config.optim.ema": 0.0,
    "config.optim.layer_decay": 1.0,
    "config.lora.rank": 0,
    "config.lora.alpha": 16.0,
    "config.lora.rslora": False,
    "config.lora.target_modules": [],
    "config.loss.dropout": 0.1,
    "config.loss.projection_dim": 0,
}


def check_same_run(saved: dict[str, Any], current: dict[str, Any], path: Path) -> None:
    """Raises ResumeError, with what was found and expected, if the checkpoint at ``path`` belongs to another run."""
    check_format(saved, path)
    if "config" not in saved:
        raise ResumeError(
            f"{path} is imported; set config.init_from to its working directory, and choose another --workdir"
        )
    # Convert through JSON, as the saved record was: tuples become lists.
    current = json.loads(json.dumps(current))
    allowed = current["config"]["checkpoint"]["allow_changed"].split(",")
    differences: list[tuple[str, str, Any, Any]] = []  # (name for allow_changed, what, before, now)
    for part in ("config", "model"):
        before, now = _flat(saved[part]), _flat(current[part])
        if part == "model" and "encoder" in saved[part]:
            # Records of earlier versions lack the options that came later; what they describe has the defaults.
            before, now = (
                _flat(dataclasses.asdict(parse_model(record))) | fields
                for record, fields in ((saved, before), (current, now))
            )
        for key in sorted(before.keys() | now.keys()):
            group = key.partition(".")[0] if part == "config" else ""
            # The resolved model is compared in place of config.model; the data is compared below.
            if group not in (*_FREE_FIELDS, "model", "data") and (part != "model" or key not in _FREE_OF_MODEL):
                name = f"{part}.{key}"
                differences.append((group, name, before.get(key, _ADDED_FIELDS.get(name)), now.get(key)))
    differences += [("tokenizer", "tokenizer_sha256", saved["tokenizer_sha256"], current["tokenizer_sha256"])]
    if "shuffle" in saved:  # the identities of earlier records leave out the folders of modules
        guides = [(record.get("guide") or {}).get("sha256") for record in (saved, current)]
        differences.append(("loss", "guide (the SHA-256 of its files)", guides[0], guides[1]))
    if saved["data_fingerprint"] != current["data_fingerprint"]:
        differences += [("data", *difference) for difference in _data_differences(saved, current)]
    for group, name, before, now in differences:
        if before != now and not (group and group in allowed):
            override = f"; or set --config.checkpoint.allow_changed={group} to resume anyway" if group else ""
            raise ResumeError(
                f"this working directory holds a run whose {name} was {before!r}; now it is {now!r}; "
                f"choose another --workdir, or use the same settings and data to resume{override}"
            )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _data_differences(saved: dict[str, Any], current: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yields (name, before, now) of everything that identifies the data, the most informative first."""
    for key, value in current["config"]["data"].items():
        # File names may change; the fingerprint shows whether the rows changed.
        if key not in ("mixture", "tokenizer", "cache_dir"):
            yield f"config.data.{key}", saved["config"]["data"].get(key), value
    before, now = ([source["name"] for source in record["sources"]] for record in (saved, current))
    yield "list of sources", before, now
    for before, now in zip(saved["sources"], current["sources"]):
        for key in ("query_prefix", "document_prefix", "rows", "fingerprint"):
            yield f"{key} of the source {now['name']!r}", before[key], now[key]
    yield "data_fingerprint", saved["data_fingerprint"], current["data_fingerprint"]


def check_same_arrays(saved: Any, expected: Any) -> None:
    """Raises ResumeError naming the first array that differs in shape or type, or is missing in one tree."""
    before, now = (
        {
            jax.tree_util.keystr(path, simple=True, separator="/"): f"{np.dtype(leaf.dtype)}{list(leaf.shape)}"
            for path, leaf in jax.tree.leaves_with_path(tree)
        }
        for tree in (saved, expected)
    )
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            raise ResumeError(
                f"the checkpoint has {name} as {before.get(name, 'nothing')}, the run {now.get(name, 'nothing')}: "
                f"the model or optimizer differs; use the version of nomic_jax that wrote it, or another --workdir"
            )


def trained_prompts(record: dict[str, Any]) -> dict[str, str] | None:
    """Returns the prompts of a run's model: those of its sources; None (nomic's) for a masked-LM, which has none."""
    return None if record["config"]["stage"] == "mlm" else prompts_of(record["sources"])


def trained_matryoshka_dims(record: dict[str, Any]) -> tuple[int, ...]:
    """Returns the numbers of components that a run's loss cuts vectors to, the largest first; () if it cuts none."""
    loss = record["config"].get("loss", {}) if record["config"]["stage"] in ("contrastive", "finetune") else {}
    return tuple(sorted({int(dim) for dim in loss.get("matryoshka_dims", ())}, reverse=True))

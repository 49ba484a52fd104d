"""The modules of a sentence-transformers directory, which turn hidden states into embeddings.

modules.json lists them in order. The supported modules and their order are:

    Transformer -> Pooling [-> LayerNorm] [-> Normalize]

The LayerNorm is that of nomic-embed-text-v1.5, which has no weights. In the directory its weights are ones and zeros.
"""

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np

from nomic_jax.files.writing import write_json
from nomic_jax.hf.files import CheckpointError, read_json, read_json_list
from nomic_jax.hf.tensors import open_safetensors, write_safetensors
from nomic_jax.model import EmbeddingConfig, EncoderConfig
from nomic_jax.model.pooling import POOLINGS

_ORDER = ("Transformer", "Pooling", "LayerNorm", "Normalize")
# The booleans of old files, one for each way of pooling, in the order in which the vectors are concatenated.
_POOLING_KEYS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


def read_modules(directory: Path, width: int) -> dict[str, dict[str, Any]]:
    """Returns the last part of each module's type -> its config, in order; {} for a plain transformers directory.

    ``width`` is that of the encoder, which the weights of a LayerNorm must have.
    """
    listing = directory / "modules.json"
    if not listing.exists():
        return {}
    modules: dict[str, dict[str, Any]] = {}
    for module in read_json_list(listing):
        package, _, kind = str(module.get("type")).rpartition(".")
        path = module.get("path", "")
        if not isinstance(path, str) or not path.isprintable() or len(path) > 255:
            raise CheckpointError(f"{listing}: {path!r} cannot be the path of a folder")
        folder = Path(os.path.realpath(directory / path))
        if not folder.is_relative_to(os.path.realpath(directory)):
            raise CheckpointError(f"{listing}: {path} lies outside the checkpoint")
        if package.partition(".")[0] != "sentence_transformers":
            raise CheckpointError(
                f"{listing}: module {package}.{kind} is custom code, which is not executed; the implemented modules of "
                f"sentence_transformers are {', '.join(_ORDER)}"
            )
        if kind not in _ORDER:
            raise CheckpointError(f"{listing}: module {kind} is not implemented; {', '.join(_ORDER)} are")
        if kind in modules:
            raise CheckpointError(f"{listing}: module {kind} is listed twice")
        name = "sentence_bert_config.json" if kind == "Transformer" else "config.json"
        modules[kind] = read_json(folder / name, optional=kind != "Pooling")
        if kind == "LayerNorm":
            _check_without_weights(folder, width)
    if list(modules)[:2] != ["Transformer", "Pooling"] or list(modules) != sorted(modules, key=_ORDER.index):
        raise CheckpointError(f"{listing}: expected {' -> '.join(_ORDER)} in this order, found {' -> '.join(modules)}")
    return modules


def _check_without_weights(folder: Path, width: int) -> None:
    tensors = open_safetensors(folder / "model.safetensors")
    for name, neutral in (("norm.weight", 1), ("norm.bias", 0)):
        if name not in tensors or tensors[name].shape != (width,):
            raise CheckpointError(f"{folder}: expected {name} with the shape [{width}]")
        if np.any(tensors[name].read() != neutral):
            raise CheckpointError(f"{folder}: {name} is trained; only a LayerNorm without weights is implemented")


def embedding_config(
    encoder: EncoderConfig, modules: dict[str, dict[str, Any]], prompts: dict[str, str], directory: Path
) -> EmbeddingConfig:
    """Returns pooling and normalisation. A plain transformers directory has mean pooling and normalisation."""
    if not modules:
        return EmbeddingConfig(encoder)
    pooling = modules["Pooling"]
    where = f"{directory}: the config of Pooling"
    width = pooling.get("word_embedding_dimension", pooling.get("embedding_dimension", encoder.hidden_size))
    if width != encoder.hidden_size:
        raise CheckpointError(f"{where}: the width is {width}, but the encoder's is {encoder.hidden_size}")
    if pooling.get("include_prompt") is False and any(prompts.values()):
        raise CheckpointError(f"{where}: include_prompt false is not implemented; prompts are pooled like other tokens")
    config = EmbeddingConfig(
        encoder,
        pooling=_pooling(pooling, where),
        layer_norm="LayerNorm" in modules,
        normalize="Normalize" in modules,
    )
    dim = read_json(directory / "config_sentence_transformers.json", optional=True).get("truncate_dim")
    if dim is not None and not (type(dim) is int and 1 <= dim <= config.width):
        raise CheckpointError(
            f"{directory}/config_sentence_transformers.json: truncate_dim is {dim!r}; expected 1 to {config.width}"
        )
    return dataclasses.replace(config, dim=dim)


def _pooling(content: dict[str, Any], where: str) -> str:
    """Returns ``EmbeddingConfig.pooling``. Old files have one boolean per mode; new files name one mode or several."""
    on = [key for key, value in content.items() if key.startswith("pooling_mode_") and value]
    given = content.get("pooling_mode", [_POOLING_KEYS.get(key, key) for key in sorted(on, key=_place)])
    chosen = given or ["mean"] if isinstance(given, list) else [given]
    if unknown := [mode for mode in chosen if mode not in POOLINGS]:
        raise CheckpointError(f"{where}: pooling {unknown[0]!r:.100} is not implemented; {', '.join(POOLINGS)} are")
    if len(set(chosen)) < len(chosen):
        raise CheckpointError(f"{where}: pooling {' and '.join(chosen)} repeats one")
    return "+".join(chosen)


def _place(key: str) -> int:
    """The place of an old file's boolean in the order of concatenation."""
    return list(_POOLING_KEYS).index(key) if key in _POOLING_KEYS else len(_POOLING_KEYS)


def _pooling_json(config: EmbeddingConfig) -> dict[str, Any]:
    chosen = config.pooling.split("+")
    booleans = {key: mode in chosen for key, mode in _POOLING_KEYS.items()}
    # Left out where they are false: old versions of sentence-transformers do not know them.
    for mode in ("weightedmean", "lasttoken"):
        if mode not in chosen:
            del booleans[next(key for key, of in _POOLING_KEYS.items() if of == mode)]
    content = {"word_embedding_dimension": config.encoder.hidden_size, **booleans, "include_prompt": True}
    if chosen != sorted(chosen, key=POOLINGS.index):
        content["pooling_mode"] = chosen  # the only way to name another order, which old versions lack
    return content


def write_modules(
    directory: Path,
    config: EmbeddingConfig,
    *,
    prompts: dict[str, str],
    default_prompt_name: str | None,
    similarity: str,
    max_length: int,
) -> None:
    width = config.encoder.hidden_size
    kinds = ["Transformer", "Pooling"]
    kinds += ["LayerNorm"] * config.layer_norm + ["Normalize"] * config.normalize
    # These are the old type names, which every version of sentence-transformers reads.
    listed = [
        {
            "idx": i,
            "name": str(i),
            "path": "" if kind == "Transformer" else f"{i}_{kind}",
            "type": f"sentence_transformers.models.{kind}",
        }
        for i, kind in enumerate(kinds)
    ]
    write_json(directory / "modules.json", listed)
    write_json(directory / "1_Pooling" / "config.json", _pooling_json(config))
    if config.layer_norm:
        write_json(directory / "2_LayerNorm" / "config.json", {"dimension": width})
        neutral = {"norm.weight": np.ones(width, np.float32), "norm.bias": np.zeros(width, np.float32)}
        write_safetensors(directory / "2_LayerNorm" / "model.safetensors", neutral)
    write_json(directory / "sentence_bert_config.json", {"max_seq_length": max_length, "do_lower_case": False})
    content: dict[str, Any] = {
        "prompts": prompts,
        "default_prompt_name": default_prompt_name,
        "similarity_fn_name": similarity,
    }
    if config.dim is not None:
        content["truncate_dim"] = config.dim
    write_json(directory / "config_sentence_transformers.json", content)

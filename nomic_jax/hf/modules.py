"""The modules of a sentence-transformers directory, which turn hidden states into embeddings.

modules.json lists them in order. The supported modules and their order are:

    Transformer -> Pooling [-> Dense | LayerNorm | Normalize ...]

The LayerNorm of nomic-embed-text-v1.5 has no weights; in the directory they are ones and zeros. One that comes last, or
before the last Normalize, is read as that; any other has trained weights.
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from nomic_jax.files.writing import write_json
from nomic_jax.hf.files import CheckpointError, read_json, read_json_list
from nomic_jax.hf.tensors import open_tensors, write_safetensors
from nomic_jax.model import EmbeddingConfig, EncoderConfig
from nomic_jax.model.modules import Module, abstract_modules, module_name
from nomic_jax.model.pooling import POOLINGS

_ORDER = ("Transformer", "Pooling", "Dense", "LayerNorm", "Normalize")
_ACTIVATIONS: dict[str, Literal["identity", "tanh"]] = {
    "torch.nn.modules.linear.Identity": "identity",
    "torch.nn.Identity": "identity",
    "torch.nn.modules.activation.Tanh": "tanh",
    "torch.nn.Tanh": "tanh",
}
# Leaf of ours -> name of the tensor.
_TENSORS = {
    "Dense": {"kernel": "linear.weight", "bias": "linear.bias"},
    "LayerNorm": {"scale": "norm.weight", "bias": "norm.bias"},
}
# The booleans of old files, one for each way of pooling, in the order in which the vectors are concatenated.
_POOLING_KEYS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


class Modules(NamedTuple):
    """What the modules of a directory say.

    Attributes:
      transformer: sentence_bert_config.json; {} without one.
      pooling: the config of Pooling; None in the directory of a cross-encoder.
      after: the modules after Pooling, and their folders, in order.
    """

    transformer: dict[str, Any]
    pooling: dict[str, Any] | None = None
    after: tuple[tuple[Module, Path], ...] = ()


def read_modules(directory: Path, width: int) -> Modules | None:
    """Returns the modules; None for a plain transformers directory. ``width`` is that of the encoder."""
    listing = directory / "modules.json"
    if not listing.exists():
        return None
    listed = [(*_kind_and_folder(module, directory, listing),) for module in read_json_list(listing)]
    kinds = [kind for kind, _ in listed]
    # That of a cross-encoder is a Transformer alone.
    if kinds[:1] != ["Transformer"] or kinds[1:2] not in ([], ["Pooling"]) or {"Transformer", "Pooling"} & {*kinds[2:]}:
        raise CheckpointError(
            f"{listing}: expected Transformer -> Pooling, and then any of {', '.join(_ORDER[2:])}; found "
            f"{' -> '.join(kinds)}"
        )
    transformer = read_json(listed[0][1] / "sentence_bert_config.json", optional=True)
    if len(listed) == 1:
        return Modules(transformer)
    pooling = read_json(listed[1][1] / "config.json")
    where = f"{directory}: the config of Pooling"
    given = pooling.get("word_embedding_dimension", pooling.get("embedding_dimension", width))
    if given != width:
        raise CheckpointError(f"{where}: the width is {given}, but the encoder's is {width}")
    after = []
    width = width * len(_pooling(pooling, where).split("+"))
    for kind, folder in listed[2:]:
        module = _read_module(kind, folder, width)
        after.append((module, folder))
        width = module.width
    return Modules(transformer, pooling, tuple(after))


def _kind_and_folder(module: dict[str, Any], directory: Path, listing: Path) -> tuple[str, Path]:
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
    return kind, folder


def _read_module(kind: str, folder: Path, width: int) -> Module:
    """Returns a module whose input has ``width`` components."""
    if kind == "Normalize":
        return Module("Normalize", width)
    content = read_json(folder / "config.json", optional=kind == "LayerNorm")
    name = "dimension" if kind == "LayerNorm" else "in_features"
    if content.get(name, width) != width:
        raise CheckpointError(f"{folder / 'config.json'}: {name} is {content[name]!r}, but its input has {width}")
    if kind == "LayerNorm":
        return Module("LayerNorm", width)
    for field, expected in (("module_input_name", "sentence_embedding"), ("module_output_name", "sentence_embedding")):
        if content.get(field) not in (None, expected):
            raise CheckpointError(
                f"{folder / 'config.json'}: {field} is {content[field]!r:.100}; a Dense is implemented on embeddings"
            )
    if content.get("use_residual"):
        raise CheckpointError(f"{folder / 'config.json'}: use_residual is not implemented")
    given = content.get("activation_function", "torch.nn.modules.activation.Tanh")
    if given not in _ACTIVATIONS:
        raise CheckpointError(
            f"{folder / 'config.json'}: the activation {given!r:.100} is not implemented; Tanh and Identity are"
        )
    try:
        return Module("Dense", content.get("out_features", 0), content.get("bias", True), _ACTIVATIONS[given])
    except ValueError as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from error


def read_module_weights(modules: Modules, config: EmbeddingConfig) -> dict[str, dict[str, np.ndarray]]:
    """Returns the parameters of ``config.modules``, see ``nomic_jax.model.modules.abstract_modules``.

    Raises:
      CheckpointError: a tensor is missing, unexpected, of another shape or not finite.
    """
    params: dict[str, dict[str, np.ndarray]] = {}
    abstract = abstract_modules(config.modules, config.pooled_width)
    for index, ((module, folder), _) in enumerate(zip(modules.after, config.modules)):
        if (expected := abstract.get(name := module_name(index, module))) is None:
            continue
        tensors = open_tensors(folder)
        names = {leaf: _TENSORS[module.kind][leaf] for leaf in expected}
        if differing := set(names.values()) ^ tensors.keys():
            raise CheckpointError(f"{folder}: expected the tensors {', '.join(names.values())}, not {min(differing)}")
        params[name] = {}
        for leaf, tensor in names.items():
            shape = expected[leaf].shape[::-1] if leaf == "kernel" else expected[leaf].shape
            if tensors[tensor].shape != shape:
                raise CheckpointError(f"{folder}: expected {tensor} with the shape {list(shape)}")
            value = tensors[tensor].read()
            params[name][leaf] = np.ascontiguousarray(value.T) if leaf == "kernel" else value
    return params


def _has_no_weights(module: Module, folder: Path) -> bool:
    """Whether a module is a LayerNorm whose weights are ones and zeros."""
    if module.kind != "LayerNorm":
        return False
    tensors = open_tensors(folder)
    for name, neutral in (("norm.weight", 1), ("norm.bias", 0)):
        if name not in tensors or tensors[name].shape != (module.width,):
            raise CheckpointError(f"{folder}: expected {name} with the shape [{module.width}]")
        if np.any(tensors[name].read() != neutral):
            return False
    return True


def embedding_config(
    encoder: EncoderConfig, modules: Modules | None, prompts: dict[str, str], directory: Path
) -> EmbeddingConfig:
    """Returns pooling and what follows. A plain transformers directory has mean pooling and normalisation."""
    if modules is None or modules.pooling is None:
        return EmbeddingConfig(encoder)
    if modules.pooling.get("include_prompt") is False and any(prompts.values()):
        raise CheckpointError(
            f"{directory}: the config of Pooling: include_prompt false is not implemented; prompts are pooled like "
            f"other tokens"
        )
    after = list(modules.after)
    if normalize := bool(after) and after[-1][0].kind == "Normalize":
        after.pop()
    if layer_norm := bool(after) and _has_no_weights(*after[-1]):
        after.pop()
    config = EmbeddingConfig(
        encoder,
        pooling=_pooling(modules.pooling, f"{directory}: the config of Pooling"),
        layer_norm=layer_norm,
        normalize=normalize,
        modules=tuple(module for module, _ in after),
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
    # The last two are left out where they are false: old versions of sentence-transformers do not know them.
    known = ("cls", "max", "mean", "mean_sqrt_len_tokens", *chosen)
    booleans = {key: mode in chosen for key, mode in _POOLING_KEYS.items() if mode in known}
    content: dict[str, Any] = {
        "word_embedding_dimension": config.encoder.hidden_size,
        **booleans,
        "include_prompt": True,
    }
    if chosen != sorted(chosen, key=POOLINGS.index):
        content["pooling_mode"] = chosen  # the only way to name another order, which old versions lack
    return content


def _module_json(module: Module, width: int) -> dict[str, Any]:
    if module.kind == "LayerNorm":
        return {"dimension": module.width}
    kind = {"identity": "linear.Identity", "tanh": "activation.Tanh"}[module.activation]
    sizes = {"in_features": width, "out_features": module.width, "bias": module.bias}
    return sizes | {"activation_function": f"torch.nn.modules.{kind}"}


def write_modules(
    directory: Path,
    config: EmbeddingConfig,
    params: Mapping[str, Mapping[str, np.ndarray]],
    *,
    prompts: dict[str, str],
    default_prompt_name: str | None,
    similarity: str,
    max_length: int,
) -> None:
    """Writes modules.json, the folders of the modules and their configurations.

    Args:
      params: see ``read_module_weights``.
    """
    neutral = {"scale": np.ones(config.width, np.float32), "bias": np.zeros(config.width, np.float32)}
    after = [(module, params.get(module_name(i, module), {})) for i, module in enumerate(config.modules)]
    after += [(Module("LayerNorm", config.width), neutral)] * config.layer_norm
    after += [(Module("Normalize", config.width), {})] * config.normalize
    kinds = ["Transformer", "Pooling", *(module.kind for module, _ in after)]
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
    width = config.pooled_width
    for i, (module, weights) in enumerate(after, 2):
        if module.kind != "Normalize":
            folder = directory / f"{i}_{module.kind}"
            write_json(folder / "config.json", _module_json(module, width))
            tensors = {
                _TENSORS[module.kind][leaf]: np.ascontiguousarray(np.asarray(x).T if leaf == "kernel" else x)
                for leaf, x in weights.items()
            }
            write_safetensors(folder / "model.safetensors", tensors)
        width = module.width
    write_json(directory / "sentence_bert_config.json", {"max_seq_length": max_length, "do_lower_case": False})
    content: dict[str, Any] = {
        "prompts": prompts,
        "default_prompt_name": default_prompt_name,
        "similarity_fn_name": similarity,
    }
    if config.dim is not None:
        content["truncate_dim"] = config.dim
    write_json(directory / "config_sentence_transformers.json", content)

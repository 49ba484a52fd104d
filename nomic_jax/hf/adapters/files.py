"""Adapters in the form of peft: adapter_config.json and adapter_model.safetensors."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from nomic_jax.files.writing import write_json
from nomic_jax.hf.adapters.lora import Adapter, linear_modules, merge, module_sizes
from nomic_jax.hf.checkpoint import Checkpoint
from nomic_jax.hf.families import family_of
from nomic_jax.hf.files import CheckpointError, read_json
from nomic_jax.hf.tensors import StoredTensor, open_safetensors, write_safetensors
from nomic_jax.model import EncoderConfig

ADAPTER, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # peft's, of every tensor
MOST_RANKS = 1 << 16
# Fields of peft that do not change the weights, beside those that ``_settings`` reads. Any other field that is set
# would: its adapter is refused. Some have values where they mean nothing.
_NEUTRAL = (
    *("auto_mapping", "base_model_name_or_path", "eva_config", "exclude_modules", "inference_mode", "layers_pattern"),
    *("layers_to_transform", "lora_dropout", "megatron_core", "peft_version", "qalora_group_size", "revision"),
    *("target_modules", "task_type"),
)
# Ways to start that leave the weights of the base as they are.
_PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")


def base_of(directory: str | Path) -> str:
    """Returns the model that an adapter names as its base.

    Raises:
      CheckpointError: it names none.
    """
    file = Path(directory) / ADAPTER
    base = read_json(file).get("base_model_name_or_path")
    if not isinstance(base, str) or not base or not base.isprintable():
        raise CheckpointError(f"{file}: base_model_name_or_path is {base!r:.100}; expected the model it belongs to")
    return base


def read_adapter(directory: str | Path, base: Checkpoint) -> Checkpoint:
    """Returns a model with the adapter of a directory merged into its encoder.

    Raises:
      CheckpointError: the adapter has options that this package does not compute, or belongs to another model; the
        message names the field or tensor.
    """
    directory = Path(directory)
    rank, alpha, rslora = _settings(directory / ADAPTER)
    if not (directory / WEIGHTS).exists() and (directory / "adapter_model.bin").exists():
        raise CheckpointError(f"{directory}/adapter_model.bin is pickled; save it with peft's safe_serialization=True")
    encoder = base.config.encoder
    params: dict[str, Any] = {"layers": {}}
    tensors = open_safetensors(directory / WEIGHTS)
    pairs, sizes = _pairs(tensors, encoder, directory / WEIGHTS)
    for module, (layer, pair) in pairs.items():
        inputs, outputs = sizes[module]
        for name, shape in (("a", (rank, inputs)), ("b", (outputs, rank))):
            if pair.get(name) is None:
                raise CheckpointError(f"{directory / WEIGHTS}: {module} has no lora_{name.upper()}")
            if pair[name].shape != shape:
                raise CheckpointError(
                    f"{directory / WEIGHTS}: lora_{name.upper()} of {module} has the shape {list(pair[name].shape)}; "
                    f"for this base and r={rank} it should be {list(shape)}"
                )
        read = {name: {"kernel": np.ascontiguousarray(tensor.read().T)} for name, tensor in pair.items()}
        params["layers"].setdefault(layer, {})[module] = read
    adapter = Adapter(params, rank, alpha, rslora, base_of(directory))
    return merged(base, adapter)


def merged(base: Checkpoint, adapter: Adapter) -> Checkpoint:
    """Returns a model with an adapter merged into its encoder."""
    own = jax.jit(merge, static_argnums=(2, 3))(
        base.params["encoder"], adapter.params, base.config.encoder, adapter.scale
    )
    params = {name: part for name, part in base.params.items() if name != "lora"}
    return dataclasses.replace(base, params=params | {"encoder": jax.device_get(own)}, adapter=adapter)


def _settings(file: Path) -> tuple[int, float, bool]:
    """Returns rank, alpha and rslora."""
    content = read_json(file)
    kind, rank, alpha = content.get("peft_type"), content.get("r"), content.get("lora_alpha")
    if kind != "LORA":
        raise CheckpointError(f"{file}: peft_type is {kind!r:.100}; only LORA is read here")
    if type(rank) is not int or not 1 <= rank <= MOST_RANKS:
        raise CheckpointError(f"{file}: r is {rank!r:.100}; expected a rank")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) < 1e6:
        raise CheckpointError(f"{file}: lora_alpha is {alpha!r:.100}; expected a number")
    rslora, start = content.get("use_rslora", False), content.get("init_lora_weights")
    if not isinstance(rslora, bool):
        raise CheckpointError(f"{file}: use_rslora is {rslora!r:.100}; expected true or false")
    if start not in _PLAIN_STARTS:
        raise CheckpointError(
            f"{file}: init_lora_weights is {start!r:.100}, which changes the weights of the base; merge the adapter "
            f"into its base with peft (model.merge_and_unload().save_pretrained(DIR)), and give DIR"
        )
    read = {"peft_type", "r", "lora_alpha", "use_rslora", "init_lora_weights", *_NEUTRAL}
    for name, value in content.items():
        if name not in read and value not in (None, False, "none", "", {}, []):
            raise CheckpointError(
                f"{file}: {name} is {value!r:.100}, which is not read here; merge the adapter into its base with peft "
                f"(model.merge_and_unload().save_pretrained(DIR)), and give DIR"
            )
    return rank, float(alpha), rslora


def _pairs(
    tensors: dict[str, StoredTensor], encoder: EncoderConfig, file: Path
) -> tuple[dict[str, tuple[int, dict[str, StoredTensor]]], dict[str, tuple[int, int]]]:
    """Returns module -> (layer, {"a": tensor, "b": tensor}), and the sizes of all modules of the encoder."""
    family = family_of(encoder)
    modules = linear_modules(encoder)
    pairs: dict[str, tuple[int, dict[str, StoredTensor]]] = {}
    for name, tensor in tensors.items():
        module, _, kind = name.removesuffix(".weight").removeprefix(PREFIX).rpartition(".")
        module = next((module.removeprefix(x) for x in family.prefixes if module.startswith(x)), module)
        if kind not in ("lora_A", "lora_B") or module not in modules:
            raise CheckpointError(
                f"{file}: tensor {name} is no part of a linear layer of the base ({family.model_type} of "
                f"{encoder.num_layers} layers); the adapter belongs to another model, or trains more than such layers"
            )
        layer = int(modules[module][0].path[1])
        pairs.setdefault(module, (layer, {}))[1][kind[-1].lower()] = tensor
    if not pairs:
        raise CheckpointError(f"{file}: holds no tensors")
    return pairs, module_sizes(encoder, modules)


def write_adapter(part: Path, checkpoint: Checkpoint, base: str = "") -> None:
    """Writes the two files of a model's adapter into a folder.

    Args:
      part: the folder.
      checkpoint: its ``adapter`` is written.
      base: the model that clients shall add it to; by default the one it was trained on.
    """
    adapter = checkpoint.adapter
    assert adapter is not None
    tensors, modules = {}, []
    for of_layer in adapter.params["layers"].values():
        for module, pair in of_layer.items():
            modules.append(module)
            for name in ("a", "b"):
                kernel = np.asarray(pair[name]["kernel"], np.float32)
                tensors[f"{PREFIX}{module}.lora_{name.upper()}.weight"] = np.ascontiguousarray(kernel.T)
    write_safetensors(part / WEIGHTS, tensors)
    alpha = int(adapter.alpha) if adapter.alpha == int(adapter.alpha) else adapter.alpha
    content = {
        "peft_type": "LORA",
        "task_type": "FEATURE_EXTRACTION",
        "base_model_name_or_path": base or adapter.base,
        "r": adapter.rank,
        "lora_alpha": alpha,
        "use_rslora": adapter.rslora,
        "target_modules": _short_targets(modules, checkpoint.config.encoder),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }
    write_json(part / ADAPTER, content)


def _short_targets(modules: list[str], encoder: EncoderConfig) -> list[str]:
    """Returns names that choose these modules and no others, as short as they can be."""
    every = linear_modules(encoder)
    targets: set[str] = set()
    for module in modules:
        parts = module.split(".")
        for i in range(len(parts) - 1, -1, -1):
            short = ".".join(parts[i:])
            if all(name in modules for name in every if name == short or name.endswith(f".{short}")):
                targets.add(short)
                break
    return sorted(targets)

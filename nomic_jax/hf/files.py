"""The files of a checkpoint directory: JSON and tensors, read with errors that name file, tensor and reason."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

# Of other types (int8, float8) the values mean nothing without scales that lie elsewhere.
_FLOATS = (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)


class CheckpointError(ValueError):
    """A checkpoint that cannot be read as it should; the message names the tensor, file or field."""


def read_json(path: Path, optional: bool = False) -> dict[str, Any]:
    """The object in a JSON file; {} for an optional file that is not there."""
    if optional and not path.exists():
        return {}
    content = _load_json(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected an object")
    return content


def read_json_list(path: Path) -> list[dict[str, Any]]:
    """The list of objects in a JSON file."""
    content = _load_json(path)
    if not isinstance(content, list) or not all(isinstance(item, dict) for item in content):
        raise CheckpointError(f"{path}: expected a list of objects")
    return content


def _load_json(path: Path) -> Any:
    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"field {twice!r} is given twice")
        return content

    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=without_duplicates)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist; expected a Hugging Face checkpoint directory") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from error


def read_tensors(directory: Path) -> dict[str, np.ndarray]:
    """Every tensor of model.safetensors, of its shards, or of pytorch_model.bin, as finite float32."""
    index = directory / "model.safetensors.index.json"
    if (directory / "model.safetensors").exists():
        return read_safetensors(directory / "model.safetensors")
    if index.exists():
        return _read_shards(index)
    if (directory / "pytorch_model.bin").exists():
        return _read_torch(directory / "pytorch_model.bin")
    raise FileNotFoundError(f"{directory} holds no model.safetensors, sharded or not, and no pytorch_model.bin")


def read_safetensors(file: Path) -> dict[str, np.ndarray]:
    try:
        loaded = load_file(file)
    except FileNotFoundError:
        raise FileNotFoundError(f"{file} does not exist") from None
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, OSError, MemoryError) as error:
        raise CheckpointError(f"{file}: not a readable safetensors file ({error})") from error
    return {name: _as_float32(tensor, name, file) for name, tensor in loaded.items()}


def write_safetensors(file: Path, tensors: dict[str, np.ndarray]) -> None:
    save_file(tensors, file, metadata={"format": "pt"})  # transformers wants to be told the framework
    file.chmod(0o644)  # safetensors makes it readable for the owner alone; a server is often another user


def _read_shards(index: Path) -> dict[str, np.ndarray]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{index}: weight_map should map every tensor to its file")
    tensors: dict[str, np.ndarray] = {}
    for name in sorted(set(weight_map.values())):
        file = index.parent / name
        if file.parent != index.parent:
            raise CheckpointError(f"{index} names {name}, which lies outside the checkpoint")
        shard = read_safetensors(file)
        if both := shard.keys() & tensors.keys():
            raise CheckpointError(f"{file}: tensor {min(both)} is also in another shard")
        tensors |= shard
    if differing := weight_map.keys() ^ tensors.keys():
        raise CheckpointError(f"{index}: tensor {min(differing)} is in the index or in a shard, but not in both")
    return tensors


def _read_torch(file: Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError as error:
        raise CheckpointError(
            f"{file} is a PyTorch file, which takes torch to read; install torch or convert it to safetensors"
        ) from error
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises its own and pickle's exceptions, all of which mean: not weights
        raise CheckpointError(f"{file}: cannot be read as weights only ({type(error).__name__})") from error
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise CheckpointError(f"{file}: expected a dictionary of tensors")
    tensors = {}
    for name, tensor in state.items():
        if tensor.is_floating_point() or name.endswith("position_ids"):
            tensors[name] = _as_float32(tensor.double().numpy(), name, file)
        else:
            raise CheckpointError(f"{file}: tensor {name} has the type {tensor.dtype}; expected floating point")
    return tensors


def _as_float32(tensor: np.ndarray, name: str, file: Path) -> np.ndarray:
    # (position_ids is a buffer of integers that old BERT checkpoints carry.)
    if tensor.dtype not in _FLOATS and not name.endswith("position_ids"):
        raise CheckpointError(f"{file}: tensor {name} has the type {tensor.dtype}; expected floating point")
    tensor = tensor.astype(np.float32)
    if not np.isfinite(tensor).all():
        raise CheckpointError(f"{file}: tensor {name} holds values that are not finite; the file is broken")
    return tensor

"""Reads the JSON and tensor files of a checkpoint directory. Errors name the file, the tensor and the reason."""

import json
import os
import re
import stat
import struct
import tarfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from nomic_jax.files.reading import each_key_once
from nomic_jax.files.writing import named_errors

# Values of other types (int8, float8) cannot be interpreted without scales, which are stored elsewhere.
_FLOATS = (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)
# Configuration files are smaller than this. Parsed JSON takes ten times the size of the file in memory.
LARGEST_JSON = 1 << 26
MAIN_FILE = "config.json"  # without it, no client opens the directory
_EXPORTED = re.compile(r"README\.md|(\d_[A-Za-z]+/)?[A-Za-z]\w*\.(json|txt|safetensors|model)")
# Before this release, weights_only=True did not prevent code execution (CVE-2025-32434).
_SAFE_TORCH = (2, 6)


class CheckpointError(ValueError):
    """A checkpoint is invalid or cannot be read; the message names the tensor, file or field."""

    def __str__(self) -> str:
        # The message quotes the content of files. Escape it, because a terminal executes escape sequences.
        return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in super().__str__())


def is_exported(name: str) -> bool:
    """Returns whether a file of this name, relative to its directory, may have been written by an export."""
    return _EXPORTED.fullmatch(name) is not None


def read_json(path: Path, optional: bool = False) -> dict[str, Any]:
    """Returns the object in a JSON file, or {} if the file is optional and missing."""
    if optional and not path.exists():
        return {}
    content = _load_json(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected an object")
    return content


def read_json_list(path: Path) -> list[dict[str, Any]]:
    """Returns the list of objects in a JSON file."""
    content = _load_json(path)
    if not isinstance(content, list) or not all(isinstance(item, dict) for item in content):
        raise CheckpointError(f"{path}: expected a list of objects")
    return content


def check_file(path: Path) -> int:
    """Checks that the path is a regular file in its folder, and returns the file's size in bytes.

    Reading a device or a pipe might never end. A link out of the folder could make any file of this machine a part of
    the model and of its exports. Links into the hub's cache are accepted, because the cache consists of links.

    Raises:
      CheckpointError: the path is not a regular file, is a link out of its folder, or cannot be opened.
      FileNotFoundError: the path does not exist.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist; expected a Hugging Face checkpoint directory") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be opened ({error})") from error
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path}: is not a regular file")
    target = Path(os.path.realpath(path))
    if not target.is_relative_to(os.path.realpath(path.parent)) and not _is_in_hub_cache(target):
        raise CheckpointError(
            f"{path}: is a link to {target}, outside of its folder; to use that file, replace the link with a copy"
        )
    return status.st_size


def _is_in_hub_cache(file: Path) -> bool:
    """Returns whether the file is models--ORGANISATION--NAME/blobs/HASH.

    The files of models--ORGANISATION--NAME/snapshots/COMMIT are links to these files.
    """
    return file.parent.name == "blobs" and file.parent.parent.name.startswith("models--")


def _load_json(path: Path) -> Any:
    if (size := check_file(path)) > LARGEST_JSON:
        raise CheckpointError(f"{path}: {size:,} bytes of JSON exceed the limit of {LARGEST_JSON:,}")
    try:
        return _parse_json(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from error


def _parse_json(text: bytes) -> Any:
    """Parses JSON. Raises ValueError also for content that is not JSON but accepted by Python, or that is ambiguous."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not a JSON number")

    content = json.loads(text.decode("utf-8"), object_pairs_hook=each_key_once, parse_constant=refuse)
    if b"\\ud" in text.lower():
        json.dumps(content, ensure_ascii=False).encode("utf-8")  # rejects unpaired surrogates, which are not text
    return content


def read_tensors(directory: Path) -> dict[str, np.ndarray]:
    """Returns every tensor of model.safetensors, of its shards, or of pytorch_model.bin, as finite float32."""
    index = directory / "model.safetensors.index.json"
    if (directory / "model.safetensors").exists():
        return read_safetensors(directory / "model.safetensors")
    if index.exists():
        return _read_shards(index)
    if (directory / "pytorch_model.bin").exists():
        return _read_torch(directory / "pytorch_model.bin")
    raise FileNotFoundError(f"{directory} holds no model.safetensors, sharded or not, and no pytorch_model.bin")


def read_safetensors(file: Path) -> dict[str, np.ndarray]:
    size = check_file(file)
    try:
        _check_header(file, size)
        loaded = load_file(file)
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, OSError, MemoryError) as error:
        raise CheckpointError(f"{file}: not a readable safetensors file ({error})") from error
    except RecursionError as error:
        raise CheckpointError(f"{file}: not a readable safetensors file (its header is nested too deep)") from error
    return {name: _as_float32(tensor, name, file) for name, tensor in loaded.items()}


def _check_header(file: Path, size: int) -> None:
    """Raises ValueError if the header repeats a name: the library takes the last entry, other readers the first."""
    with file.open("rb") as f:
        length = f.read(8)
        # The library reports headers of impossible length.
        if len(length) == 8 and (header := struct.unpack("<Q", length)[0]) <= size - 8:
            if header > LARGEST_JSON:
                raise ValueError(f"a header of {header:,} bytes exceeds the limit of {LARGEST_JSON:,}")
            _parse_json(f.read(header))


def write_safetensors(file: Path, tensors: dict[str, np.ndarray]) -> None:
    with named_errors(file):
        save_file(tensors, file, metadata={"format": "pt"})  # transformers requires the name of the framework
    file.chmod(0o644)  # safetensors allows only the owner to read it; a server is often another user


def _read_shards(index: Path) -> dict[str, np.ndarray]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{index}: weight_map should map every tensor to its file")
    tensors: dict[str, np.ndarray] = {}
    for name in sorted(set(weight_map.values())):
        file = index.parent / name
        if not name.isprintable() or len(name) > 255:
            raise CheckpointError(f"{index}: {name[:300]!r} cannot be the name of a file")
        if file.parent != index.parent or name in ("", ".", ".."):
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
            f"{file} is a PyTorch file, which needs torch to read; install torch or convert it to safetensors"
        ) from error
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < _SAFE_TORCH:
        raise CheckpointError(
            f"{file} is a PyTorch file, which torch {torch.__version__} does not read safely; install torch >= "
            f"{'.'.join(map(str, _SAFE_TORCH))} or convert it to safetensors"
        )
    size = check_file(file)
    if _is_tar(file):
        raise CheckpointError(f"{file} is a tar of torch < 0.2, which torch would unpack; convert it to safetensors")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises its own and pickle's exceptions; all mean that this is no weights file
        raise CheckpointError(f"{file}: cannot be read as weights only ({type(error).__name__})") from error
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in state.items()
    ):
        raise CheckpointError(f"{file}: expected a dictionary of tensors")
    tensors = {}
    for name, tensor in state.items():
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
            raise CheckpointError(f"{file}: tensor {name} is not a plain array of numbers")
        if not tensor.is_floating_point() and not name.endswith("position_ids"):
            raise CheckpointError(f"{file}: tensor {name} has the type {tensor.dtype}; expected floating point")
        # With strides of 0, a tensor of any size needs only one stored number.
        if tensor.numel() * tensor.element_size() > size:
            raise CheckpointError(f"{file}: tensor {name} is larger than the file ({list(tensor.shape)})")
        tensors[name] = _as_float32(tensor.detach().double().numpy(), name, file)
    return tensors


def _is_tar(file: Path) -> bool:
    try:
        tarfile.open(file, "r:").close()
    except (tarfile.TarError, ValueError):
        return False
    return True


def _as_float32(tensor: np.ndarray, name: str, file: Path) -> np.ndarray:
    # position_ids is an integer buffer in old BERT checkpoints.
    if tensor.dtype not in _FLOATS and not name.endswith("position_ids"):
        raise CheckpointError(f"{file}: tensor {name} has the type {tensor.dtype}; expected floating point")
    tensor = tensor.astype(np.float32)
    if not np.isfinite(tensor).all():
        raise CheckpointError(f"{file}: tensor {name} holds values that are not finite; the file is broken")
    return tensor

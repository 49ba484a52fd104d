"""Opens the tensor files of a checkpoint directory. Errors name the file, the tensor and the reason.

A file is opened in two steps: the names and shapes of its tensors come from its header, and a tensor is read only when
it is asked for. The reader compares names and shapes with the configuration first, so that a tensor of any size that
the model does not have takes no memory.
"""

import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from nomic_jax.files.reading import LARGEST_JSON, parse_json
from nomic_jax.files.writing import named_errors
from nomic_jax.hf.files import CheckpointError, check_file, read_json

# Values of other types (int8, float8) cannot be interpreted without scales, which are stored elsewhere.
_FLOATS = (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)
# Before this release, weights_only=True did not prevent code execution (CVE-2025-32434).
_SAFE_TORCH = (2, 6)


class StoredTensor(NamedTuple):
    """A tensor in a file: its shape, and a function that reads it as finite float32."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


def open_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Returns every tensor of model.safetensors, of its shards, or of pytorch_model.bin."""
    index = directory / "model.safetensors.index.json"
    if (directory / "model.safetensors").exists():
        return open_safetensors(directory / "model.safetensors")
    if index.exists():
        return _open_shards(index)
    if (directory / "pytorch_model.bin").exists():
        return _open_torch(directory / "pytorch_model.bin")
    raise FileNotFoundError(f"{directory} holds no model.safetensors, sharded or not, and no pytorch_model.bin")


def open_safetensors(file: Path) -> dict[str, StoredTensor]:
    size = check_file(file)
    try:
        _check_header(file, size)
        opened = safe_open(file, framework="np")
        shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, OSError, MemoryError) as error:
        raise CheckpointError(f"{file}: not a readable safetensors file ({error})") from error
    except RecursionError as error:
        raise CheckpointError(f"{file}: not a readable safetensors file (its header is nested too deep)") from error

    def reader(name: str) -> Callable[[], np.ndarray]:
        def read() -> np.ndarray:
            try:
                tensor = opened.get_tensor(name)
            except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, OSError, MemoryError) as error:
                raise CheckpointError(f"{file}: tensor {name} cannot be read ({error})") from error
            return _as_float32(tensor, name, file)

        return read

    return {name: StoredTensor(shape, reader(name)) for name, shape in shapes.items()}


def _check_header(file: Path, size: int) -> None:
    """Raises ValueError if the header repeats a name: the library takes the last entry, other readers the first."""
    with file.open("rb") as f:
        length = f.read(8)
        # The library reports headers of impossible length.
        if len(length) == 8 and (header := struct.unpack("<Q", length)[0]) <= size - 8:
            if header > LARGEST_JSON:
                raise ValueError(f"a header of {header:,} bytes exceeds the limit of {LARGEST_JSON:,}")
            parse_json(f.read(header))


def write_safetensors(file: Path, tensors: dict[str, np.ndarray]) -> None:
    with named_errors(file):
        save_file(tensors, file, metadata={"format": "pt"})  # transformers requires the name of the framework
    file.chmod(0o644)  # safetensors allows only the owner to read it; a server is often another user


def _open_shards(index: Path) -> dict[str, StoredTensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{index}: weight_map should map every tensor to its file")
    tensors: dict[str, StoredTensor] = {}
    for name in sorted(set(weight_map.values())):
        file = index.parent / name
        if not name.isprintable() or len(name) > 255:
            raise CheckpointError(f"{index}: {name[:300]!r} cannot be the name of a file")
        if file.parent != index.parent or name in ("", ".", ".."):
            raise CheckpointError(f"{index} names {name}, which lies outside the checkpoint")
        shard = open_safetensors(file)
        if both := shard.keys() & tensors.keys():
            raise CheckpointError(f"{file}: tensor {min(both)} is also in another shard")
        tensors |= shard
    if differing := weight_map.keys() ^ tensors.keys():
        raise CheckpointError(f"{index}: tensor {min(differing)} is in the index or in a shard, but not in both")
    return tensors


def _open_torch(file: Path) -> dict[str, StoredTensor]:
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
    is_zip = zipfile.is_zipfile(file)
    if is_zip:
        _check_zip(file)
    try:
        # The storages of a zip stay in the file until a tensor is read.
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # torch raises its own and pickle's exceptions; all mean that this is no weights file
        raise CheckpointError(f"{file}: cannot be read as weights only ({type(error).__name__})") from error
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in state.items()
    ):
        raise CheckpointError(f"{file}: expected a dictionary of tensors")
    for name, tensor in state.items():
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
            raise CheckpointError(f"{file}: tensor {name} is not a plain array of numbers")
        if not tensor.is_floating_point() and not name.endswith("position_ids"):
            raise CheckpointError(f"{file}: tensor {name} has the type {tensor.dtype}; expected floating point")
        # With strides of 0, a tensor of any size needs only one stored number.
        if tensor.numel() * tensor.element_size() > size:
            raise CheckpointError(f"{file}: tensor {name} is larger than the file ({list(tensor.shape)})")

    def reader(name: str, tensor: Any) -> Callable[[], np.ndarray]:
        return lambda: _as_float32(tensor.detach().double().numpy(), name, file)

    return {name: StoredTensor(tuple(tensor.shape), reader(name, tensor)) for name, tensor in state.items()}


def _check_zip(file: Path) -> None:
    """Raises CheckpointError if a member is compressed: a few bytes of it could unpack to any size."""
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError) as error:
        raise CheckpointError(f"{file}: cannot be read as a zip of tensors ({error})") from error
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
            raise CheckpointError(
                f"{file}: {member.filename!r} is compressed ({member.file_size:,} bytes unpacked); torch.save writes "
                f"without compression. Convert the file to safetensors"
            )


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
    tensor = tensor.astype(np.float32, copy=False)
    # NaN is the least and the largest of all that it is among. No array of booleans is made.
    if tensor.size and not np.isfinite([tensor.min(), tensor.max()]).all():
        raise CheckpointError(f"{file}: tensor {name} holds values that are not finite; the file is broken")
    return tensor

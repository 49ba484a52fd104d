"""Torch tensors where a caller asks for them or passes them. Only this module imports torch, and only then."""

from typing import Any

import numpy as np


def is_tensor(value: Any) -> bool:
    """Returns whether a value is a torch tensor, without importing torch."""
    return type(value).__module__.partition(".")[0] == "torch" and hasattr(value, "detach")


def to_numpy(value: Any) -> np.ndarray:
    """Returns an array, a tensor of any device and type, or a list of either as float32."""
    if isinstance(value, list | tuple):
        return np.stack([to_numpy(item) for item in value]) if value else np.zeros((0, 0), np.float32)
    if is_tensor(value):
        value = value.detach().float().cpu().numpy()
    return np.asarray(value, np.float32)


def has_tensor(value: Any) -> bool:
    return is_tensor(value) or (isinstance(value, list | tuple) and bool(value) and is_tensor(value[0]))


def to_tensor(array: np.ndarray, device: str = "cpu") -> Any:
    """Returns a torch tensor with the values of an array, on a GPU if torch has it too.

    Raises:
      ModuleNotFoundError: torch is not installed.
    """
    try:
        import torch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "convert_to_tensor=True and convert_to_numpy=False return torch tensors, and torch is not installed: "
            "pip install torch, or take numpy arrays",
            name="torch",
        ) from error
    tensor = torch.from_numpy(array)
    return tensor.to(device) if device.startswith("cuda") and torch.cuda.is_available() else tensor

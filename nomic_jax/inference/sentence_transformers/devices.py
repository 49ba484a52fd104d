"""Devices by their names in sentence-transformers ("cpu", "cuda", "cuda:1") and in JAX ("gpu:1", "tpu")."""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

_PLATFORMS = {"cuda": "gpu", "rocm": "gpu"}  # torch's names of what JAX calls gpu


def find_devices(device: Any) -> list[jax.Device]:
    """Returns the devices of this process that a name means.

    Args:
      device: "cpu", "cuda", "gpu" or "tpu" for all devices of this kind, "cuda:1" for one of them; a JAX device; a list
        of these; None for all devices of JAX's default backend. torch's devices are read by their names.

    Raises:
      ValueError: this process has no such device.
    """
    if device is None:
        return jax.local_devices()
    if isinstance(device, jax.Device):
        return [device]
    if isinstance(device, Iterable) and not isinstance(device, str):
        found = [one for item in device for one in find_devices(item)]
        if not found:
            raise ValueError("the list of devices is empty")
        return list(dict.fromkeys(found))
    kind, _, index = str(device).partition(":")
    try:
        there = jax.local_devices(backend=_PLATFORMS.get(kind, kind))
    except RuntimeError:
        there = []
    if there and not index:
        return there
    if index.isdecimal() and int(index) < len(there):
        return [there[int(index)]]
    known = ", ".join(
        device_name(one) for one in dict.fromkeys([*jax.local_devices(), *jax.local_devices(backend="cpu")])
    )
    raise ValueError(
        f"device {str(device)!r} is not one of JAX's devices in this process, which are {known}; for NVIDIA GPUs "
        f"install nomic_jax[cuda12] or nomic_jax[cuda13]"
    )


def device_name(device: jax.Device) -> str:
    """Returns "cpu", "cuda:0", "tpu:0": the name that torch understands, where it has such a device."""
    index = jax.local_devices(backend=device.platform).index(device)
    if device.platform == "cpu":
        return "cpu" if index == 0 else f"cpu:{index}"
    return f"{'cuda' if device.platform == 'gpu' else device.platform}:{index}"


def place(params: dict, devices: Sequence[jax.Device]) -> tuple[dict, NamedSharding]:
    """Returns the parameters, whole on every device, and the sharding that divides the rows of a batch among them."""
    mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)
    return jax.device_put(params, NamedSharding(mesh, P())), NamedSharding(mesh, P("data"))

"""Where arrays live: one mesh axis, rows over it, everything else whole on every device."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

DATA = "data"


def make_mesh(devices: list[jax.Device] | None = None) -> Mesh:
    """All devices of all processes along one axis, or those given."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), (DATA,), axis_types=(AxisType.Auto,), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def put_rows(arrays: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows to its devices, as parts of global arrays whose first axis is dealt over all devices."""
    sharding = NamedSharding(mesh, P(DATA))
    return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in arrays.items()}

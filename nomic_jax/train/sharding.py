"""How arrays are placed: rows are split over the one mesh axis, and the state by one of three tables.

replicated   every device holds all parameters and the whole optimizer state (plain data parallelism)
zero1        the optimizer state is divided over the devices; each device updates its part of the parameters
fsdp         the parameters are divided too, and gathered at the start of a step
"""

from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

DATA = "data"
Sharding = Literal["replicated", "zero1", "fsdp"]
# Names of the leaves that are divided. Norms and biases are too small to matter. Optimizer moments have the names of
# their parameters.
DIVIDED = ("kernel", "embedding")


def make_mesh(devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh of one axis over ``devices``, by default all devices of all processes."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), (DATA,), axis_types=(AxisType.Auto,), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def divided(tree: Any, mesh: Mesh) -> Any:
    """A PartitionSpec for every leaf. Leaves named in DIVIDED are split along the first axis divisible by the devices.

    A leaf without such an axis stays whole. All matrices of the 137M model divide over powers of two up to 256 devices.
    Over 512 or 1,024 devices 62 % of its parameters do, because its width, 768, is not a multiple of them.
    """

    def spec(path: tuple, leaf: jax.Array | jax.ShapeDtypeStruct) -> P:
        if not path or getattr(path[-1], "key", "") not in DIVIDED:
            return P()
        axis = next((i for i, size in enumerate(leaf.shape) if size and size % mesh.size == 0), None)
        return P() if axis is None else P(*[None] * axis, DATA)

    return jax.tree.map_with_path(spec, tree)


def whole(tree: Any) -> Any:
    return jax.tree.map(lambda _: P(), tree)


def gather_locally(tree: Any, mesh: Mesh) -> Any:
    """Every leaf, whole, on the first device of this process. All processes must call it."""
    gathered = jax.jit(lambda leaves: leaves, out_shardings=replicated(mesh))(tree)
    return jax.tree.map(lambda x: x.addressable_data(0), gathered)


def put_rows(arrays: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Puts this process's rows on its devices, as parts of global arrays whose first axis is split over all devices."""
    sharding = NamedSharding(mesh, P(DATA))
    return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in arrays.items()}

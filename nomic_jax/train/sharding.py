"""Where arrays live: one mesh axis; rows over it, and the state by one table.

replicated   every device holds parameters and optimizer state whole (plain data parallelism)
zero1        the optimizer state is divided over the devices; each updates its part of the parameters
fsdp         the parameters are divided too, and gathered at the start of a step
"""

from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

DATA = "data"
Sharding = Literal["replicated", "zero1", "fsdp"]
# Names of leaves that are divided; norms and biases are too small to be worth it. Optimizer moments have the names of
# their parameters.
DIVIDED = ("kernel", "embedding")


def make_mesh(devices: list[jax.Device] | None = None) -> Mesh:
    """All devices of all processes along one axis, or those given."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), (DATA,), axis_types=(AxisType.Auto,), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def divided(tree: Any, mesh: Mesh) -> Any:
    """A PartitionSpec for every leaf: those named in DIVIDED along the first axis that is a multiple of the devices.

    Whole where there is none: of the 137M model all matrices are divided over powers of two up to 256 devices, and 62 %
    of the parameters over 512 or 1,024, of which 768, its width, is no multiple.
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
    """Every leaf whole on the first device of this process; to be called by all processes."""
    gathered = jax.jit(lambda leaves: leaves, out_shardings=replicated(mesh))(tree)
    return jax.tree.map(lambda x: x.addressable_data(0), gathered)


def put_rows(arrays: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows to its devices, as parts of global arrays whose first axis is dealt over all devices."""
    sharding = NamedSharding(mesh, P(DATA))
    return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in arrays.items()}

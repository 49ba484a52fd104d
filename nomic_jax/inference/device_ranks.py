"""Counts on the devices how many documents score above a limit, for the ranks in a block of a consistency filter."""

from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

QUERIES_AT_ONCE = 1024
DOCUMENTS_PER_DEVICE = 262_144  # 1 GB of scores with as many queries


class Rows(Protocol):
    """An array, or an object that returns copies of its rows."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice, /) -> np.ndarray: ...


def count_above(queries_QE: Rows, documents_NE: Rows, limit_Q: np.ndarray) -> np.ndarray:
    """Returns int64 [Q]: for each query, the number of documents whose inner product with it is above its limit.

    Documents are split among the local devices, in blocks that fit in memory. Products are computed in full float32,
    which is not the default on a GPU.
    """
    mesh = jax.make_mesh(
        (jax.local_device_count(),), ("data",), axis_types=(AxisType.Auto,), devices=jax.local_devices()
    )
    divided, replicated = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    part = min(DOCUMENTS_PER_DEVICE * mesh.size, -(-len(documents_NE) // mesh.size) * mesh.size)
    count_Q = np.zeros(len(limit_Q), np.int64)
    for first in range(0, len(documents_NE), part):
        documents = documents_NE[first : first + part]
        # Filler rows are masked, so that all blocks have one shape, which compiles once.
        is_there = np.arange(part) < len(documents)
        documents = np.concatenate([documents, np.zeros((part - len(documents), documents.shape[1]), np.float32)])
        on_device = jax.device_put((documents, is_there), divided)
        counts = []
        for start in range(0, len(limit_Q), QUERIES_AT_ONCE):
            batch = slice(start, start + QUERIES_AT_ONCE)
            query_BE, limit_B = queries_QE[batch], limit_Q[batch].astype(np.float32)
            missing = min(QUERIES_AT_ONCE, len(limit_Q)) - len(limit_B)
            query_BE, limit_B = np.pad(query_BE, ((0, missing), (0, 0))), np.pad(limit_B, (0, missing))
            counts.append(_count(*jax.device_put((query_BE, limit_B), replicated), *on_device))
        count_Q += np.concatenate([np.asarray(count) for count in counts])[: len(limit_Q)]
    return count_Q


@jax.jit
def _count(query_BE: jax.Array, limit_B: jax.Array, document_NE: jax.Array, is_there_N: jax.Array) -> jax.Array:
    score_BN = jnp.matmul(query_BE, document_NE.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.sum((score_BN > limit_B[:, None]) & is_there_N, axis=1)

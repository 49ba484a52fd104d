"""Counting on the devices how many documents score above a limit: the ranks of a consistency filter's block."""

from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

QUERIES_AT_ONCE = 1024
DOCUMENTS_PER_DEVICE = 262_144  # 1 GB of scores with as many queries


class Rows(Protocol):
    """An array, or what gives copies of its rows."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice, /) -> np.ndarray: ...


def count_above(queries_QE: Rows, documents_NE: Rows, limit_Q: np.ndarray) -> np.ndarray:
    """int64 [Q]: the documents whose inner product with the query is above its limit.

    Documents are divided among the local devices, in parts that fit. Products are computed in full float32, which a GPU
    would otherwise not do.
    """
    mesh = jax.make_mesh(
        (jax.local_device_count(),), ("data",), axis_types=(AxisType.Auto,), devices=jax.local_devices()
    )
    divided, everywhere = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    part = min(DOCUMENTS_PER_DEVICE * mesh.size, -(-len(documents_NE) // mesh.size) * mesh.size)
    count_Q = np.zeros(len(limit_Q), np.int64)
    for first in range(0, len(documents_NE), part):
        documents = documents_NE[first : first + part]
        # Rows beyond the documents are masked: every part has one shape, and compiles once.
        is_there = np.arange(part) < len(documents)
        documents = np.concatenate([documents, np.zeros((part - len(documents), documents.shape[1]), np.float32)])
        on_device = jax.device_put((documents, is_there), divided)
        counts = []
        for start in range(0, len(limit_Q), QUERIES_AT_ONCE):
            batch = slice(start, start + QUERIES_AT_ONCE)
            query_BE, limit_B = queries_QE[batch], limit_Q[batch].astype(np.float32)
            missing = min(QUERIES_AT_ONCE, len(limit_Q)) - len(limit_B)
            query_BE, limit_B = np.pad(query_BE, ((0, missing), (0, 0))), np.pad(limit_B, (0, missing))
            counts.append(_count(*jax.device_put((query_BE, limit_B), everywhere), *on_device))
        count_Q += np.concatenate([np.asarray(count) for count in counts])[: len(limit_Q)]
    return count_Q


@jax.jit
def _count(query_BE: jax.Array, limit_B: jax.Array, document_NE: jax.Array, is_there_N: jax.Array) -> jax.Array:
    score_BN = jnp.matmul(query_BE, document_NE.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.sum((score_BN > limit_B[:, None]) & is_there_N, axis=1)

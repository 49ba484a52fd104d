"""Rows of an embedding table by id, with a gradient that is exact in float32 and the same in every run.

The gradient of a lookup adds up the cotangents of all occurrences of an id. XLA would do this with a scatter. On a GPU
its atomic additions come in any order, so two runs differ, and tokens with one id wait for each other: with 30 % [MASK]
this took more than half of a masked-LM step. Here the ids are sorted, so the occurrences of an id are one run of rows.
Products with 0/1 matrices add up the runs within blocks, and again over the blocks that a run spans.
"""

import jax
import jax.numpy as jnp

from nomic_jax.model.varying import varying_as

# Rows of a block. Its 0/1 matrix costs this number of multiply-adds for each component of a row.
BLOCK = 64


def lookup(table_VD: jax.Array, ids: jax.Array) -> jax.Array:
    """Returns the rows [..., D] of ``ids`` [...] in the dtype of the table; NaN for an id beyond the table.

    Give the float32 table and cast the result: a table in 16 bits would also round its gradient to 16 bits. A value
    that is not finite in the cotangent may reach the gradients of other ids.
    """
    return _lookup(varying_as(table_VD, ids), ids)


@jax.custom_vjp
def _lookup(table_VD: jax.Array, ids: jax.Array) -> jax.Array:
    return jnp.take(table_VD, ids, axis=0)


def _forward(table_VD: jax.Array, ids: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _lookup(table_VD, ids), (ids, table_VD[:, :0])  # the empty slice carries the size and the dtype


def _backward(residuals: tuple[jax.Array, jax.Array], cotangent: jax.Array) -> tuple[jax.Array, None]:
    ids, empty_V0 = residuals
    gradient_VD = sums_by_id(cotangent.reshape(-1, cotangent.shape[-1]), ids.reshape(-1), len(empty_V0))
    return gradient_VD.astype(empty_V0.dtype), None


_lookup.defvjp(_forward, _backward)


def sums_by_id(x_TD: jax.Array, ids_T: jax.Array, num_ids: int) -> jax.Array:
    """Returns the sums [num_ids, D], float32, of the rows with each id. Ids are at least 0 and below ``num_ids``."""
    T = len(ids_T)
    if T == 0:
        return jnp.zeros((num_ids, x_TD.shape[1]), jnp.float32)
    position_T = jnp.arange(T, dtype=jnp.int32)
    id_T, order_T = jax.lax.sort((ids_T.astype(jnp.int32), position_T), num_keys=1)
    sorted_TD = x_TD.at[order_T].get(mode="promise_in_bounds", unique_indices=True).astype(jnp.float32)
    is_first_T = jnp.concatenate([jnp.ones(1, bool), id_T[1:] != id_T[:-1]])
    # Where the run of each id starts, T for an id that does not occur. Other rows get indices that are out of range.
    start_V = jnp.full(num_ids, T, jnp.int32)
    start_V = start_V.at[jnp.where(is_first_T, id_T, num_ids + position_T)].set(
        position_T, mode="drop", unique_indices=True
    )
    sums_VD = _sums_of_runs(sorted_TD, is_first_T, jnp.minimum(start_V, T - 1))
    return jnp.where((start_V < T)[:, None], sums_VD, 0)


def _sums_of_runs(x_TD: jax.Array, is_first_T: jax.Array, start_R: jax.Array) -> jax.Array:
    """Returns the sums [R, D] of runs of consecutive rows.

    Args:
      x_TD: the rows, float32.
      is_first_T: whether a run starts at a row.
      start_R: the first row of each wanted run.
    """
    x_TD = jnp.pad(x_TD, ((0, -len(x_TD) % BLOCK), (0, 0)))
    is_first_T = jnp.pad(is_first_T, (0, -len(is_first_T) % BLOCK), constant_values=True)
    x_NtD, is_first_Nt = x_TD.reshape(-1, BLOCK, x_TD.shape[1]), is_first_T.reshape(-1, BLOCK)
    N = len(x_NtD)
    # Numbers the runs of a block from 0. The first may have started in an earlier block.
    run_Nt = jnp.cumsum(is_first_Nt, axis=1, dtype=jnp.int32) - is_first_Nt[:, :1]
    is_of_run_Nrt = run_Nt[:, None, :] == jnp.arange(BLOCK)[:, None]
    sums_NrD = jnp.einsum("nrt,ntd->nrd", is_of_run_Nrt.astype(jnp.float32), x_NtD, precision=jax.lax.Precision.HIGHEST)
    block_R = start_R // BLOCK
    run_R = run_Nt[block_R, start_R % BLOCK]
    sums_RD = sums_NrD[block_R, run_R]
    if N == 1:
        return sums_RD
    # A run that goes on over later blocks is the first run of each of them. Its sums there are a run of blocks.
    goes_on_N = ~is_first_Nt[:, 0]
    rest_ND = jnp.where(goes_on_N[:, None], sums_NrD[:, 0], 0)
    starts_rest_N = ~goes_on_N | jnp.concatenate([jnp.ones(1, bool), jnp.any(is_first_Nt[:-1], axis=1)])
    next_R = jnp.minimum(block_R + 1, N - 1)
    has_rest_R = (run_R == run_Nt[block_R, -1]) & (block_R + 1 < N) & goes_on_N[next_R]
    return sums_RD + jnp.where(has_rest_R[:, None], _sums_of_runs(rest_ND, starts_rest_N, next_R), 0)

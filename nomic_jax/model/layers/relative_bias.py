"""The relative position bias of MPNet: what attention adds to the score of two tokens by their distance.

Distances are sorted into buckets as in T5 (arXiv:1910.10683, section 2.1): half of the buckets are for keys after the
query; of each half, the first half is for one distance each, the rest grow with the logarithm of the distance.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from nomic_jax.model.layers.table_lookup import lookup

MAX_DISTANCE = 128  # all larger distances share the last bucket; transformers has no field for it


def relative_bias(table_RH: jax.Array, length: int) -> jax.Array:
    """Returns the bias [H, 2L - 1] of every offset (key minus query, from 1 - L), float32.

    Texts are contiguous, so that positions in a packed row serve as well as those in a text.

    Args:
      table_RH: the bias of each bucket and head.
      length: L, of the rows.
    """
    bucket_O = buckets(np.arange(1 - length, length), len(table_RH))
    return lookup(table_RH, jnp.array(bucket_O)).T


def bias_of_queries(bias_XO: jax.Array, start: int | jax.Array, count: int) -> jax.Array:
    """Returns the bias [X, Q, L] of ``count`` consecutive queries, the first at ``start``, and of all L keys.

    Args:
      bias_XO: see ``relative_bias``; X heads.
      start: may lie so near the end that queries beyond L follow, whose bias has no meaning.
    """
    X, length = len(bias_XO), (bias_XO.shape[1] + 1) // 2
    # From the last query's offset to the first key, to the first query's to the last key. Queries beyond L get zeros.
    span = count + length - 1
    bias_XS = jax.lax.dynamic_slice_in_dim(
        jnp.pad(bias_XO, ((0, 0), (count, 0))), jnp.asarray(length - start), span, axis=1
    )
    # The first query's row starts at Q - 1, each later one a place before. Rolled by that, with a value more, repeated
    # and cut into rows without it, each row starts a place before the last one. A lookup of Q * L values would have a
    # scatter as its gradient.
    first = count - 1
    rolled = jnp.concatenate([bias_XS[:, first:], jnp.zeros_like(bias_XS[:, :1]), bias_XS[:, :first]], axis=1)
    repeated = jnp.broadcast_to(rolled[:, None, :], (X, count, span + 1)).reshape(X, -1)
    return repeated[:, : count * span].reshape(X, count, span)[:, :, :length]


def buckets(offset: np.ndarray, num_buckets: int) -> np.ndarray:
    """Returns the bucket, int32, of offsets (key minus query), computed in float32 as transformers does."""
    half = num_buckets // 2
    exact = half // 2
    distance = np.abs(offset)
    logarithm = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact), dtype=np.float32)
    large = exact + (logarithm / np.float32(math.log(MAX_DISTANCE / exact)) * np.float32(half - exact)).astype(np.int32)
    return (half * (offset > 0) + np.where(distance < exact, distance, np.minimum(large, half - 1))).astype(np.int32)

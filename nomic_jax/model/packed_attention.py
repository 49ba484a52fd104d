"""Attention of packed rows on a CPU, which skips blocks of queries and keys of different texts."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

# Queries and keys of a block. With it, both products of a block of 12 heads and the weights between them stay in the
# caches of a core: on an AMD EPYC, blocks of 512 keys took 1.2 times as long.
CPU_BLOCK = 256
# Tokens of a row for the other operations of a layer, which are fastest so on a CPU.
_ROW = 128
# Sums of weights beyond it are computed again. Weights of float32 overflow at 3e38.
_LARGEST_SUM = 1e30
# Added to the score of a key of another text.
_APART = -1e37


def block_by_block(q_BLHK, k_BLHK, v_BLHK, segment_BL: jax.Array) -> jax.Array:
    """Attention of packed rows: only blocks of queries and keys of a common text, in one pass over the keys.

    All rows count as one: a text may go on in the next row, and no two texts have one number. The work follows the
    lengths of the texts, whatever the length of a row. The number of blocks depends on the segments, so there is no
    gradient. The output at padding is not 0.

    A weight is exp(score - the query's score with itself), not with the largest score, which would have to be known
    before. So XLA makes one kernel of both products and the exponential. The sum of a query's weights is at least 1,
    and a weight that underflows is below 2e-38. Where a sum is larger than 1e30, which takes a score of more than 60
    above the query's own, the block of queries is computed again from its largest scores. Either way, the result
    differs from the formula by rounding alone.
    """
    H, K = q_BLHK.shape[2:]
    text_T = segment_BL.reshape(-1)
    side = math.gcd(len(text_T), CPU_BLOCK)
    start_T, end_T = _bounds(text_T)

    def in_blocks(x_BLHK: jax.Array) -> jax.Array:
        return x_BLHK.reshape(-1, side, H, x_BLHK.shape[-1]).transpose(0, 2, 1, 3)

    q_BLHK = q_BLHK * K**-0.5
    own_BLH1 = jnp.sum(q_BLHK.astype(jnp.float32) * k_BLHK.astype(jnp.float32), axis=-1, keepdims=True)
    # The product with the last column adds up the weights.
    ones_BLH1 = jnp.ones((*v_BLHK.shape[:3], 1), v_BLHK.dtype)
    values, keys = in_blocks(jnp.concatenate([v_BLHK, ones_BLH1], axis=-1)), in_blocks(k_BLHK)
    text_of_key = text_T.reshape(-1, side)

    def one_block(query):
        q_HQK, own_HQ1, text_Q, first, end = query

        def over_keys(step: Callable[[jax.Array, jax.Array, jax.Array], jax.Array], initial: jax.Array) -> jax.Array:
            """Returns the last of the states; ``step`` makes them of the last one, the scores and the values."""

            def with_keys(state):
                block, carried = state
                scores_HQS = jnp.einsum("hqk,hsk->hqs", q_HQK, keys[block], preferred_element_type=jnp.float32)
                # A sum becomes a part of the kernel; a choice between two values does not.
                apart_QS = jnp.where(text_Q[:, None] == text_of_key[block], 0.0, _APART)
                return block + 1, step(carried, scores_HQS + apart_QS, values[block])

            return jax.lax.while_loop(lambda state: state[0] < end, with_keys, (first, initial))[1]

        def sums(subtracted_HQ1: jax.Array) -> jax.Array:
            """Returns the sums of weighted values, and of weights, [H, Q, K + 1]."""

            def step(sums_HQX, scores_HQS, values_HSX):
                weights_HQS = jnp.exp(scores_HQS - subtracted_HQ1).astype(values_HSX.dtype)
                return sums_HQX + jnp.einsum(
                    "hqs,hsx->hqx", weights_HQS, values_HSX, preferred_element_type=jnp.float32
                )

            return over_keys(step, jnp.zeros((H, side, K + 1), jnp.float32))

        def sums_of_largest() -> jax.Array:
            def step(most_HQ1, scores_HQS, _):
                return jnp.maximum(most_HQ1, jnp.max(scores_HQS, axis=-1, keepdims=True))

            return sums(over_keys(step, jnp.full((H, side, 1), jnp.finfo(jnp.float32).min)))

        sums_HQX = sums(own_HQ1)
        is_exact = jnp.max(jnp.abs(sums_HQX)) < _LARGEST_SUM  # not if one of them is NaN
        sums_HQX = jax.lax.cond(is_exact, lambda: sums_HQX, sums_of_largest)
        return (sums_HQX[..., :K] / sums_HQX[..., K:]).astype(q_HQK.dtype)

    first_block, end_block = start_T[::side] // side, -(-end_T[side - 1 :: side] // side)
    out = jax.lax.map(one_block, (in_blocks(q_BLHK), in_blocks(own_BLH1), text_of_key, first_block, end_block))
    return out.transpose(0, 2, 1, 3).reshape(q_BLHK.shape)


def rows_in_blocks(segment_BL: jax.Array) -> jax.Array:
    """Returns the segments of packed rows as "cpu_packed" wants them: short rows, and no number twice in all rows.

    Short rows are what makes the other operations of a layer fast on a CPU. All arrays of the tokens get their shape.
    """
    B, L = segment_BL.shape
    return (segment_BL + jnp.arange(B)[:, None] * (L + 1)).reshape(-1, math.gcd(B * L, _ROW))


def _bounds(text_T: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns where the text of each token starts and ends, int32 [T] each. The tokens of a text are contiguous."""
    T = len(text_T)
    index_T = jnp.arange(T)
    is_first_T = jnp.concatenate([jnp.ones(1, bool), text_T[1:] != text_T[:-1]])
    start_T = jax.lax.cummax(jnp.where(is_first_T, index_T, 0))
    next_T = jnp.concatenate([jnp.where(is_first_T, index_T, T)[1:], jnp.full(1, T)])
    return start_T, jax.lax.cummin(next_T, reverse=True)

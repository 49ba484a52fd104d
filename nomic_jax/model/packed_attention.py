"""Attention of packed rows on a CPU, which skips blocks of queries and keys of different texts."""

import math

import jax
import jax.numpy as jnp

# Sides of a block of "cpu_packed": queries and keys, and keys in rows so long that their texts have many blocks.
CPU_BLOCK, CPU_LONG_ROW, CPU_LONG_BLOCK = 128, 2048, 512


def block_by_block(q_BLHK, k_BLHK, v_BLHK, segment_BL: jax.Array) -> jax.Array:
    """Attention of packed rows: only blocks of queries and keys of a common text, in one pass over the keys.

    All rows count as one: a text may go on in the next row, and no two texts have one number. The work follows the
    lengths of the texts, whatever the length of a row. The softmax is updated from block to block
    (Milakov and Gimelshein 2018, arXiv:1805.02867). The number of blocks depends on the segments, so there is no
    gradient. The output at padding is not 0.
    """
    H, K = q_BLHK.shape[2:]
    text_T = segment_BL.reshape(-1)
    T = len(text_T)
    query_side = math.gcd(T, CPU_BLOCK)
    key_side = math.gcd(T, CPU_LONG_BLOCK if T >= CPU_LONG_ROW else CPU_BLOCK)
    start_T, end_T = _bounds(text_T)
    first_block, end_block = start_T[::query_side] // key_side, -(-end_T[query_side - 1 :: query_side] // key_side)

    def in_blocks(x_BLHK: jax.Array, side: int) -> jax.Array:
        return x_BLHK.reshape(-1, side, H, K).transpose(0, 2, 1, 3)

    q_BLHK = q_BLHK * K**-0.5
    keys, values, text_of_key = in_blocks(k_BLHK, key_side), in_blocks(v_BLHK, key_side), text_T.reshape(-1, key_side)

    def one_block(query):
        q_HQK, text_Q, first, end = query

        def with_keys(state):
            block, most_HQ1, sum_HQ1, out_HQK = state
            scores_HQS = jnp.einsum("hqk,hsk->hqs", q_HQK, keys[block], preferred_element_type=jnp.float32)
            scores_HQS = jnp.where(text_Q[:, None] == text_of_key[block], scores_HQS, lowest)
            new_most_HQ1 = jnp.maximum(most_HQ1, jnp.max(scores_HQS, axis=-1, keepdims=True))
            # A query whose text has no key in this block adds the weights 1 here. Its own keys cancel them, because
            # exp(lowest - score) is 0.
            weights_HQS = jnp.exp(scores_HQS - new_most_HQ1)
            rest_HQ1 = jnp.exp(most_HQ1 - new_most_HQ1)
            sum_HQ1 = sum_HQ1 * rest_HQ1 + jnp.sum(weights_HQS, axis=-1, keepdims=True)
            added_HQK = jnp.einsum(
                "hqs,hsk->hqk", weights_HQS.astype(values.dtype), values[block], preferred_element_type=jnp.float32
            )
            return block + 1, new_most_HQ1, sum_HQ1, out_HQK * rest_HQ1 + added_HQK

        none_HQ1 = jnp.zeros((H, query_side, 1), jnp.float32)
        state = first, none_HQ1 + lowest, none_HQ1, jnp.zeros(q_HQK.shape, jnp.float32)
        _, _, sum_HQ1, out_HQK = jax.lax.while_loop(lambda state: state[0] < end, with_keys, state)
        return (out_HQK / sum_HQ1).astype(q_HQK.dtype)

    lowest = jnp.finfo(jnp.float32).min
    out = jax.lax.map(
        one_block, (in_blocks(q_BLHK, query_side), text_T.reshape(-1, query_side), first_block, end_block)
    )
    return out.transpose(0, 2, 1, 3).reshape(q_BLHK.shape)


def rows_in_blocks(segment_BL: jax.Array) -> jax.Array:
    """Returns the segments of packed rows as "cpu_packed" wants them: short rows, and no number twice in all rows.

    Short rows are what makes the other operations of a layer fast on a CPU. All arrays of the tokens get their shape.
    """
    B, L = segment_BL.shape
    return (segment_BL + jnp.arange(B)[:, None] * (L + 1)).reshape(-1, math.gcd(B * L, CPU_BLOCK))


def _bounds(text_T: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns where the text of each token starts and ends, int32 [T] each. The tokens of a text are contiguous."""
    T = len(text_T)
    index_T = jnp.arange(T)
    is_first_T = jnp.concatenate([jnp.ones(1, bool), text_T[1:] != text_T[:-1]])
    start_T = jax.lax.cummax(jnp.where(is_first_T, index_T, 0))
    next_T = jnp.concatenate([jnp.where(is_first_T, index_T, T)[1:], jnp.full(1, T)])
    return start_T, jax.lax.cummin(next_T, reverse=True)

"""The dense formula of attention: all scores at once, a part of those of one head at a time, or those within a window.

Within a window, the cost grows with length times window. A block of queries is at least as long as the window, so that
its tokens attend only to the block of keys at the same place and to its neighbours, which are concatenated.
"""

import functools

import jax
import jax.numpy as jnp

from nomic_jax.model.layers.relative_bias import bias_of_queries

# The smallest block of queries; smaller ones make matrix products that are too small for any device.
BLOCK = 64


def softmax(scores: jax.Array, mask: jax.Array | None, bias: jax.Array | None = None) -> jax.Array:
    """Returns the float32 softmax over the last axis of scores + bias where ``mask`` is True; uniform without any."""
    scores = scores.astype(jnp.float32)
    return _masked_softmax(scores if bias is None else scores + bias, mask)


@jax.custom_vjp
def _masked_softmax(scores: jax.Array, mask: jax.Array | None) -> jax.Array:
    """The backward pass keeps the result alone."""
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    return jax.nn.softmax(scores, axis=-1)


def _softmax_forward(scores: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    weights = _masked_softmax(scores, mask)
    return weights, weights


def _softmax_backward(weights: jax.Array, gradient: jax.Array) -> tuple[jax.Array, None]:
    # Where the mask is False, the weights are 0, and so is this.
    return weights * (gradient - jnp.sum(gradient * weights, axis=-1, keepdims=True)), None


_masked_softmax.defvjp(_softmax_forward, _softmax_backward)


def dense(q_BLHK, k_BLGK, v_BLGK, *, length_B, segment_BL, causal: bool, bias_HO) -> jax.Array:
    """Returns the output [B, L, H, K]. The arguments are those of ``nomic_jax.model.attention.attention``."""
    B, L, H, K = q_BLHK.shape
    G = k_BLGK.shape[2]
    # Heads come before length, so that both products are plain batched matrix products without strided reads. The
    # queries of all heads that share keys are rows of one matrix.
    q_BHLK, k_BGLK, v_BGLK = (x.transpose(0, 2, 1, 3) for x in (q_BLHK, k_BLGK, v_BLGK))
    q_BGQK = (q_BHLK * K**-0.5).reshape(B, G, H // G * L, K)
    scores_BGQL = jnp.einsum("bhqk,bhlk->bhql", q_BGQK, k_BGLK, preferred_element_type=jnp.float32)
    mask_BLL = segment_BL[:, :, None] == segment_BL[:, None, :] if segment_BL is not None else _key_mask(L, length_B)
    if causal:
        before_1LL = jnp.tril(jnp.ones((1, L, L), bool))
        mask_BLL = before_1LL if mask_BLL is None else mask_BLL & before_1LL
    bias_HLL = None if bias_HO is None else bias_of_queries(bias_HO, 0, L)
    # Padding has segment 0 and attends only to padding: its softmax stays finite, and no text attends to it.
    weights_BHLL = softmax(scores_BGQL.reshape(B, H, L, L), None if mask_BLL is None else mask_BLL[:, None], bias_HLL)
    weights_BGQL = weights_BHLL.astype(v_BGLK.dtype).reshape(scores_BGQL.shape)
    out_BGQK = jnp.einsum("bhql,bhlk->bhqk", weights_BGQL, v_BGLK)
    return out_BGQK.reshape(B, H, L, K).transpose(0, 2, 1, 3)


def head_by_head(q_BLHK, k_BLGK, v_BLGK, *, length_B, segment_BL, causal: bool, bias_HO, most_scores: int) -> jax.Array:
    """Computes ``dense`` with at most about ``most_scores`` scores at a time, forward and backward.

    Raises:
      ValueError: there is a bias, and keys have fewer heads than queries.
    """
    B, L, H, K = q_BLHK.shape
    G = k_BLGK.shape[2]
    if bias_HO is not None and G < H:
        raise ValueError("a relative position bias needs as many heads of keys as of queries")
    # The queries of all heads that share keys, one after the other.
    Q = H // G * L
    block = min(Q, max(64, most_scores // (B * L)))
    blocks = -(-Q // block)

    def in_blocks(x_BQX: jax.Array) -> jax.Array:
        """Returns [blocks, B, block, X], with zeros beyond Q."""
        x_BQX = jnp.pad(x_BQX, ((0, 0), (0, blocks * block - Q), (0, 0)))
        return x_BQX.reshape(x_BQX.shape[0], blocks, block, -1).swapaxes(0, 1)

    def of_queries(x_BL: jax.Array) -> jax.Array:
        return in_blocks(jnp.tile(x_BL, (1, H // G))[:, :, None])

    key_mask_B1L = None if segment_BL is not None else _key_mask(L, length_B)
    # The queries that fill the last block are at position 0 of segment 0; their outputs are cut off.
    segment_blocks = None if segment_BL is None else of_queries(segment_BL)
    index_blocks = of_queries(jnp.arange(L)[None]) if causal else None

    def one_head(qkv_and_bias):
        q_BQK, k_BLK, v_BLK, bias_O = qkv_and_bias

        @jax.checkpoint
        def one_block(query):
            q_BQK, segment_BQ1, index_1Q1, start = query
            masks = [] if key_mask_B1L is None else [key_mask_B1L]
            if segment_BQ1 is not None:
                masks.append(segment_BQ1 == segment_BL[:, None, :])
            if index_1Q1 is not None:
                masks.append(jnp.arange(L) <= index_1Q1)
            mask_BQL = functools.reduce(jnp.logical_and, masks) if masks else None
            scores_BQL = jnp.einsum("bqk,blk->bql", q_BQK, k_BLK, preferred_element_type=jnp.float32)
            bias_1QL = None if bias_O is None else bias_of_queries(bias_O[None], start, block)
            weights_BQL = softmax(scores_BQL, mask_BQL, bias_1QL)
            return jnp.einsum("bql,blk->bqk", weights_BQL.astype(v_BLK.dtype), v_BLK)

        starts = None if bias_O is None else block * jnp.arange(blocks)
        out = jax.lax.map(one_block, (in_blocks(q_BQK * K**-0.5), segment_blocks, index_blocks, starts))
        return out.swapaxes(0, 1).reshape(B, blocks * block, K)[:, :Q]

    q_GBQK = jnp.moveaxis(q_BLHK.reshape(B, L, G, H // G, K), (2, 3), (0, 2)).reshape(G, B, Q, K)
    k_GBLK, v_GBLK = (jnp.moveaxis(x, 2, 0) for x in (k_BLGK, v_BLGK))
    out_GBQK = jax.lax.map(one_head, (q_GBQK, k_GBLK, v_GBLK, bias_HO))
    return jnp.moveaxis(out_GBQK.reshape(G, B, H // G, L, K), (0, 2), (2, 3)).reshape(B, L, H, K)


def local_attention(
    q_BLHK: jax.Array,
    k_BLGK: jax.Array,
    v_BLGK: jax.Array,
    *,
    length_B: jax.Array | None,
    segment_BL: jax.Array | None,
    causal: bool,
    window: int,
    one_head_at_a_time: bool,
) -> jax.Array:
    """Returns the output [B, L, H, K] of attention to the tokens at most ``window`` positions away.

    The arguments are those of ``nomic_jax.model.attention.attention``. With ``one_head_at_a_time``, the scores of one
    head of keys exist at a time, forward and backward.
    """
    B, L, H, K = q_BLHK.shape
    G = k_BLGK.shape[2]
    block = max(window, BLOCK)
    N = -(-L // block)

    def blocks(x_BL: jax.Array, fill: int) -> jax.Array:
        """Returns [B, N, block, ...]: the second axis in blocks, the last one filled up."""
        padding = [(0, 0), (0, N * block - L)] + [(0, 0)] * (x_BL.ndim - 2)
        return jnp.pad(x_BL, padding, constant_values=fill).reshape(x_BL.shape[0], N, block, *x_BL.shape[2:])

    def neighbourhoods(x_BL: jax.Array, fill: int) -> jax.Array:
        """Returns [B, N, 2 or 3 blocks, ...]: each block with the one before and, unless causal, the one after it."""
        x_BNS = blocks(x_BL, fill)
        around = [(1, 0), (1, 1)][not causal]
        padding = [(0, 0), around] + [(0, 0)] * (x_BNS.ndim - 2)
        x_BNS = jnp.pad(x_BNS, padding, constant_values=fill)
        return jnp.concatenate([x_BNS[:, i : i + N] for i in range(1 + sum(around))], axis=2)

    # What fills up is far from all tokens. It attends to itself, which keeps its softmax finite.
    index_1L, far = jnp.arange(L)[None], -(2**30)
    query_1NQ1, key_1N1S = blocks(index_1L, far)[..., None], neighbourhoods(index_1L, far)[..., None, :]
    mask_BNQS = jnp.abs(query_1NQ1 - key_1N1S) <= window
    if causal:
        mask_BNQS &= key_1N1S <= query_1NQ1
    if segment_BL is not None:
        mask_BNQS &= blocks(segment_BL, 0)[..., None] == neighbourhoods(segment_BL, 0)[..., None, :]
    elif length_B is not None:
        mask_BNQS &= key_1N1S < length_B[:, None, None, None]

    def one_head(qkv: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        """Computes [B, L, R, K] of the R heads of queries that share a head of keys and values, [B, L, K]."""
        q_BLRK, k_BLK, v_BLK = qkv
        # The queries of a block of all heads are rows of one matrix.
        q_BNRQK = blocks(q_BLRK * K**-0.5, 0).swapaxes(2, 3)
        R = q_BNRQK.shape[2]
        q_BNXK = q_BNRQK.reshape(B, N, R * block, K)
        k_BNSK, v_BNSK = neighbourhoods(k_BLK, 0), neighbourhoods(v_BLK, 0)
        scores_BNXS = jnp.einsum("bnxk,bnsk->bnxs", q_BNXK, k_BNSK, preferred_element_type=jnp.float32)
        weights = softmax(scores_BNXS.reshape(B, N, R, block, -1), mask_BNQS[:, :, None])
        out_BNXK = jnp.einsum("bnxs,bnsk->bnxk", weights.astype(v_BLK.dtype).reshape(scores_BNXS.shape), v_BNSK)
        return out_BNXK.reshape(B, N, R, block, K).swapaxes(2, 3).reshape(B, N * block, R, K)[:, :L]

    q_GBLRK = jnp.moveaxis(q_BLHK.reshape(B, L, G, H // G, K), 2, 0)
    heads = q_GBLRK, jnp.moveaxis(k_BLGK, 2, 0), jnp.moveaxis(v_BLGK, 2, 0)
    out_GBLRK = jax.lax.map(jax.checkpoint(one_head), heads) if one_head_at_a_time else jax.vmap(one_head)(heads)
    return jnp.moveaxis(out_GBLRK, 0, 2).reshape(B, L, H, K)


def _key_mask(L: int, length_B: jax.Array | None) -> jax.Array | None:
    """Returns True [B, 1, L] for the keys of each text; None if all rows are full."""
    if length_B is None:
        return None
    # A text without tokens has no key to attend to. It attends to the first position, which avoids NaN.
    return (jnp.arange(L) < jnp.maximum(length_B, 1)[:, None])[:, None, :]

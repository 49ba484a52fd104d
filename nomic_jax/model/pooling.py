"""Pooling: the hidden states of a text's tokens to one vector, of padded and of packed rows, in float32.

The ways and their names are those of sentence-transformers:

    cls                    the first token (bge)
    max                    the maximum over the tokens, of each component
    mean                   the mean over the tokens (nomic, gte, e5, MiniLM)
    mean_sqrt_len_tokens   their sum, divided by the square root of their number
    weightedmean           their mean with the weights 1, 2, 3, ... (SGPT)
    lasttoken              the last token (Qwen3-Embedding, e5-mistral)

Several, joined by "+", are concatenated.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

# In the order in which sentence-transformers concatenates them, unless a directory lists them in another.
POOLINGS = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")


def pooled(hidden_BLD: jax.Array, length_B: jax.Array, pooling: str) -> jax.Array:
    """Returns a vector of each padded row, float32 [B, D times the number of poolings].

    Args:
      hidden_BLD: hidden states, of any dtype.
      length_B: numbers of real tokens, which come first in the rows.
      pooling: names of POOLINGS, joined by "+".
    """
    # Left to itself, XLA stores the hidden states of all layers length-last, as the mean reads them. On a GPU, each
    # LayerNorm then takes three kernels instead of one.
    hidden_BLD = with_layout_constraint(hidden_BLD, Layout((0, 1, 2))).astype(jnp.float32)

    def by(name: str) -> jax.Array:
        if name == "cls":
            return hidden_BLD[:, 0]
        index_L = jnp.arange(hidden_BLD.shape[1])
        real_BL = index_L < length_B[:, None]
        if name == "max":
            maximum_BD = jnp.max(jnp.where(real_BL[:, :, None], hidden_BLD, -jnp.inf), axis=1)
            return jnp.where(length_B[:, None] > 0, maximum_BD, 0.0)
        weight_BL = real_BL.astype(jnp.float32)
        if name == "lasttoken":
            # A product, not a gather, whose gradient would be a scatter.
            weight_BL = (index_L == length_B[:, None] - 1).astype(jnp.float32)
        elif name == "weightedmean":
            weight_BL = weight_BL * (index_L + 1)
        sum_BD = jnp.einsum("bld,bl->bd", hidden_BLD, weight_BL)
        return _divided(sum_BD, jnp.maximum(length_B, 1)[:, None], name)

    return _concatenated([by(name) for name in pooling.split("+")])


def pooled_segments(
    hidden_BLD: jax.Array, segment_BL: jax.Array, num_segments: int, pooling: str
) -> tuple[jax.Array, jax.Array]:
    """Returns a vector of each text of packed rows, float32 [B, S, D times the number of poolings], and which exist.

    Args:
      hidden_BLD: hidden states of rows that hold several texts each.
      segment_BL: 1, 2, ... for the texts of a row, each contiguous, and 0 for padding.
      num_segments: S, the maximum number of texts per row.
      pooling: names of POOLINGS, joined by "+".
    """
    hidden_BLD = hidden_BLD.astype(jnp.float32)
    own_BLS = segment_BL[:, :, None] == jnp.arange(1, num_segments + 1)

    def by(name: str) -> jax.Array:
        if name == "max":
            return _segment_max(hidden_BLD, segment_BL, num_segments)
        weight_BLS = own_BLS
        # Products, not gathers: absent texts would all name one token, and the gradient would be a scatter that adds.
        if name == "cls":
            is_first_BL = jnp.diff(segment_BL, axis=1, prepend=0) != 0
            weight_BLS = own_BLS & is_first_BL[:, :, None]
        elif name == "lasttoken":
            is_last_BL = jnp.diff(segment_BL, axis=1, append=0) != 0
            weight_BLS = own_BLS & is_last_BL[:, :, None]
        count_BS = jnp.maximum(jnp.sum(weight_BLS, axis=1), 1)
        if name == "weightedmean":
            weight_BLS = own_BLS * _place_in_text(segment_BL)[:, :, None]
        sum_BSD = jnp.einsum("bld,bls->bsd", hidden_BLD, weight_BLS.astype(jnp.float32))
        return _divided(sum_BSD, count_BS[:, :, None], name)

    return _concatenated([by(name) for name in pooling.split("+")]), jnp.any(own_BLS, axis=1)


def _divided(total: jax.Array, count: jax.Array, name: str) -> jax.Array:
    if name == "mean_sqrt_len_tokens":
        return total / jnp.sqrt(count.astype(jnp.float32))
    if name == "weightedmean":
        count = count * (count + 1) / 2  # the sum of 1, 2, ..., count
    return total if name == "lasttoken" else total / count


def _concatenated(vectors: list[jax.Array]) -> jax.Array:
    return vectors[0] if len(vectors) == 1 else jnp.concatenate(vectors, axis=-1)


def _starts(segment_BL: jax.Array) -> jax.Array:
    return jnp.diff(segment_BL, axis=1, prepend=-1) != 0


def _place_in_text(segment_BL: jax.Array) -> jax.Array:
    """Returns 1, 2, ... for the tokens of each text, [B, L]."""
    index_L = jnp.arange(segment_BL.shape[1])
    return index_L - jax.lax.cummax(jnp.where(_starts(segment_BL), index_L, 0), axis=1) + 1


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _segment_max(hidden_BLD: jax.Array, segment_BL: jax.Array, num_segments: int) -> jax.Array:
    """Returns the maximum of each text, [B, S, D]; 0 for absent texts. Equal maxima share the gradient, as in jnp.max.

    ``jax.ops.segment_max`` is a scatter. A comparison with every segment would read the hidden states S times.
    """

    def later(left: tuple[jax.Array, jax.Array], right: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        (left_max, left_starts), (right_max, right_starts) = left, right
        return jnp.where(right_starts, right_max, jnp.maximum(left_max, right_max)), left_starts | right_starts

    so_far_BLD, _ = jax.lax.associative_scan(later, (hidden_BLD, _starts(segment_BL)[:, :, None]), axis=1)
    own_BLS = segment_BL[:, :, None] == jnp.arange(1, num_segments + 1)
    last_BS = jnp.max(jnp.where(own_BLS, jnp.arange(segment_BL.shape[1])[:, None], 0), axis=1)
    maximum_BSD = jnp.take_along_axis(so_far_BLD, last_BS[:, :, None], axis=1)
    return jnp.where(jnp.any(own_BLS, axis=1)[:, :, None], maximum_BSD, 0.0)


def _segment_max_forward(hidden_BLD: jax.Array, segment_BL: jax.Array, num_segments: int):
    maximum_BSD = _segment_max(hidden_BLD, segment_BL, num_segments)
    return maximum_BSD, (hidden_BLD, segment_BL, maximum_BSD)


def _segment_max_backward(num_segments: int, residuals: tuple, gradient_BSD: jax.Array) -> tuple[jax.Array, None]:
    hidden_BLD, segment_BL, maximum_BSD = residuals
    index_BL1 = jnp.clip(segment_BL - 1, 0, num_segments - 1)[:, :, None]
    own_BLS = (segment_BL[:, :, None] == jnp.arange(1, num_segments + 1)).astype(jnp.float32)
    is_maximum_BLD = hidden_BLD == jnp.take_along_axis(maximum_BSD, index_BL1, axis=1)
    is_maximum_BLD &= (segment_BL > 0)[:, :, None]
    count_BSD = jnp.einsum("bld,bls->bsd", is_maximum_BLD.astype(jnp.float32), own_BLS)
    share_BSD = gradient_BSD / jnp.maximum(count_BSD, 1)
    return jnp.where(is_maximum_BLD, jnp.take_along_axis(share_BSD, index_BL1, axis=1), 0.0), None


_segment_max.defvjp(_segment_max_forward, _segment_max_backward)

"""LayerNorm and RMSNorm in float32, with a gradient that reads its arrays as few times as XLA can.

Differentiated by rule, the formula keeps and reads several float32 arrays as large as the activations. The gradient
written out needs the input, two numbers per token, and the gradient of the output.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from nomic_jax.model.varying import varying_as

# The name of the two numbers per token that the backward pass needs, for ``jax.checkpoint``.
STATISTICS = "norm_statistics"


def layer_norm(
    x: jax.Array,
    scale_D: jax.Array,
    bias_D: jax.Array | None,
    epsilon: float,
    dtype: jax.typing.DTypeLike,
    *,
    all_kept: bool = False,
) -> jax.Array:
    """Returns (x - mean) / sqrt(variance + epsilon) * scale + bias over the last axis, [..., D] in ``dtype``.

    Without a bias, None stands for it.

    The statistics are float32, the variance that of two passes: E[x^2] - E[x]^2 loses precision, and an epsilon of
    1e-12 cannot compensate.

    With ``all_kept``, the backward pass reads x and its statistics. Otherwise ``jax.checkpoint`` decides about the
    statistics, or XLA, which computes both once more in each kernel that needs them.
    """
    bias_D = None if bias_D is None else varying_as(bias_D, x)
    return _normalise(x, varying_as(scale_D, x), bias_D, True, epsilon, dtype, all_kept)


def rms_norm(
    x: jax.Array, scale_D: jax.Array, epsilon: float, dtype: jax.typing.DTypeLike, *, all_kept: bool = False
) -> jax.Array:
    """Returns x / sqrt(mean(x^2) + epsilon) * scale over the last axis, [..., D] in ``dtype`` (arXiv:1910.07467).

    ``all_kept``: as in ``layer_norm``.
    """
    return _normalise(x, varying_as(scale_D, x), None, False, epsilon, dtype, all_kept)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def _normalise(x, scale_D, bias_D, centre, epsilon, dtype, all_kept):
    return _forward(x, scale_D, bias_D, centre, epsilon, dtype, all_kept=False)[0]


def _forward(x, scale_D, bias_D, centre, epsilon, dtype, all_kept):
    centred, mean = x.astype(jnp.float32), None
    if centre:
        mean = checkpoint_name(jnp.mean(centred, axis=-1, keepdims=True), STATISTICS)
        centred -= mean
    variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
    inverse = checkpoint_name(jax.lax.rsqrt(variance + epsilon), STATISTICS)
    if all_kept:
        x, mean, inverse = jax.lax.optimization_barrier((x, mean, inverse))
        centred = x.astype(jnp.float32) - mean if centre else x.astype(jnp.float32)
    scaled = centred * (inverse * scale_D)
    return (scaled if bias_D is None else scaled + bias_D).astype(dtype), (x, mean, inverse, scale_D, bias_D)


def _backward(centre, epsilon, dtype, all_kept, residuals, gradient):
    x, mean, inverse, scale_D, bias_D = residuals
    centred = x.astype(jnp.float32) - mean if centre else x.astype(jnp.float32)
    normalised = centred * inverse
    gradient = gradient.astype(jnp.float32)
    of_normalised = gradient * scale_D
    along = jnp.mean(of_normalised * normalised, axis=-1, keepdims=True)
    of_centred = of_normalised - jnp.mean(of_normalised, axis=-1, keepdims=True) if centre else of_normalised
    of_x = inverse * (of_centred - normalised * along)
    tokens = tuple(range(x.ndim - 1))
    of_x, of_scale = of_x.astype(x.dtype), jnp.sum(gradient * normalised, axis=tokens)
    return of_x, of_scale, None if bias_D is None else jnp.sum(gradient, axis=tokens)


_normalise.defvjp(_forward, _backward)

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
    x: jax.Array, scale_D: jax.Array, bias_D: jax.Array | None, epsilon: float, dtype: jax.typing.DTypeLike
) -> jax.Array:
    """Returns (x - mean) / sqrt(variance + epsilon) * scale + bias over the last axis, [..., D] in ``dtype``.

    Without a bias, None stands for it.

    The statistics are float32, the variance that of two passes: E[x^2] - E[x]^2 loses precision, and an epsilon of
    1e-12 cannot compensate.
    """
    bias_D = None if bias_D is None else varying_as(bias_D, x)
    return _normalise(x, varying_as(scale_D, x), bias_D, True, epsilon, dtype)


def rms_norm(x: jax.Array, scale_D: jax.Array, epsilon: float, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Returns x / sqrt(mean(x^2) + epsilon) * scale over the last axis, [..., D] in ``dtype`` (arXiv:1910.07467)."""
    return _normalise(x, varying_as(scale_D, x), None, False, epsilon, dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _normalise(x, scale_D, bias_D, centre, epsilon, dtype):
    return _forward(x, scale_D, bias_D, centre, epsilon, dtype)[0]


def _forward(x, scale_D, bias_D, centre, epsilon, dtype):
    centred, mean = x.astype(jnp.float32), None
    if centre:
        mean = checkpoint_name(jnp.mean(centred, axis=-1, keepdims=True), STATISTICS)
        centred -= mean
    variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
    inverse = checkpoint_name(jax.lax.rsqrt(variance + epsilon), STATISTICS)
    scaled = centred * (inverse * scale_D)
    return (scaled if bias_D is None else scaled + bias_D).astype(dtype), (x, mean, inverse, scale_D, bias_D)


def _backward(centre, epsilon, dtype, residuals, gradient):
    x, mean, inverse, scale_D, bias_D = residuals
    centred = x.astype(jnp.float32) - mean if centre else x.astype(jnp.float32)
    normalised = centred * inverse
    gradient = gradient.astype(jnp.float32)
    of_normalised = gradient * scale_D
    along = jnp.mean(of_normalised * normalised, axis=-1, keepdims=True)
    of_centred = of_normalised - jnp.mean(of_normalised, axis=-1, keepdims=True) if centre else of_normalised
    of_x = inverse * (of_centred - normalised * along)
    tokens = tuple(range(x.ndim - 1))
    of_bias = None if bias_D is None else jnp.sum(gradient, axis=tokens)
    return of_x.astype(x.dtype), jnp.sum(gradient * normalised, axis=tokens), of_bias


_normalise.defvjp(_forward, _backward)

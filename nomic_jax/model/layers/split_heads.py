"""The heads of queries, keys and values in a common product, rotated, with a gradient that is one array again."""

import functools

import jax
import jax.numpy as jnp

from nomic_jax.model.rope import apply_rope


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def split_heads(x_BLX: jax.Array, rope, heads: tuple[int, ...]) -> tuple[jax.Array, ...]:
    """Returns the parts of a product, [B, L, heads, K] each. The first two are rotated if rope is given."""
    K = x_BLX.shape[-1] // sum(heads)
    parts = jnp.split(x_BLX, [K * sum(heads[:i]) for i in range(1, len(heads))], axis=-1)
    return _rotated([part.reshape(*part.shape[:2], -1, K) for part in parts], rope)


def _rotated(parts, rope) -> tuple[jax.Array, ...]:
    return tuple(part if rope is None or i > 1 else apply_rope(part, *rope) for i, part in enumerate(parts))


def _backward(heads: tuple[int, ...], rope, gradients: tuple[jax.Array, ...]):
    gradients = _rotated(gradients, rope and (rope[0], -rope[1]))
    x_BLX = jnp.concatenate([x.reshape(*x.shape[:2], -1) for x in gradients], axis=-1)
    # Two products use it. Without the barrier, XLA concatenates for each of them.
    return jax.lax.optimization_barrier(x_BLX), None


split_heads.defvjp(lambda x_BLX, rope, heads: (split_heads(x_BLX, rope, heads), rope), _backward)

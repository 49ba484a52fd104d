"""Parameters of functions with a gradient of their own, within ``jax.shard_map``."""

import jax
import jax.numpy as jnp


def varying_as(parameter: jax.Array, inputs: jax.Array) -> jax.Array:
    """Returns ``parameter``, which in ``jax.shard_map`` varies over devices as ``inputs`` do.

    The gradient of a ``jax.custom_vjp`` varies as its inputs do. With this, a parameter that is the same on all devices
    gets the sum over devices, as it does from differentiation by rule.
    """
    own, wanted = (getattr(jax.typeof(x), "manual_axis_type", None) for x in (parameter, inputs))
    if own is not None and own == wanted:
        # Outside of shard_map, and in training. A compiler for CPUs would add the zero to every parameter.
        return parameter
    return parameter + jnp.sum(inputs.reshape(-1)[:0]).astype(parameter.dtype)

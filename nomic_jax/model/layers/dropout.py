"""Dropout, which only training uses: by default no activation is dropped."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

_LEVELS = 1 << 16


class Dropout(NamedTuple):
    """Attributes:
    key: decides what is dropped: equal keys drop the same activations.
    rate: the share that is dropped, to 1 / 65,536. The others are divided by 1 - rate.
    """

    key: jax.Array
    rate: float

    def of_layer(self, number: int) -> "Dropout":
        return self._replace(key=jax.random.fold_in(self.key, number))


def drop(x: jax.Array, dropout: Dropout | None, place: int = 0) -> jax.Array:
    """Returns the activations with some set to 0, others for each ``place``; as they are without dropout."""
    if dropout is None or not dropout.rate:
        return x
    least = round(dropout.rate * _LEVELS)
    # Half the random bits that a comparison of floats takes.
    bits = jax.random.bits(jax.random.fold_in(dropout.key, place), x.shape, jnp.uint16)
    return jnp.where(bits >= least, x * (_LEVELS / (_LEVELS - least)), 0).astype(x.dtype)

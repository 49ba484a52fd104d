"""The exponential moving average of the weights (Polyak and Juditsky 1992), which is evaluated and exported.

After update t with weights p, the average is the mean of the weights after updates 1 ... t, each weighted by
decay ** (its age in updates):

    average_t = average_(t-1) + (1 - decay) / (1 - decay ** t) * (p - average_(t-1))

This is the moving average with Adam's bias correction (arXiv:1412.6980, section 3), as one recursion: what is stored is
always the corrected average. After the first update it is p itself. The weights before the first update do not count.
"""

import math

import jax
import jax.numpy as jnp


def start_average(params: dict) -> dict:
    """Returns the average before the first update: the weights, as arrays of their own, float32."""
    return jax.tree.map(lambda x: jnp.copy(x).astype(jnp.float32), params)


def update_average(average: dict, params: dict, updates: jax.Array, decay: float) -> dict:
    """Returns the average after an update.

    Args:
      average: the average before it.
      params: the weights after it.
      updates: number of updates, including this one, int32.
      decay: within 0 ... 1, both excluded.
    """
    # With expm1, 1 - decay ** t is exact for rates near 1 as well.
    share = math.expm1(math.log(decay)) / jnp.expm1(updates * math.log(decay))
    return jax.tree.map(lambda mean, x: mean + share * (x - mean), average, params)

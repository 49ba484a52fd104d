"""Rotary position embedding with dynamic NTK, stateless and per text.

The PyTorch implementations take the sequence length of dynamic NTK from the padded batch and cache the angles of the
longest batch so far, so the vector of a text depends on other texts. Here the angles depend only on the position of a
token and on the length of its own text.
"""

import jax
import jax.numpy as jnp
import numpy as np

from nomic_jax.model.config import EncoderConfig


def rope_cos_sin(
    position_BL: jax.Array, own_length_BL: jax.Array | None, config: EncoderConfig, base: float | None = None
) -> tuple[jax.Array, jax.Array]:
    """Returns the cosines and sines of the rotation angles, float32, each [B, L, 1, K/2] (1 for the heads).

    Args:
      position_BL: position of each token in its text, from 0.
      own_length_BL: number of tokens of the text that each token belongs to; None if no text is longer than
        ``config.max_trained_positions``, which skips the scaling.
      config: base, linear factor, trained length L and alpha of the scaling.
      base: theta, if it is not that of ``config.rope_base``.

    Dynamic NTK (paper eq. 5): ``base' = base * (alpha * S / L - (alpha - 1)) ** (K / (K - 2))`` for S > L, so that the
    i-th inverse frequency ``base ** (-2i / K)`` is multiplied by ``(alpha * S / L - (alpha - 1)) ** (-2i / (K - 2))``.
    """
    K = config.dim_per_head
    exponent = np.arange(0, K, 2, dtype=np.float32) / np.float32(K)
    inverse_frequency = (1.0 / np.float32(base or config.rope_base) ** exponent).astype(np.float32)
    # float32 for every computation dtype: at position 8191, bfloat16 angles would be off by full turns.
    position = position_BL.astype(jnp.float32)[..., None]
    if config.rope_linear_factor != 1.0:
        inverse_frequency = inverse_frequency / np.float32(config.rope_linear_factor)
    if own_length_BL is None:
        angle = position * inverse_frequency
    else:
        alpha, trained = config.rope_scaling_factor, config.max_trained_positions
        if alpha is None:
            raise ValueError("texts beyond max_trained_positions need a rope_scaling_factor")
        stretch = jnp.maximum(alpha * own_length_BL.astype(jnp.float32) / trained - (alpha - 1.0), 1.0)[..., None]
        angle = position * (inverse_frequency * stretch ** (-np.arange(0, K, 2, dtype=np.float32) / (K - 2)))
    return jnp.cos(angle)[:, :, None, :], jnp.sin(angle)[:, :, None, :]


def apply_rope(x_BLHK: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the first half of each head with its second half (NeoX order), in float32."""
    halves = x_BLHK.astype(jnp.float32).reshape(*x_BLHK.shape[:-1], 2, -1)
    sign = jnp.array([[-1.0], [1.0]])
    # Reversed halves, not a concatenation: XLA fuses them into what reads or writes the heads.
    rotated = halves * cos[..., None, :] + halves[..., ::-1, :] * (sign * sin[..., None, :])
    return rotated.reshape(x_BLHK.shape).astype(x_BLHK.dtype)

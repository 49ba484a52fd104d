"""The modules after pooling, against float64."""

import jax
import numpy as np

from nomic_jax.model import EmbeddingConfig, EncoderConfig
from nomic_jax.model.heads import pool


def test_layer_norm_keeps_a_small_spread_around_a_large_mean():
    rng = np.random.default_rng(0)
    hidden_BLD = (300 + 0.01 * rng.normal(size=(4, 1, 64))).astype(np.float32)
    config = EmbeddingConfig(EncoderConfig(hidden_size=64, num_heads=2), layer_norm=True, normalize=False)
    got = np.asarray(jax.jit(pool, static_argnums=2)(hidden_BLD, np.ones(4, np.int32), config))
    x = hidden_BLD[:, 0].astype(np.float64)
    want = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(got, want, atol=0.02)

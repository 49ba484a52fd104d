"""The modules after pooling, against float64."""

import jax
import numpy as np
import pytest

from nomic_jax.model import EmbeddingConfig, EncoderConfig
from nomic_jax.model.encoder import cast_kernels
from nomic_jax.model.heads import abstract_embedder, init_embedder, pool
from nomic_jax.model.modules import Module


def test_layer_norm_keeps_a_small_spread_around_a_large_mean():
    rng = np.random.default_rng(0)
    hidden_BLD = (300 + 0.01 * rng.normal(size=(4, 1, 64))).astype(np.float32)
    config = EmbeddingConfig(EncoderConfig(hidden_size=64, num_heads=2), layer_norm=True, normalize=False)
    got = np.asarray(jax.jit(pool, static_argnums=2)(hidden_BLD, np.ones(4, np.int32), config))
    x = hidden_BLD[:, 0].astype(np.float64)
    want = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(got, want, atol=0.02)


def test_modules_stay_in_float32_where_kernels_are_cast():
    config = EmbeddingConfig(
        EncoderConfig(vocab_size=16, hidden_size=8, num_heads=2, num_layers=1, intermediate_size=8, dtype="bfloat16"),
        modules=(Module("Dense", 4), Module("Normalize", 4)),
    )
    cast = cast_kernels(init_embedder(jax.random.key(0), config), config.encoder)
    assert cast["modules"]["0_Dense"]["kernel"].dtype == np.float32
    assert cast["layers"][0]["mlp"]["down"]["kernel"].dtype == config.encoder.dtype
    shapes = jax.tree.map(lambda leaf: leaf.shape, init_embedder(jax.random.key(0), config))
    assert shapes == jax.tree.map(lambda leaf: leaf.shape, abstract_embedder(config))


def test_modules_that_do_not_fit_are_refused():
    encoder = EncoderConfig(hidden_size=64, num_heads=2)
    with pytest.raises(ValueError, match="module 1_LayerNorm has the width 64; its input has 4"):
        EmbeddingConfig(encoder, modules=(Module("Dense", 4), Module("LayerNorm", 64)))
    with pytest.raises(ValueError, match=r"dim 5 is not within 1\.\.4"):
        EmbeddingConfig(encoder, modules=(Module("Dense", 4),), dim=5)

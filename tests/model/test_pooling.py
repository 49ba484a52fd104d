"""Pooling of padded and of packed rows against sentence-transformers, in values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nomic_jax.model import EmbeddingConfig, EncoderConfig, pool
from nomic_jax.model.heads import pool_segments
from nomic_jax.model.pooling import POOLINGS

D, LENGTHS = 6, np.array([5, 1, 8, 3], np.int32)
CASES = [*POOLINGS, "mean+cls", "cls+max+mean+mean_sqrt_len_tokens+weightedmean+lasttoken"]


def config(pooling, **fields):
    return EmbeddingConfig(EncoderConfig(hidden_size=D, num_heads=1), pooling=pooling, normalize=False, **fields)


@pytest.fixture(scope="module")
def hidden_BLD():
    """Hidden states of padded rows, with large values behind the texts, and with equal maxima in one."""
    hidden_BLD = np.random.default_rng(0).standard_normal((len(LENGTHS), 8, D)).astype(np.float32)
    hidden_BLD[np.arange(8) >= LENGTHS[:, None]] = 100.0
    hidden_BLD[2, 1:4, 0] = 9.0
    return hidden_BLD


def torch_pooled(hidden_BLD, pooling):
    """The vectors and the gradient of their weighted sum. torch's padded max gives one of equal maxima all of it."""
    torch = pytest.importorskip("torch")
    Pooling = pytest.importorskip("sentence_transformers").sentence_transformer.modules.Pooling
    x = torch.tensor(hidden_BLD, requires_grad=True)
    parts = [x[b : b + 1, :length] for b, length in enumerate(LENGTHS)]
    features = {
        "token_embeddings": torch.cat(parts, dim=1),  # one row without padding: equal maxima share the gradient
        "cu_seq_lens_q": torch.tensor(np.concatenate([[0], np.cumsum(LENGTHS)]), dtype=torch.int32),
    }
    out = Pooling(D, pooling.split("+"))(features)["sentence_embedding"]
    (out * torch.tensor(weights(out.shape))).sum().backward()
    return out.detach().numpy(), x.grad.numpy()


def weights(shape):
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("pooling", CASES)
def test_padded_and_packed_rows_give_what_sentence_transformers_gives(pooling, hidden_BLD):
    want, want_gradient = torch_pooled(hidden_BLD, pooling)
    real_BL = np.arange(8) < LENGTHS[:, None]
    # Packed: texts 0 and 1 in a row with padding behind them, 2 in one without padding, 3 in one with an absent second.
    rows = [(0, 1), (2,), (3,)]
    packed_BLD, segment_BL = np.full((3, 8, D), 100.0, np.float32), np.zeros((3, 8), np.int32)
    for b, texts in enumerate(rows):
        tokens = np.concatenate([hidden_BLD[t, : LENGTHS[t]] for t in texts])
        packed_BLD[b, : len(tokens)] = tokens
        segment_BL[b, : len(tokens)] = np.repeat(np.arange(1, 1 + len(texts)), LENGTHS[list(texts)])

    def padded(x_BLD):
        return pool(x_BLD, LENGTHS, config(pooling))

    def packed(x_BLD):
        x_BSE = pool_segments(x_BLD, jnp.asarray(segment_BL), 2, config(pooling))
        return x_BSE.reshape(6, -1)[np.array([0, 1, 2, 4])], x_BSE

    def gradient(function, x_BLD):
        def loss(x_BLD):
            return jnp.sum(function(x_BLD) * weights(want.shape))

        return np.asarray(jax.jit(jax.grad(loss))(x_BLD))

    np.testing.assert_allclose(jax.jit(padded)(hidden_BLD), want, atol=1e-5)
    found, all_BSE = jax.jit(packed)(packed_BLD)
    np.testing.assert_allclose(found, want, atol=1e-5)
    assert not np.any(np.asarray(all_BSE).reshape(6, -1)[[3, 5]]), "an absent text has a vector"
    np.testing.assert_allclose(gradient(padded, hidden_BLD), want_gradient * real_BL[:, :, None], atol=1e-5)
    of_packed = gradient(lambda x_BLD: packed(x_BLD)[0], packed_BLD)
    np.testing.assert_allclose(of_packed[segment_BL > 0], want_gradient[real_BL], atol=1e-5)
    assert not np.any(of_packed[segment_BL == 0]), "padding has a gradient"


@pytest.mark.parametrize("pooling", POOLINGS)
def test_an_empty_text_gets_zeros_and_no_gradient(pooling):
    model = EmbeddingConfig(EncoderConfig(hidden_size=D, num_heads=1), pooling=pooling, layer_norm=True)
    x_BLD = jnp.ones((2, 4, D))

    def padded(x_BLD):
        return pool(x_BLD, jnp.zeros(2, jnp.int32), model)

    def packed(x_BLD):
        return pool_segments(x_BLD, jnp.zeros((2, 4), jnp.int32), 3, model)

    for function in (padded, packed):
        value, gradient = jax.jit(jax.value_and_grad(lambda x_BLD, f=function: jnp.sum(f(x_BLD) + 1)))(x_BLD)
        assert np.isfinite(value) and not np.any(gradient), function.__name__
        assert not np.any(function(x_BLD))


@pytest.mark.parametrize("pooling", ["weightedmean", "cls+max+lasttoken"])
def test_gradients_of_packed_rows_need_no_scatter(pooling):
    def loss(x_BLD):
        return jnp.sum(pool_segments(x_BLD, jnp.ones((2, 8), jnp.int32), 3, config(pooling)))

    lowered = jax.jit(jax.grad(loss)).lower(jnp.ones((2, 8, D))).as_text()
    assert "stablehlo.scatter" not in lowered


@pytest.mark.parametrize("pooling", ["", "first", "mean+mean", "mean+first"])
def test_unknown_poolings_are_refused(pooling):
    with pytest.raises(ValueError, match="pooling is"):
        config(pooling)

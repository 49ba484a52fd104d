"""Tests that need a GPU: cuDNN's flash attention equals the dense formula, and the compiled gradient calls it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nomic_jax.model import EmbeddingConfig, EncoderConfig, embed, encode, init_encoder
from nomic_jax.model.attention import attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        jax.default_backend() != "gpu",
        reason="needs a GPU: checks that cuDNN attention is used and equals the dense formula in values and gradients",
    ),
]


def test_cudnn_equals_the_dense_formula():
    B, L, H, K = 4, 512, 12, 64
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, cotangent = (jax.random.normal(key, (B, L, H, K), jnp.bfloat16) for key in keys)
    length = jnp.array([512, 300, 64, 1])
    real = (jnp.arange(L) < length[:, None])[:, :, None, None]
    results = {}
    for implementation, dtype in (("cudnn", jnp.bfloat16), ("xla", jnp.float32)):
        arguments = [x.astype(dtype) for x in (q, k, v)]
        out, pullback = jax.vjp(
            lambda q, k, v, name=implementation: attention(q, k, v, length_B=length, implementation=name), *arguments
        )
        results[implementation] = [jnp.where(real, x, 0) for x in (out, *pullback((cotangent * real).astype(dtype)))]
    for ours, exact in zip(results["cudnn"], results["xla"]):
        ours, exact = np.asarray(ours, np.float32), np.asarray(exact)
        assert np.linalg.norm(ours - exact) <= 1e-2 * np.linalg.norm(exact)


@pytest.mark.parametrize("max_segments", [3, 32, 128])
def test_packed_cudnn_equals_the_dense_formula(max_segments):
    B, L, H, K = 4, 512, 12, 64
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, cotangent = (jax.random.normal(key, (B, L, H, K), jnp.bfloat16) for key in keys)
    segment = np.zeros((B, L), np.int32)
    for row, lengths in zip(segment, ([512], [1, 300, 211], [170, 170], [])):
        row[: sum(lengths)] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    if max_segments > 3:
        segment[3] = 1 + np.arange(L) * max_segments // L
    real = jnp.array(segment > 0)[:, :, None, None]
    results = {}
    for implementation, dtype in (("cudnn_packed", jnp.bfloat16), ("xla", jnp.float32)):

        def function(q, k, v, name=implementation):
            return attention(q, k, v, segment_BL=jnp.array(segment), max_segments=max_segments, implementation=name)

        out, pullback = jax.vjp(function, *(x.astype(dtype) for x in (q, k, v)))
        results[implementation] = [jnp.where(real, x, 0) for x in (out, *pullback((cotangent * real).astype(dtype)))]
    for ours, exact in zip(results["cudnn_packed"], results["xla"]):
        ours, exact = np.asarray(ours, np.float32), np.asarray(exact)
        assert np.linalg.norm(ours - exact) <= 1e-2 * np.linalg.norm(exact)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize(
    "causal, window, kv_heads", [(True, None, 4), (True, 33, 1), (False, None, 2), (True, None, 1)]
)
def test_causal_windows_and_shared_keys(packed, causal, window, kv_heads):
    B, L, H, K = 3, 512, 4, 128
    keys = jax.random.split(jax.random.key(0), 4)
    q, cotangent = (jax.random.normal(key, (B, L, H, K), jnp.bfloat16) for key in keys[:2])
    k, v = (jax.random.normal(key, (B, L, kv_heads, K), jnp.bfloat16) for key in keys[2:])
    length = jnp.array([512, 300, 1])
    segment = np.zeros((B, L), np.int32)
    for row, lengths in zip(segment, ([512], [1, 300, 200], [])):
        row[: sum(lengths)] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    texts = {"segment_BL": jnp.array(segment), "max_segments": 3} if packed else {"length_B": length}
    real = (jnp.array(segment > 0) if packed else jnp.arange(L) < length[:, None])[:, :, None, None]
    results = {}
    for implementation, dtype in (("cudnn_packed" if packed else "cudnn", jnp.bfloat16), ("xla", jnp.float32)):

        def function(q, k, v, name=implementation):
            return attention(q, k, v, **texts, causal=causal, window=window, implementation=name)

        out, pullback = jax.vjp(function, *(x.astype(dtype) for x in (q, k, v)))
        results[implementation] = [jnp.where(real, x, 0) for x in (out, *pullback((cotangent * real).astype(dtype)))]
    for ours, exact in zip(*results.values()):
        ours, exact = np.asarray(ours, np.float32), np.asarray(exact)
        assert np.linalg.norm(ours - exact) <= 1e-2 * np.linalg.norm(exact)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_padding_is_finite_without_masking(pooling):
    """Rows with padding and an empty row: hidden states, vectors and gradients have no NaN anywhere."""
    model = EmbeddingConfig(EncoderConfig(num_layers=3, dtype="bfloat16"), pooling=pooling)
    params = init_encoder(jax.random.key(0), model.encoder)
    ids, length = jnp.ones((64, 512), jnp.int32), jnp.arange(64) * 8

    def loss(params):
        hidden = encode(params, ids, model.encoder, length_B=length)
        vectors = embed(params, {"ids": ids, "length": length}, model)
        return jnp.sum(vectors) + jnp.sum(hidden.astype(jnp.float32)), (hidden, vectors)

    # Memory that an earlier program left full of NaN.
    jax.block_until_ready(jnp.full((256, 1024, 1024), jnp.nan, jnp.bfloat16))
    (_, outputs), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((outputs, gradient)))


def test_auto_in_bfloat16_compiles_to_cudnn():
    config = EncoderConfig(num_layers=1, dtype="bfloat16")
    params = init_encoder(jax.random.key(0), config)
    ids, length = jnp.ones((2, 256), jnp.int32), jnp.array([256, 100])

    def loss(params):
        return encode(params, ids, config, length_B=length).astype(jnp.float32).sum()

    hlo = jax.jit(jax.grad(loss)).lower(params).compile().as_text()
    assert "__cudnn$fmha" in hlo

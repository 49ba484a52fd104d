"""The relative position bias: its buckets, its layout, and attention with it in every dense form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nomic_jax.model import attention as attention_module
from nomic_jax.model.attention import Target, attention, choose, traced_for
from nomic_jax.model.layers.relative_bias import bias_of_queries, buckets, relative_bias


def test_buckets_are_those_of_transformers():
    torch = pytest.importorskip("torch")
    from transformers.models.mpnet.modeling_mpnet import MPNetEncoder

    offset = np.arange(-2000, 2001)
    assert np.array_equal(buckets(offset, 32), MPNetEncoder.relative_position_bucket(torch.tensor(offset)).numpy())


@pytest.mark.parametrize("length", [1, 2, 7])
def test_bias_of_every_block_of_queries(length):
    table = np.random.default_rng(0).normal(size=(32, 3)).astype(np.float32)
    offset = np.arange(length)[None, :] - np.arange(length)[:, None]
    expected = table[buckets(offset, 32)].transpose(2, 0, 1)
    bias_HO = relative_bias(jnp.array(table), length)
    for start in range(length):
        for count in (1, 3, length):
            part = expected[:, start : start + count]
            assert np.array_equal(bias_of_queries(bias_HO, start, count)[:, : part.shape[1]], part)


@pytest.mark.parametrize(
    "packed", [pytest.param(False, marks=pytest.mark.exhaustive(reason="packed rows do more")), True]
)
def test_one_head_at_a_time_gives_the_values_and_gradients_of_the_definition(packed, monkeypatch):
    """In blocks of 64 queries, the last of which is not full."""
    monkeypatch.setattr(attention_module, "CPU_ALL_HEADS_MAX_LENGTH", 32)
    monkeypatch.setattr(attention_module, "CPU_SCORES", 1)
    L, H, K = 150, 2, 8
    rng = np.random.default_rng(0)
    q, k, v, direction = (rng.normal(size=(2, L, H, K)).astype(np.float32) for _ in range(4))
    table = 3 * rng.normal(size=(32, H)).astype(np.float32)
    length = np.array([L, 90], np.int32)
    segment = np.stack([np.repeat([1, 2, 3], [70, 50, 30]), np.repeat([1, 2, 0], [1, 89, 60])]).astype(np.int32)
    rows = {"segment_BL": segment} if packed else {"length_B": length}
    is_text = segment > 0 if packed else np.arange(L) < length[:, None]
    same = segment[:, :, None] == segment[:, None, :] if packed else np.broadcast_to(is_text[:, None, :], (2, L, L))
    offset = np.arange(L)[None, :] - np.arange(L)[:, None]
    direction = direction * is_text[:, :, None, None]

    def ours(q, k, v, table):
        out = attention(q, k, v, bias_HO=relative_bias(table, L), implementation="cpu", **rows)
        return jnp.sum(out * direction)

    def definition(q, k, v, table):
        scores = jnp.einsum("bqhk,blhk->bhql", q, k) / K**0.5 + table[buckets(offset, 32)].transpose(2, 0, 1)
        weights = jax.nn.softmax(jnp.where(same[:, None], scores, -jnp.inf), axis=-1)
        return jnp.sum(jnp.einsum("bhql,blhk->bqhk", weights, v) * direction)

    for mine, other in zip(*(jax.jit(jax.grad(f, argnums=(0, 1, 2, 3)))(q, k, v, table) for f in (ours, definition))):
        np.testing.assert_allclose(mine, other, atol=2e-5)
    assert float(ours(q, k, v, table)) == pytest.approx(float(definition(q, k, v, table)), rel=1e-5)


def test_no_fused_kernel_is_chosen_or_taken():
    q = jnp.zeros((1, 8, 2, 8), jnp.bfloat16)
    with traced_for(Target("gpu", (9, 0), 91900)):
        assert choose("bfloat16") == "cudnn" and choose("bfloat16", biased=True) == "xla"
        assert choose("bfloat16", biased=True, packed=True, max_segments=4) == "xla"
    with pytest.raises(ValueError, match='attention="cudnn" has no relative position bias'):
        attention(q, q, q, bias_HO=jnp.zeros((2, 15)), implementation="cudnn")

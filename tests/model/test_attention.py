"""Every attention implementation, in values and gradients, against the dense formula in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from nomic_jax.model.attention import attention

B, H, K = 3, 2, 8


def reference(q, k, v, allowed, cotangent):
    """Output and gradients in float64 through torch."""
    q, k, v = (torch.tensor(x.transpose(0, 2, 1, 3), dtype=torch.float64, requires_grad=True) for x in (q, k, v))
    scores = (q @ k.transpose(-1, -2)) / K**0.5
    scores = scores.masked_fill(~torch.tensor(allowed)[:, None], -torch.inf)
    out = torch.softmax(scores, -1) @ v
    out.backward(torch.tensor(cotangent.transpose(0, 2, 1, 3)))
    return [x.detach().numpy().transpose(0, 2, 1, 3) for x in (out, q.grad, k.grad, v.grad)]


@pytest.mark.parametrize("implementation", ["xla", "cpu"])
@pytest.mark.parametrize("kind", ["full", "lengths", "segments"])
@pytest.mark.parametrize("L", [33, 300])
def test_against_float64(implementation, kind, L, monkeypatch):
    # 300 queries then come in blocks of 64, the last of them part-filled.
    monkeypatch.setattr("nomic_jax.model.attention.CPU_SCORES", B * L * 64)
    rng = np.random.default_rng(L)
    q, k, v, cotangent = (rng.normal(size=(B, L, H, K)).astype(np.float32) for _ in range(4))
    lengths = np.array([L, L // 3, 1], np.int32)
    segment = np.repeat(np.arange(1, 4), [L // 4, L // 2, L - L // 4 - L // 2])[None].repeat(B, 0).astype(np.int32)
    keywords = {
        "full": {},
        "lengths": {"length_B": jnp.array(lengths)},
        "segments": {"segment_BL": jnp.array(segment)},
    }[kind]
    allowed = np.ones((B, L, L), bool)
    if kind == "lengths":
        allowed &= (np.arange(L) < lengths[:, None])[:, None]
        cotangent *= (np.arange(L) < lengths[:, None])[:, :, None, None]
    if kind == "segments":
        allowed = segment[:, :, None] == segment[:, None]
    expected = reference(q, k, v, allowed, cotangent)

    def function(q, k, v):
        return attention(q, k, v, implementation=implementation, **keywords)

    out, pullback = jax.vjp(function, q, k, v)
    real = np.abs(cotangent).sum((2, 3)) > 0
    np.testing.assert_allclose(np.asarray(out)[real], expected[0][real], atol=2e-6)
    for ours, theirs in zip(pullback(cotangent), expected[1:]):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_both_ways_of_saying_where_texts_end_are_refused():
    x = np.zeros((1, 4, 1, 8), np.float32)
    with pytest.raises(ValueError, match="not both"):
        attention(x, x, x, length_B=np.array([4]), segment_BL=np.ones((1, 4), np.int32))

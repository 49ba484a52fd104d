"""Compares functions whose gradient is written out with torch in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from nomic_jax.model import EncoderConfig
from nomic_jax.model.dense_attention import softmax
from nomic_jax.model.layers.layer_norm import layer_norm
from nomic_jax.model.layers.mlp import _swiglu, gelu
from nomic_jax.model.layers.split_heads import split_heads
from nomic_jax.model.rope import rope_cos_sin

DTYPES = [("float32", 3e-6), ("bfloat16", 1e-2)]


def apart(ours, expected) -> float:
    """The relative L2 distance."""
    expected = expected.detach().numpy()
    return float(np.linalg.norm(np.asarray(ours, np.float64) - expected) / np.linalg.norm(expected))


def drawn(*shapes, dtype="float32"):
    """Random arrays in a dtype, and the same values as float64 tensors of torch that get a gradient."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]
    return arrays, [torch.tensor(np.asarray(x, np.float64), requires_grad=True) for x in arrays]


@pytest.mark.parametrize("dtype, tolerance", DTYPES)
@pytest.mark.parametrize("mean, all_kept", [(0, False), (50, False), (50, True)])
def test_layer_norm(dtype, tolerance, mean, all_kept):
    (x, of_y), _ = drawn((3, 7, 24), (3, 7, 24), dtype=dtype)
    (scale, bias), (scale_torch, bias_torch) = drawn((24,), (24,))
    import torch

    x = (x.astype(jnp.float32) + mean).astype(dtype)
    x_torch = torch.tensor(np.asarray(x, np.float64), requires_grad=True)
    y_torch = torch.nn.functional.layer_norm(x_torch, (24,), scale_torch, bias_torch, 1e-12)
    y_torch.backward(torch.tensor(np.asarray(of_y, np.float64)))
    y, pullback = jax.vjp(lambda *args: layer_norm(*args, 1e-12, dtype, all_kept=all_kept), x, scale, bias)
    gradients = pullback(of_y)
    # A mean of 50 costs a float32 one or two digits; a bfloat16 is already rounded.
    tolerance = tolerance if dtype == "bfloat16" else tolerance * max(1, mean)
    assert y.dtype == gradients[0].dtype == dtype and gradients[1].dtype == gradients[2].dtype == "float32"
    assert apart(y, y_torch) < tolerance
    for ours, theirs in zip(gradients, (x_torch, scale_torch, bias_torch)):
        assert apart(ours, theirs.grad) < tolerance


@pytest.mark.parametrize("dtype, tolerance", DTYPES)
def test_swiglu(dtype, tolerance):
    (up, gate, of_y), (up_torch, gate_torch, of_y_torch) = drawn((5, 33), (5, 33), (5, 33), dtype=dtype)
    import torch

    y_torch = up_torch * torch.nn.functional.silu(gate_torch)
    y_torch.backward(of_y_torch)
    y, pullback = jax.vjp(_swiglu, up, gate)
    assert apart(y, y_torch) < tolerance
    for ours, theirs in zip(pullback(of_y), (up_torch, gate_torch)):
        assert ours.dtype == dtype and apart(ours, theirs.grad) < tolerance


@pytest.mark.parametrize("dtype, tolerance", DTYPES)
def test_gelu(dtype, tolerance):
    (x, of_y), _ = drawn((5, 33), (5, 33), dtype=dtype)
    import torch

    x = 3 * x
    x_torch = torch.tensor(np.asarray(x, np.float64), requires_grad=True)
    y_torch = torch.nn.functional.gelu(x_torch)
    y_torch.backward(torch.tensor(np.asarray(of_y, np.float64)))
    y, pullback = jax.vjp(gelu, x)
    (of_x,) = pullback(of_y)
    assert y.dtype == of_x.dtype == dtype
    assert apart(y, y_torch) < tolerance and apart(of_x, x_torch.grad) < tolerance


@pytest.mark.parametrize("masked", [True, False])
def test_softmax(masked):
    (scores, of_weights), (scores_torch, of_weights_torch) = drawn((2, 3, 5, 5), (2, 3, 5, 5))
    import torch

    mask = np.arange(5) < np.array([[[[5]]], [[[2]]]]) if masked else None
    expected = scores_torch if mask is None else scores_torch.masked_fill(~torch.tensor(mask), -torch.inf)
    expected = torch.softmax(expected, -1)
    expected.backward(of_weights_torch)
    weights, pullback = jax.vjp(lambda scores: softmax(scores, mask), scores)
    (of_scores,) = pullback(of_weights)
    assert apart(weights, expected) < 3e-6 and apart(of_scores, scores_torch.grad) < 3e-6
    assert mask is None or not np.asarray(of_scores)[~np.broadcast_to(mask, of_scores.shape)].any()


@pytest.mark.parametrize("dtype, tolerance", DTYPES)
@pytest.mark.parametrize("rotated", [True, False])
def test_heads_and_their_rotation(dtype, tolerance, rotated):
    B, L, H, K = 2, 9, 3, 8
    (qkv, *of_heads), (qkv_torch, *of_heads_torch) = drawn((B, L, 3 * H * K), *[(B, L, H, K)] * 3, dtype=dtype)
    import torch

    config = EncoderConfig(hidden_size=H * K, num_heads=H, num_layers=1)
    rope = rope_cos_sin(np.arange(L)[None], None, config) if rotated else None
    angle = torch.arange(L)[:, None] / config.rope_base ** (torch.arange(0, K, 2, dtype=torch.float64) / K)
    turn = torch.polar(torch.ones_like(angle), angle if rotated else 0 * angle)[:, None]
    heads_torch = [part.reshape(B, L, H, K) for part in qkv_torch.split(H * K, dim=-1)]
    for i in range(2):
        turned = torch.complex(heads_torch[i][..., : K // 2], heads_torch[i][..., K // 2 :]) * turn
        heads_torch[i] = torch.cat([turned.real, turned.imag], -1)
    torch.autograd.backward(heads_torch, of_heads_torch)

    heads, pullback = jax.vjp(lambda qkv: split_heads(qkv, rope, (H, H, H)), qkv)
    for ours, theirs in zip(heads, heads_torch):
        assert ours.dtype == dtype and apart(ours, theirs) < tolerance
    assert apart(pullback(tuple(of_heads))[0], qkv_torch.grad) < tolerance


def test_a_parameter_that_all_devices_share_gets_the_sum_of_their_gradients():
    rng = np.random.default_rng(0)
    x, scale, bias = rng.normal(size=(8, 6)), rng.normal(size=6), rng.normal(size=6)

    def gradients(scale, bias, x):
        return jax.grad(lambda *params: jnp.sum(layer_norm(x, *params, 1e-12, "float32") ** 2), (0, 1))(scale, bias)

    x, scale, bias = (a.astype(np.float32) for a in (x, scale, bias))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    shared = jax.jit(jax.shard_map(gradients, mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=P()))
    for ours, alone in zip(shared(scale, bias, x), gradients(scale, bias, x)):
        np.testing.assert_allclose(ours, alone, rtol=1e-5, atol=1e-5)

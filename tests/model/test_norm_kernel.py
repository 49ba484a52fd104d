"""The kernel of LayerNorm for GPUs, as its interpreter computes it, against float64; and where it is used."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from nomic_jax.model import EncoderConfig, encode, init_encoder
from nomic_jax.model.attention import Target, traced_for
from nomic_jax.model.layers import norm_kernel
from nomic_jax.model.layers.norm import choose
from nomic_jax.model.layers.norm_kernel import norm_of_sum

H100 = Target("gpu", (9, 0), 91900)


def in_float64(x, added, scale, bias, gradients):
    """The norm, and the gradients of x, scale and bias, by the formula."""
    x, added, scale, bias, *gradients = (np.asarray(a, np.float64) for a in (x, added, scale, bias, *gradients))
    total, gradient = x + added, sum(gradients)
    centred = total - total.mean(-1, keepdims=True)
    inverse = 1 / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-12)
    normalised, scaled = centred * inverse, gradient * scale
    of_sum = scaled - scaled.mean(-1, keepdims=True) - normalised * (scaled * normalised).mean(-1, keepdims=True)
    return normalised * scale + bias, inverse * of_sum, (gradient * normalised).sum(0), gradient.sum(0)


@pytest.mark.parametrize(
    "dtype, width, rows, uses, mean, tolerance",
    [
        ("float32", 384, 48, 1, 50, 2e-5),  # full blocks; 384 = 3 x 128
        ("float32", 768, 21, 3, 0, 2e-6),  # the last block and the last program have fewer rows
        ("bfloat16", 4096, 3, 2, 0, 4e-3),  # a row is four tiles
    ],
)
def test_kernel(monkeypatch, dtype, width, rows, uses, mean, tolerance):
    monkeypatch.setattr(norm_kernel, "MOST_PROGRAMS", 2)  # each program has several blocks
    rng = np.random.default_rng(0)
    x, added, *gradients = (jnp.asarray(rng.normal(size=(rows, width)), dtype) for _ in range(2 + uses))
    x = (x.astype(jnp.float32) + mean).astype(dtype)
    scale, bias = (jnp.asarray(rng.normal(size=width), jnp.float32) for _ in range(2))

    @jax.jit
    def compute(x, added, scale, bias, gradients):
        norm = functools.partial(norm_of_sum, epsilon=1e-12, uses=uses, interpret=True)
        out, pullback = jax.vjp(norm, x, added, scale, bias)
        return out, pullback(gradients)

    out, (of_x, of_added, of_scale, of_bias) = compute(x, added, scale, bias, tuple(gradients))
    assert len(out) == uses and of_scale.dtype == of_bias.dtype == "float32"
    np.testing.assert_array_equal(of_x, of_added)
    for ours, exact in zip((out[-1], of_x, of_scale, of_bias), in_float64(x, added, scale, bias, gradients)):
        # Sums over rows are float32 whatever the dtype.
        bound = tolerance if exact.ndim == 2 else max(2e-6, 2e-6 * mean)
        assert exact.ndim == 1 or ours.dtype == dtype
        assert np.linalg.norm(np.asarray(ours, np.float64) - exact) < bound * np.linalg.norm(exact)


def test_parameters_that_all_devices_share_get_the_sum_of_their_gradients():
    """JAX's interpreter does not run within shard_map. That no device has a sum of its own, its types say."""

    def gradients(scale, bias, x, added):
        def loss(scale, bias):
            first, second = norm_of_sum(x, added, scale, bias, 1e-12, uses=2)
            return jnp.sum(first**2) + jnp.sum(second)

        return jax.grad(loss, (0, 1))(scale, bias)

    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = (P(), P(), P("data"), P("data"))
    shared = jax.jit(jax.shard_map(gradients, mesh=mesh, in_specs=specs, out_specs=P()))
    x, scale = jax.ShapeDtypeStruct((16, 32), "float32"), jax.ShapeDtypeStruct((32,), "float32")
    with traced_for(H100):
        lowered = shared.trace(scale, scale, x, x).lower(lowering_platforms=("cuda",)).as_text()
    assert lowered.count("xla.gpu.triton") == 2 and lowered.count("all_reduce") == 2


@pytest.mark.parametrize(
    "recompute",
    [
        "none",
        pytest.param("elementwise", marks=pytest.mark.exhaustive(reason="the same kernels")),
    ],
)
def test_an_encoder_with_the_kernel(recompute):
    """Values and gradients are those of the formula, whose sums XLA adds up itself."""
    config = EncoderConfig(
        vocab_size=64, hidden_size=32, num_layers=2, num_heads=2, intermediate_size=48, recompute=recompute
    )
    params = init_encoder(jax.random.key(0), dataclasses.replace(config, init_std=0.2))
    ids, length = jnp.arange(14).reshape(2, 7), jnp.array([7, 4])
    cotangent = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 32)), jnp.float32)

    def computed(kernel):
        own = dataclasses.replace(config, norm_kernel=kernel)

        def loss(params):
            at = jnp.array([[0, 2, 5], [1, 2, 3]])
            return jnp.vdot(encode(params, ids, own, length_B=length, output_position_BP=at), cotangent)

        return jax.jit(jax.value_and_grad(loss))(params)

    for ours, theirs in zip(jax.tree.leaves(computed("interpret")), jax.tree.leaves(computed("xla"))):
        np.testing.assert_allclose(ours, theirs, atol=2e-6 * max(1.0, float(jnp.abs(theirs).max())))


def test_it_is_chosen_on_a_gpu_that_computes_it_right(monkeypatch):
    config = EncoderConfig(dtype="bfloat16")
    assert choose(config) == "xla"  # on this CPU
    with traced_for(H100):
        assert choose(config) == "triton" == choose(EncoderConfig(hidden_size=384))
        for other in (
            dict(norm_kernel="xla"),
            dict(hidden_size=100, num_heads=1),
            dict(norm="rms_norm"),
            dict(norm_bias=False),
            dict(pre_norm=True),
        ):
            assert choose(dataclasses.replace(config, **other)) == "xla"
    # A GPU of this process is asked first, also while a program is traced.
    monkeypatch.setattr("nomic_jax.model.layers.norm.traced_platform", lambda: "gpu")
    norm_kernel.is_sound.cache_clear()
    with pytest.warns(UserWarning, match="LayerNorm is computed by XLA, because its kernel does not work here"):
        jax.eval_shape(lambda: jnp.zeros(("xla", "triton").index(choose(config))))
    assert choose(config) == "xla"
    norm_kernel.is_sound.cache_clear()


def test_a_kernel_that_is_wrong_is_found(monkeypatch):
    assert norm_kernel.find_problem(64, "bfloat16", interpret=True) == ""
    right = norm_kernel._mean
    monkeypatch.setattr(norm_kernel, "_mean", lambda tiles, blocks: right(tiles, blocks) * 1.1)
    assert "the norm is off by" in norm_kernel.find_problem(64, "float32", interpret=True)


@pytest.mark.parametrize("compute_capability", [(8, 0), (9, 0), (10, 0)])
def test_it_is_lowered_for_gpus_that_are_not_here(compute_capability):
    def compute(x, added, scale, bias, gradients):
        out, pullback = jax.vjp(functools.partial(norm_of_sum, epsilon=1e-12, uses=2), x, added, scale, bias)
        return out[0], pullback(gradients)

    x, scale = jax.ShapeDtypeStruct((21, 768), "bfloat16"), jax.ShapeDtypeStruct((768,), "float32")
    with traced_for(Target("gpu", compute_capability, 91900)):
        lowered = jax.jit(compute).trace(x, x, scale, scale, (x, x)).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("xla.gpu.triton") == 2

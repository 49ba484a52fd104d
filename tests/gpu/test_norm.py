"""Tests that need a GPU: the kernel of LayerNorm computes what XLA does, and the compiled gradient calls it."""

import jax
import jax.numpy as jnp
import pytest

from nomic_jax.model import EncoderConfig, encode, init_encoder
from nomic_jax.model.layers import norm_kernel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        jax.default_backend() != "gpu",
        reason="needs a GPU: checks that the kernel of LayerNorm is used and equals XLA's form in values and gradients",
    ),
]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("width", [384, 768, 1024, 4096])
def test_kernel_equals_xla(width, dtype):
    assert norm_kernel.find_problem(width, dtype) == ""


def test_the_gradient_calls_the_kernel():
    config = EncoderConfig(num_layers=2, dtype="bfloat16")
    params = init_encoder(jax.random.key(0), config)
    ids, length = jnp.ones((2, 256), jnp.int32), jnp.array([256, 100])

    def loss(params):
        return encode(params, ids, config, length_B=length).astype(jnp.float32).sum()

    hlo = jax.jit(jax.grad(loss)).lower(params).compile().as_text()
    assert hlo.count("norm_forward") and hlo.count("norm_backward")

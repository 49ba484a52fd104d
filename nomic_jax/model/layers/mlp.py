"""The MLPs of a layer: with a gate, three matrices, or without one, two."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from nomic_jax.model.config import EncoderConfig
from nomic_jax.model.layers.linear import Linear


def make_mlp(config: EncoderConfig, rngs: nnx.Rngs) -> "GatedMlp | GeluMlp":
    return GatedMlp(config, rngs) if config.is_gated else GeluMlp(config, rngs)


class GatedMlp(nnx.Module):
    """down(up(x) * activation(gate(x))): SwiGLU with SiLU, GeGLU with GELU."""

    def __init__(self, config: EncoderConfig, rngs: nnx.Rngs):
        self.activation = config.activation
        self.up = Linear(config.hidden_size, config.intermediate_size, config, rngs, use_bias=False)
        self.gate = Linear(config.hidden_size, config.intermediate_size, config, rngs, use_bias=False)
        self.down = Linear(config.intermediate_size, config.hidden_size, config, rngs)

    @property
    def uses(self) -> int:
        """How many products take the input."""
        return 2

    def __call__(self, x_BLD: jax.Array, again_BLD: jax.Array | None = None) -> jax.Array:
        """``again_BLD``: the input once more, so that the gradients of its uses can stay apart."""
        up_BLF = checkpoint_name(self.up(x_BLD), "up")
        gate_BLF = checkpoint_name(self.gate(x_BLD if again_BLD is None else again_BLD), "gate")
        if self.activation == "swiglu":
            product_BLF = _swiglu(up_BLF, gate_BLF)
        elif self.activation == "geglu":
            product_BLF = up_BLF * gelu(gate_BLF)
        else:
            product_BLF = up_BLF * jax.nn.gelu(gate_BLF, approximate=True)
        return checkpoint_name(self.down(product_BLF), "down")


@jax.custom_vjp
def _swiglu(up: jax.Array, gate: jax.Array) -> jax.Array:
    return up * jax.nn.silu(gate)


def _swiglu_backward(residuals: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    up, gate, gradient = (x.astype(jnp.float32) for x in (*residuals, gradient))
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    of_up, of_gate = gradient * silu, gradient * up * (sigmoid + silu * (1 - sigmoid))
    return of_up.astype(residuals[0].dtype), of_gate.astype(residuals[1].dtype)


def _swiglu_forward(up: jax.Array, gate: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    # XLA does not merge kernels that share the result of a product. Behind a barrier it does: those of both gradients.
    up, gate = jax.lax.optimization_barrier((up, gate))
    return _swiglu(up, gate), (up, gate)


_swiglu.defvjp(_swiglu_forward, _swiglu_backward)


class GeluMlp(nnx.Module):
    def __init__(self, config: EncoderConfig, rngs: nnx.Rngs):
        self.up = Linear(config.hidden_size, config.intermediate_size, config, rngs)
        self.down = Linear(config.intermediate_size, config.hidden_size, config, rngs)

    @property
    def uses(self) -> int:
        return 1

    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        up_BLF = checkpoint_name(self.up(x_BLD), "up")
        return checkpoint_name(self.down(gelu(up_BLF)), "down")


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """The exact GELU, x * Phi(x), computed in float32. Its backward pass keeps ``x`` alone (arXiv:1606.08415)."""
    x32 = x.astype(jnp.float32)
    return (x32 * _normal_cdf(x32)).astype(x.dtype)


def _normal_cdf(x: jax.Array) -> jax.Array:
    # As in torch. With erfc, as in jax.nn.gelu, a CPU computes both of its branches for every element.
    return 0.5 * (1 + jax.lax.erf(x * math.sqrt(0.5)))


def _gelu_backward(x: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    x32 = x.astype(jnp.float32)
    density = jnp.exp(-0.5 * x32 * x32) * (1 / math.sqrt(2 * math.pi))
    return ((gradient.astype(jnp.float32) * (_normal_cdf(x32) + x32 * density)).astype(x.dtype),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)

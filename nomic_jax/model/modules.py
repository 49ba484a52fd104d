"""The layers after pooling that have weights, and those among them: sentence-transformers' Dense, LayerNorm, Normalize.

They are computed in float32, on one vector of a text. Their weights are a part of the parameters of the embedder, under
MODULES beside those of the encoder, so that they are trained, stored and exported with it.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

MODULES = "modules"
LAYER_NORM_EPS = 1e-5  # torch.nn.functional.layer_norm's


@dataclasses.dataclass(frozen=True)
class Module:
    """A layer on embeddings.

    Attributes:
      kind: "Dense": activation(x W + b). "LayerNorm": with scale and bias. "Normalize": x scaled to length 1.
      width: number of components of its output.
      bias: whether a Dense has a bias.
      activation: of a Dense.
    """

    kind: Literal["Dense", "LayerNorm", "Normalize"]
    width: int
    bias: bool = True
    activation: Literal["identity", "tanh"] = "identity"

    def __post_init__(self):
        if self.kind not in ("Dense", "LayerNorm", "Normalize") or self.activation not in ("identity", "tanh"):
            raise ValueError(f"a module {self.kind!r} with the activation {self.activation!r} is not implemented")
        if type(self.width) is not int or self.width < 1 or type(self.bias) is not bool:
            raise ValueError(f"a module of width {self.width!r} and bias {self.bias!r}; expected a number, and a bool")


def module_name(index: int, module: Module) -> str:
    """The name of a module's parameters: "0_Dense" for the first after pooling, if it is one."""
    return f"{index}_{module.kind}"


def check_modules(modules: tuple[Module, ...], width: int) -> None:
    """Raises ValueError for a LayerNorm or Normalize that is not as wide as its input; ``width`` is that of pooling."""
    for index, module in enumerate(modules):
        if module.kind != "Dense" and module.width != width:
            raise ValueError(f"module {module_name(index, module)} has the width {module.width}; its input has {width}")
        width = module.width


def abstract_modules(modules: tuple[Module, ...], width: int) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    """Returns the parameters as shapes; ``width`` is that of the pooled vectors. Modules without any are left out."""
    params = {}
    for index, module in enumerate(modules):
        shapes: dict[str, tuple[int, ...]] = {}
        if module.kind == "Dense":
            shapes = {"kernel": (width, module.width)} | ({"bias": (module.width,)} if module.bias else {})
        elif module.kind == "LayerNorm":
            shapes = {"scale": (width,), "bias": (width,)}
        if shapes:
            params[module_name(index, module)] = {
                name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()
            }
        width = module.width
    return params


def init_modules(key: jax.Array, modules: tuple[Module, ...], width: int, init_std: float) -> dict:
    """Returns random parameters: kernels normal(0, init_std), biases 0, scales 1."""

    def leaf(path: tuple, shape: jax.ShapeDtypeStruct) -> jax.Array:
        module, name = (part.key for part in path)
        if name == "kernel":
            return init_std * jax.random.normal(jax.random.fold_in(key, int(module.partition("_")[0])), shape.shape)
        return jnp.full(shape.shape, float(name == "scale"), shape.dtype)

    return jax.tree.map_with_path(leaf, abstract_modules(modules, width))


def apply_modules(params: dict, x: jax.Array, modules: tuple[Module, ...]) -> jax.Array:
    """Returns the output of the modules, in order, for vectors [..., D] in float32.

    Args:
      params: see ``abstract_modules``.
    """
    for index, module in enumerate(modules):
        weights = params.get(module_name(index, module), {})
        if module.kind == "Normalize":
            x = normalized(x)
        elif module.kind == "LayerNorm":
            x = standardized(x) * weights["scale"] + weights["bias"]
        else:
            x = x @ weights["kernel"]
            x = x + weights["bias"] if module.bias else x
            x = jnp.tanh(x) if module.activation == "tanh" else x
    return x


def normalized(x: jax.Array) -> jax.Array:
    """Returns vectors [..., D] scaled to length 1."""
    # rsqrt of the clamped squared norm, not a division by the norm: the gradient at the zero vector is 0, not NaN.
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x**2, axis=-1, keepdims=True), 1e-24))


def standardized(x: jax.Array) -> jax.Array:
    """Returns vectors [..., D] with mean 0 and variance 1, as a LayerNorm without scale and bias."""
    # Not jax.nn.standardize: its variance E[x^2] - E[x]^2 loses a small spread around a large mean.
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + LAYER_NORM_EPS)

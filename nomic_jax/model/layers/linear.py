"""The linear layer of the encoder and its heads."""

import jax
import jax.numpy as jnp
from flax import nnx

from nomic_jax.model.config import EncoderConfig


class Linear(nnx.Linear):
    """A matrix product over the last axis. Leading axes are flattened, so that it is one product of two matrices."""

    def __init__(
        self, in_features: int, out_features: int, config: EncoderConfig, rngs: nnx.Rngs, *, use_bias: bool = True
    ):
        """``use_bias``: False for a layer without a bias in models whose other layers have one."""
        super().__init__(
            in_features,
            out_features,
            use_bias=config.use_bias and use_bias,
            kernel_init=nnx.initializers.normal(config.init_std),
            dtype=jnp.dtype(config.dtype),
            rngs=rngs,
        )

    def __call__(self, inputs: jax.Array, out_sharding=None, columns: slice = slice(None)) -> jax.Array:
        """``columns``: of the output, if only these are wanted."""
        # With two leading axes XLA copies the activations into another layout for the kernel's gradient (CPU: 1.5x).
        flat = inputs.reshape(-1, self.in_features).astype(self.dtype) @ self.kernel[...][:, columns].astype(self.dtype)
        if self.bias is not None:
            # The sum in float32 makes the gradient of the bias, a sum over all tokens, a sum in float32.
            flat = (flat.astype(jnp.float32) + self.bias[...][columns]).astype(self.dtype)
        return flat.reshape(*inputs.shape[:-1], flat.shape[-1])

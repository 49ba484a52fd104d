"""The norm of an encoder with its parameters, and which implementation computes it.

The kernel is imported where it is used: not every jaxlib has Pallas for GPUs.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from nomic_jax.model.attention import is_traced_for_absent, traced_platform
from nomic_jax.model.config import EncoderConfig
from nomic_jax.model.layers.layer_norm import layer_norm, rms_norm


class Norm(nnx.LayerNorm):
    """``layer_norm`` or ``rms_norm`` over the last axis with its parameters; the output has the computation dtype.

    ``width``: of the last axis, if it is not that of the encoder.
    """

    def __init__(self, config: EncoderConfig, rngs: nnx.Rngs, width: int | None = None):
        self.config = config
        has_bias = config.norm == "layer_norm" and config.norm_bias
        super().__init__(width or config.hidden_size, epsilon=config.layer_norm_eps, use_bias=has_bias, rngs=rngs)
        self.output_dtype = jnp.dtype(config.dtype)
        self.all_kept = config.recompute in ("none", "auto")

    def __call__(self, x: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
        assert self.scale is not None
        how: dict[str, Any] = {"epsilon": self.epsilon, "dtype": self.output_dtype, "all_kept": self.all_kept}
        if self.config.norm == "rms_norm":
            return rms_norm(x, self.scale[...], **how)
        return layer_norm(x, self.scale[...], None if self.bias is None else self.bias[...], **how)

    def of_sum(self, x: jax.Array, added: jax.Array, uses: int) -> tuple[jax.Array, ...]:
        """Returns the norm of x + added as often as it is used, each time the same; see ``norm_kernel.norm_of_sum``."""
        chosen = choose(self.config)
        if chosen == "xla" or x.dtype != self.output_dtype or added.dtype != x.dtype:
            return (self(x + added),) * uses
        from nomic_jax.model.layers.norm_kernel import norm_of_sum

        assert self.scale is not None and self.bias is not None
        scale_D, bias_D, epsilon = self.scale[...], self.bias[...], self.config.layer_norm_eps
        return norm_of_sum(x, added, scale_D, bias_D, epsilon, uses=uses, interpret=chosen == "interpret")


def choose(config: EncoderConfig) -> str:
    """Returns what computes norms of residual sums, on the default backend or within ``attention.traced_for``.

    It is "xla", "triton" or, if the configuration says so, "interpret".
    """
    wanted = config.norm_kernel
    has_kernel = config.norm == "layer_norm" and config.norm_bias and not config.pre_norm
    if not has_kernel or wanted == "xla" or (wanted != "interpret" and traced_platform() != "gpu"):
        return "xla"
    try:
        from nomic_jax.model.layers.norm_kernel import is_sound, is_supported
    except ImportError:  # a jaxlib without Triton
        return "xla"
    if not is_supported(config.hidden_size, config.dtype):
        return "xla"
    if wanted == "interpret":
        return wanted
    # An absent GPU cannot be asked.
    return "triton" if is_traced_for_absent() or is_sound(config.hidden_size, config.dtype) else "xla"

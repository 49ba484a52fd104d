"""The dtype that a model computes in at inference, where none is named."""

import functools
import sys

import jax
import jax.numpy as jnp

from nomic_jax.model.attention import choose, is_fused

DTYPES = ("auto", "float32", "bfloat16", "float16")


def computation_dtype(dtype: str | None = None, attention: str = "auto") -> str:
    """Returns the name of the dtype: that of the argument, unless it is None or "auto".

    "auto" is bfloat16 on a GPU that has flash attention in it, which float32 never reaches; float32 elsewhere. It is
    said once a process where it is bfloat16.

    Args:
      dtype: one of DTYPES, or None for "auto".
      attention: see ``nomic_jax.model.attention``.
    """
    if dtype is not None and dtype != "auto":
        return jnp.dtype(dtype).name
    if not is_fused(choose("bfloat16") if attention == "auto" else attention):
        return "float32"
    _say_once()
    return "bfloat16"


@functools.cache
def _say_once() -> None:
    # The figures are those of docs/performance.md; tests/inference/test_precision.py has bounds on them.
    print(
        f"computing in bfloat16 on {jax.local_devices()[0].device_kind}: vectors are off by about .6 % of their length "
        f"from those in float32, cosine similarities by less than .004; dtype=float32 (--dtype=float32) computes in "
        f"float32",
        file=sys.stderr,
    )

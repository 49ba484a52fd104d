"""Settings of a process that computes on a CPU: XLA's work space stays allocated, and products use XLA's library.

Nothing here happens at import. ``Embedder``, ``Classifier`` and training call it when they first compile for a CPU.
"""

import contextlib
import ctypes
import functools
import os
import sys
from collections.abc import Iterator

import jax
import jax.numpy as jnp

# With "0", the allocator of the process stays as it is.
KEEP_VARIABLE = "NOMIC_JAX_KEEP_WORK_SPACE"
# glibc's own variables for what is set here. Whoever sets one of them has decided.
_MALLOC_VARIABLES = ("MALLOC_ARENA_MAX", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
# Parameters of glibc's mallopt. No allocation has its own mapping, so that freed work space is used again, and up to 2
# GiB of it stay with the process. All threads use one arena, because others cannot hold large allocations.
_M_MMAP_MAX, _M_TRIM_THRESHOLD, _M_ARENA_MAX = -4, -1, -8
_MALLOPT = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 2**31 - 1, _M_ARENA_MAX: 1}
# XLA's option for matrix products and sums of the library YNNPACK instead of Eigen's. On an Intel Xeon with AVX-512 it
# made products 1.08 to 1.4 times as fast (jaxlib 0.10.2). On an AMD EPYC with AVX-512 it is what XLA does without the
# option; with the products alone, the sums of softmax and LayerNorm are slower there.
_LIBRARY_PRODUCTS = (
    "xla_cpu_experimental_ynn_fusion_type",
    "LIBRARY_FUSION_TYPE_DOT,LIBRARY_FUSION_TYPE_REDUCE",
)


@functools.cache
def keep_work_space() -> bool:
    """Makes the process keep the memory that XLA frees after each call of a program. Returns whether it does.

    XLA allocates the work space of a program anew in every call. glibc returns it to the system each time, and the next
    call waits for as many page faults. This is a setting of the whole process: up to 2 GiB of freed memory remain its
    own, for all that it allocates later. ``malloc_trim(0)`` of glibc returns them at any time.

    It does nothing on other systems and C libraries, if NOMIC_JAX_KEEP_WORK_SPACE is "0", and if GLIBC_TUNABLES or a
    variable such as MALLOC_ARENA_MAX says how the process shall allocate. Call it before the first program is compiled:
    threads that have allocated before keep their arena.
    """
    if sys.platform != "linux" or os.environ.get(KEEP_VARIABLE) == "0" or _allocator_is_configured():
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
        return all([mallopt(parameter, value) for parameter, value in _MALLOPT.items()])
    except (AttributeError, OSError):  # not glibc
        return False


@contextlib.contextmanager
def all_work_space_kept() -> Iterator[None]:
    """Within it, freed memory of any size stays with the process, and afterwards none.

    For training, whose step may need more than the 2 GiB of ``keep_work_space``. It does nothing where that does not.
    """
    if not keep_work_space():
        yield
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_TRIM_THRESHOLD, -1)  # the largest size_t
    try:
        yield
    finally:
        libc.mallopt(_M_TRIM_THRESHOLD, _MALLOPT[_M_TRIM_THRESHOLD])
        libc.malloc_trim(0)


def _allocator_is_configured() -> bool:
    named = any(name in os.environ for name in _MALLOC_VARIABLES)
    return named or "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", "")


def compiler_options(platform: str | None = None) -> dict[str, str]:
    """Returns the options with which ``jax.jit(..., compiler_options=...)`` compiles for a device.

    They ask for library products on a CPU where this jaxlib has them and XLA_FLAGS does not name the option.

    Args:
      platform: of the device; None for JAX's default backend.
    """
    name, value = _LIBRARY_PRODUCTS
    if (platform or jax.default_backend()) != "cpu" or name in os.environ.get("XLA_FLAGS", ""):
        return {}
    return {name: value} if _is_known(name, value) else {}


@functools.cache
def _is_known(name: str, value: str) -> bool:
    """Returns whether this jaxlib takes an option. XLA_FLAGS would end the process at one that it does not know."""
    try:
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            jax.jit(jnp.negative, compiler_options={name: value}).lower(0.0).compile()
    except (RuntimeError, ValueError):
        return False
    return True

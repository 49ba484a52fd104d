"""What every command sets for NVIDIA GPUs before jax starts: the share of their memory, and options of XLA.

jax reads both when it opens the GPUs, from the environment. What the user has set there wins.
"""

import os
from collections.abc import Iterable, MutableMapping
from pathlib import Path

# By default jax takes 75 %. What it leaves is for the contexts of CUDA and the libraries.
MEMORY_SHARE = 0.94
# Each of these says how jax shares the memory with others.
MEMORY_VARIABLES = (
    "XLA_CLIENT_MEM_FRACTION",
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
    "XLA_PYTHON_CLIENT_PREALLOCATE",
    "XLA_PYTHON_CLIENT_ALLOCATOR",
)
# Options that made a step or inference faster on a GPU, by `python -m benchmarks.gpu --parts=sweep`: none was measured
# yet. XLA ends the process at an option that it does not know: both ends of the supported versions of jaxlib must know
# it (tests/launch/test_gpu_settings.py).
XLA_DEFAULTS: tuple[str, ...] = ()
_DEVICES = ("nvidia[0-9]*", "dxg")  # dxg: WSL2


def prepare_gpus(
    *,
    share_memory: bool = False,
    defaults: Iterable[str] = XLA_DEFAULTS,
    environ: MutableMapping[str, str] = os.environ,
    devices: Path = Path("/dev"),
) -> None:
    """Sets the environment for a process that will use jax. Without a GPU on this machine, nothing.

    Args:
      share_memory: leave jax's own default of 75 %, because another library uses the GPU in the same process.
      defaults: options of XLA, as XLA_FLAGS has them.
    """
    if not any(found for name in _DEVICES for found in devices.glob(name)):
        return
    if not share_memory and not any(environ.get(name) for name in MEMORY_VARIABLES):
        environ["XLA_CLIENT_MEM_FRACTION"] = f"{MEMORY_SHARE:g}"
    given = environ.get("XLA_FLAGS", "").split()
    if given and not given[0].startswith("-"):
        return  # the name of a file that holds the options
    names = {_name(option) for option in given}
    if added := [option for option in defaults if _name(option) not in names]:
        environ["XLA_FLAGS"] = " ".join([*given, *added])


def _name(option: str) -> str:
    return option.lstrip("-").partition("=")[0]


if __name__ == "__main__":
    from .errors import refer

    refer("gpu", __doc__, "train")

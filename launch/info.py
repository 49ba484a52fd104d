"""Prints versions, devices and caches, for a bug report: nomic-jax info"""

import importlib.metadata
import os
import platform
import re
import sys
from pathlib import Path

import nomic_jax
from nomic_jax.arguments import Parser

# What changes results or where files go. No other variable is shown: some hold secrets.
VARIABLES = (
    *("CUDA_VISIBLE_DEVICES", "GLIBC_TUNABLES", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "JAX_ENABLE_X64"),
    *("JAX_COMPILATION_CACHE_DIR", "JAX_PLATFORMS", "LIBTPU_INIT_ARGS", "TF_CPP_MIN_LOG_LEVEL", "XDG_CACHE_HOME"),
    *("NOMIC_JAX_KEEP_WORK_SPACE", "XLA_FLAGS", "XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_PREALLOCATE"),
)


def main() -> None:
    Parser("nomic-jax info", __doc__).parse_args()
    print(f"nomic_jax {nomic_jax.__version__} in {Path(nomic_jax.__file__).parent}")
    print(f"Python {platform.python_version()} in {sys.prefix}, {platform.platform()}, {os.cpu_count()} cores")
    print("packages: " + ", ".join(packages()))
    import jax

    from nomic_jax.inference.compilation_cache import use_compilation_cache

    try:
        kinds = [device.device_kind for device in jax.devices()]
        counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
        print(f"devices: {counts} ({jax.default_backend()})")
    except RuntimeError as error:  # a driver that does not work is what many reports are about
        print(f"devices: none can be used: {error}")
    use_compilation_cache()
    print(f"compiled programs: {jax.config.jax_compilation_cache_dir}")  # type: ignore[attr-defined]
    from huggingface_hub import constants

    print(f"models of the hub: {constants.HF_HUB_CACHE}" + (" (offline)" if constants.HF_HUB_OFFLINE else ""))
    for name in VARIABLES:
        if name in os.environ:
            print(f"{name}={os.environ[name]}")


def packages() -> list[str]:
    """Name and version, or "no NAME", of all packages that this project names as dependencies, and of jax's plugins."""
    try:
        required = importlib.metadata.requires("nomic_jax") or []
    except importlib.metadata.PackageNotFoundError:  # a checkout on the path
        required = ["jax", "flax", "numpy", "tokenizers", "safetensors"]
    names = {_normalized(re.split(r"[^\w.-]", line)[0]) for line in required} - {"nomic-jax"}
    installed = {_normalized(each.name): each.version for each in importlib.metadata.distributions() if each.name}
    names |= {name for name in installed if name.startswith(("jaxlib", "jax-cuda"))}
    here = [f"{name} {installed[name]}" for name in sorted(names) if name in installed]
    absent = sorted(names - installed.keys())
    return here + ([f"not installed: {' '.join(absent)}"] if absent else [])


def _normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    main()

"""JAX's cache of compiled programs on disk, for commands: a second start of a command does not compile again."""

import os
from pathlib import Path

import jax


def use_compilation_cache() -> None:
    """Stores compiled programs on disk for later processes, unless JAX's own settings say otherwise.

    This is a setting of the whole process. The commands of this project call it; in a program, it is your choice.
    JAX_COMPILATION_CACHE_DIR names another directory, JAX_ENABLE_COMPILATION_CACHE=false disables the cache.
    """
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(home / "nomic_jax" / "jax"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)

"""Eight virtual CPU devices for every test, and the real tokenizer and embedder that the package index brings.

The time of most tests goes to compiling, so:

- Both workers and all processes that tests start share one cache of compiled programs, .pytest_cache/jax. Programs that
  compile in a tenth of a second are kept too (by default, JAX keeps those of a second or more).
- On a CPU, XLA compiles without LLVM's optimizations: a debug run of the MLM stage takes 6.0 instead of 8.2 s of CPU,
  of the contrastive stage on 8 devices 8.1 instead of 13.3 s. The losses differ by less than 1e-5. XLA's own passes
  (partitioning, fusion, collectives) are the same. XLA_FLAGS in the environment replaces these flags.
  `launch/test.sh --all`, the fault suite and the quickstart use XLA's own settings.
- Commands are forks of a process that has imported everything: tests/commands.py.
"""

import os
from pathlib import Path

# Before jax is imported, and in the environment, for the processes that tests start.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(__file__).parent.parent / ".pytest_cache" / "jax")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
if not Path("/dev/nvidiactl").exists():  # the compiler for GPUs reads these flags too
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")

import jax
import pytest

from tests.corpus import find_minilm, write_corpus

pytest_plugins = ["pytester", "tests.effort"]
jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(scope="session")
def minilm() -> Path:
    """all-MiniLM-L6-v2: real weights of a BERT, with bert-base-uncased's vocabulary."""
    return find_minilm()


@pytest.fixture(scope="session")
def tokenizer(minilm):
    from nomic_jax.data.tokens.tokenizer import Tokenizer

    return Tokenizer.from_directory(minilm)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory, minilm) -> Path:
    """See ``write_corpus``."""
    directory = tmp_path_factory.mktemp("corpus")
    write_corpus(directory, minilm)
    return directory

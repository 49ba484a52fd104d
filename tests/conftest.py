"""Eight virtual CPU devices for every test, and a real tokenizer and embedder from the package index.

Most tests spend their time on compilation. Therefore:

- Both workers and all processes that tests start share one cache of compiled programs, .pytest_cache/jax. The cache
  includes programs that compile in a tenth of a second (by default, JAX caches those of a second or more).
- On a CPU, XLA compiles without LLVM's optimizations. A debug run takes 6.0 instead of 8.2 s of CPU time in the MLM
  stage, and 8.1 instead of 13.3 s in the contrastive stage on 8 devices. The losses differ by less than 1e-5. XLA's own
  passes (partitioning, fusion, collectives) are the same. XLA_FLAGS in the environment replaces these flags.
  `launch/test.sh --all`, the fault suite and the quickstart use XLA's default settings.
- Commands are forks of a process that has already imported the libraries: tests/commands.py.
"""

import os
from pathlib import Path

# Set before jax is imported, and in the environment, so that processes that tests start inherit these settings.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(__file__).parent.parent / ".pytest_cache" / "jax")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
# A worker compiles and runs hundreds of programs; the work space of all of them would stay with it.
os.environ.setdefault("NOMIC_JAX_KEEP_WORK_SPACE", "0")
if not Path("/dev/nvidiactl").exists():  # the compiler for GPUs reads these flags too
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")

import jax
import pytest

from tests.corpus import find_minilm, write_corpus

pytest_plugins = ["pytester", "tests.effort"]
jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The directory of all-MiniLM-L6-v2: a BERT with real weights and bert-base-uncased's vocabulary."""
    return find_minilm()


@pytest.fixture(scope="session")
def tokenizer(minilm):
    from nomic_jax.data.tokens.tokenizer import Tokenizer

    return Tokenizer.from_directory(minilm)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory, minilm) -> Path:
    """The directory with the files of ``write_corpus``."""
    directory = tmp_path_factory.mktemp("corpus")
    write_corpus(directory, minilm)
    return directory

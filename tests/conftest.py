"""Eight virtual CPU devices for every test, and the real tokenizer and embedder that the package index brings."""

from pathlib import Path

import jax
import pytest

from tests.corpus import find_minilm, write_corpus

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parent.parent / ".pytest_cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


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

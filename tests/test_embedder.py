"""The Embedder against sentence-transformers with real weights, and its promises about inputs."""

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

import nomic_jax
from nomic_jax import Embedder

TEXTS = [
    "A man is eating food.",
    "what is the capital of France?",
    "",
    "   ",
    "Größe, 東京, עברית, العربية and 🚀",
    "a\x00b\tc",
    "many words " * 400,
    "one",
]


@pytest.fixture(scope="module")
def embedder(minilm):
    return Embedder.from_pretrained(minilm)


def test_equals_sentence_transformers(embedder, minilm):
    theirs = SentenceTransformer(str(minilm), device="cpu")
    assert embedder.max_length == theirs.max_seq_length
    ours = embedder.encode(TEXTS)
    assert ours.dtype == np.float32 and ours.shape == (len(TEXTS), 384)
    np.testing.assert_allclose(ours, theirs.encode(TEXTS), atol=2e-6)
    np.testing.assert_allclose(embedder.similarity(ours, ours), theirs.similarity(ours, ours).numpy(), atol=1e-6)


def test_a_text_alone_equals_the_text_in_a_batch(embedder):
    together = embedder.encode(TEXTS, batch_size=3)
    for text, vector in zip(TEXTS, together):
        np.testing.assert_allclose(embedder.encode(text), vector, atol=1e-6)


def test_shapes_of_one_text_and_of_none(embedder):
    assert embedder.encode("one").shape == (384,)
    assert embedder.encode([]).shape == (0, 384)
    assert embedder.encode(["one", "two"], truncate_dim=64).shape == (2, 64)


def test_truncated_vectors_are_normalised_again(embedder):
    full = embedder.encode(TEXTS)[:, :64]
    short = embedder.encode(TEXTS, truncate_dim=64)
    np.testing.assert_allclose(short, full / np.linalg.norm(full, axis=1, keepdims=True), atol=1e-6)


def test_prompts(embedder):
    with_prompt = embedder.encode(["food"], prompt="search_query: ")
    np.testing.assert_allclose(with_prompt, embedder.encode(["search_query: food"]), atol=1e-6)
    with pytest.raises(ValueError, match="unknown prompt_name 'search_qeury'"):
        embedder.encode(["food"], prompt_name="search_qeury")


@pytest.mark.parametrize("bad", [None, 3, b"bytes", ["nested"]])
def test_a_bad_input_is_named_by_its_index(embedder, bad):
    with pytest.raises(TypeError, match="input 1 is"):
        embedder.encode(["fine", bad])


def test_pure_function_is_what_encode_computes(embedder):
    ids = embedder.tokenizer.encode(["A man is eating food."])[0]
    batch = {"ids": ids[None], "length": np.array([len(ids)], np.int32)}
    vector = nomic_jax.embed(embedder.params, batch, embedder.config)
    np.testing.assert_allclose(vector[0], embedder.encode("A man is eating food."), atol=1e-6)


def test_a_name_that_is_nowhere_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match="neither a directory nor"):
        Embedder.from_pretrained(str(tmp_path / "nothing"))

"""Local tasks of every type with random words; they are hard enough for scores between 0 and 1."""

import random
from pathlib import Path

import pytest

from nomic_jax.data.formats.writing import write_rows


@pytest.fixture(scope="session")
def words(minilm) -> list[str]:
    return [word for word in (minilm / "vocab.txt").read_text(encoding="utf-8").split() if word.isalpha()]


@pytest.fixture(scope="session")
def local_tasks(tmp_path_factory, words) -> Path:
    """retrieval, classification, clustering and sts; some texts are longer than the model's maximum length."""
    folder = tmp_path_factory.mktemp("tasks")
    rng = random.Random(0)
    topics = [rng.sample(words, 12) for _ in range(3)]

    def text(source, n):
        return " ".join(rng.choices(source, k=n))

    corpus = [{"_id": f"d{i}", "title": text(words, 2), "text": text(words, 14 if i % 5 else 90)} for i in range(40)]
    write_rows(folder / "retrieval" / "corpus.jsonl", corpus)
    queries = [
        {"_id": f"q{i}", "text": text(corpus[i]["text"].split()[:14], 2) + " " + text(words, 3)} for i in range(20)
    ]
    write_rows(folder / "retrieval" / "queries.jsonl", queries)
    # The last query has no relevant document.
    qrels = [{"query_id": f"q{i}", "document_id": f"d{i}", "score": int(i < 19)} for i in range(20)]
    write_rows(folder / "retrieval" / "qrels.jsonl", qrels)

    def labelled(n, labels):
        return [{"text": f"{text(topics[i % 3], 4)} {text(words, 4)}", "label": labels[i % 3]} for i in range(n)]

    write_rows(folder / "classification" / "train.jsonl", labelled(45, ["a", "b", "c"]))
    write_rows(folder / "classification" / "test.jsonl", labelled(45, ["a", "b", "c"]))
    write_rows(folder / "clustering" / "test.jsonl", labelled(60, [0, 1, 2]))
    pairs = []
    for i in range(40):
        first = rng.choices(words, k=7)
        second = first[: i % 7] + rng.choices(words, k=7 - i % 7)
        pairs.append({"sentence1": " ".join(first), "sentence2": " ".join(second), "score": i % 7})
    write_rows(folder / "sts" / "test.jsonl", pairs)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory, minilm) -> Path:
    """A tiny nomic-bert with random weights, max_trained_positions 32 and max_positions 256."""
    import jax

    from nomic_jax.data.tokens.tokenizer import Tokenizer
    from nomic_jax.hf import Checkpoint
    from nomic_jax.hf.write import write_checkpoint
    from nomic_jax.model import EmbeddingConfig, EncoderConfig, init_encoder

    sizes = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "intermediate_size": 64}
    config = EncoderConfig(**sizes, max_positions=256, max_trained_positions=32, vocab_size=30528)
    params = jax.device_get(init_encoder(jax.random.key(0), config))
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tokenizer = Tokenizer.from_directory(minilm)
    write_checkpoint(folder, Checkpoint(EmbeddingConfig(config), {"encoder": params}, tokenizer))
    return folder

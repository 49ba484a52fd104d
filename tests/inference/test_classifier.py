"""The classifier: lengths, and the precision of its logits."""

import dataclasses

import jax
import numpy as np
import pytest

from nomic_jax import Classifier
from nomic_jax.hf import Checkpoint, write_checkpoint
from nomic_jax.model import EmbeddingConfig, EncoderConfig, init_encoder
from nomic_jax.model.heads import init_classifier

ENCODER = EncoderConfig(hidden_size=32, num_layers=1, num_heads=2, intermediate_size=64, dtype="bfloat16")
TEXTS = ["one", "two words", "and three words"]


@pytest.fixture(scope="module")
def run(tmp_path_factory, tokenizer):
    params = {"encoder": init_encoder(jax.random.key(0), ENCODER)}
    params["classifier"] = init_classifier(jax.random.key(1), ENCODER, 1)
    # As a run that trained in bfloat16.
    return Checkpoint(EmbeddingConfig(ENCODER), params, tokenizer)


def test_logits_are_computed_in_float32_whatever_the_run_computed_in(run, tmp_path, monkeypatch):
    monkeypatch.setattr("nomic_jax.inference.classifier.read_pretrained", lambda path: run)
    encoder = dataclasses.replace(ENCODER, dtype="float32")
    want = Classifier(run.params, encoder, run.tokenizer, max_length=16).logits(TEXTS)
    np.testing.assert_array_equal(Classifier.from_pretrained("run", max_length=16).logits(TEXTS), want)
    rough = Classifier.from_pretrained("run", dtype="bfloat16", max_length=16).logits(TEXTS)
    assert 0 < np.abs(rough - want).max() < 0.1


@pytest.mark.parametrize("length", [0, 1, 8193])
def test_a_length_that_the_encoder_does_not_take_is_refused(run, tmp_path, length):
    params = {"encoder": run.params["encoder"], "classifier": run.params["classifier"]}
    write_checkpoint(tmp_path / "model", dataclasses.replace(run, params=params, labels=("score",)), naming="native")
    with pytest.raises(ValueError, match=rf"max_length {length} is not within 2\.\.8192"):
        Classifier.from_pretrained(tmp_path / "model", max_length=length)

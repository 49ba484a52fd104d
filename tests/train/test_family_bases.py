"""Training from a base of another family: each stage runs, and the result is a model of that family."""

import jax
import numpy as np
import pytest

from nomic_jax.hf import write_checkpoint
from nomic_jax.hf.read import read_checkpoint
from nomic_jax.run.pretrained import read_pretrained
from nomic_jax.train.loop import train
from tests.hf.family_models import MODELS, OTHER, make_model, saved, unigram
from tests.train.tiny_configs import STAGES, load_config

pytest.importorskip("torch", reason="the bases are models of transformers; torch is not installed")
ROWS = {"roberta": 258, "xlm-roberta": 258, "mpnet": 258}


@pytest.mark.exhaustive(reason="a step differs from that of a BERT in the encoder alone, which tests/hf compares")
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("model_type", MODELS)
def test_every_stage_trains_from_the_base(model_type, stage, corpus, minilm, tmp_path):
    import transformers

    rows = ROWS.get(model_type, 256)
    base = make_model(model_type, OTHER, max_position_embeddings=rows)
    unigram().save(saved(base, tmp_path / "base"))
    layout = {} if stage == "mlm" else {"data.layout": "packed"}
    changes = {"init_from": str(tmp_path / "base"), "data.tokenizer": "", **layout}
    config = load_config(stage, corpus, minilm, **changes)
    train(config, tmp_path / "run", jax.devices()[:1])
    trained = read_pretrained(tmp_path / "run")
    before = read_checkpoint(tmp_path / "base")
    assert trained.config.encoder.model_type == model_type
    assert jax.tree.structure(trained.params["encoder"]) == jax.tree.structure(before.params["encoder"])
    changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), trained.params["encoder"], before.params["encoder"])
    assert all(jax.tree.leaves(changed)), changed
    write_checkpoint(tmp_path / "export", trained)
    kind = "ForMaskedLM" if stage == "mlm" else "Model"
    client = getattr(transformers, MODELS[model_type][0] + kind).from_pretrained(tmp_path / "export")
    words = trained.params["encoder"]["embeddings"]["word"]["embedding"]
    assert np.array_equal(client.get_input_embeddings().weight.detach().numpy(), words)
    assert trained.tokenizer and before.tokenizer and trained.tokenizer.sha256 == before.tokenizer.sha256

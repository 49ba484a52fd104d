"""The moving average of the weights: against its definition in float64, over a kill, in evaluation and export."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from nomic_jax.hf import write_checkpoint
from nomic_jax.model import EmbeddingConfig
from nomic_jax.run.pretrained import read_pretrained
from nomic_jax.train.config import ConfigurationError, TrainConfig
from nomic_jax.train.loop import train
from nomic_jax.train.objectives import make_stage
from nomic_jax.train.optim import learning_rate, make_optimizer
from nomic_jax.train.reproduce import hash_state
from nomic_jax.train.sharding import DATA, make_mesh
from nomic_jax.train.state import abstract_state, state_specs
from tests.train.test_config import values
from tests.train.tiny_configs import load_config

DECAY = 0.7


def word_table(path, weights):
    return read_pretrained(path, weights).params["encoder"]["embeddings"]["word"]["embedding"]


def test_the_average_is_evaluated_saved_resumed_and_exported(corpus, minilm, tmp_path):
    evaluated = []

    def evaluate(model):
        evaluated.append(np.array(model.params["encoder"]["embeddings"]["word"]["embedding"]))
        return {"task": {"ndcg@10": 0.5}}

    changes = dict(steps=4, sharding="zero1", checkpoint=dict(every=1, keep=9))
    changes |= {"optim.ema": DECAY, "optim.lr": 1e-2}
    changes["evaluation"] = dict(every=4, tasks="some", metric="ndcg@10")
    config = load_config("mlm", corpus, minilm, **changes)
    for stop in (2, None):
        train(config, tmp_path / "run", jax.devices()[:2], evaluate, stop=stop)
    steps = [tmp_path / "run" / "checkpoints" / str(step) for step in range(5)]
    after = [word_table(step, "raw").astype(np.float64) for step in steps[1:]]
    assert np.linalg.norm(after[0] - word_table(steps[0], "raw")) > 0
    # The first average is the weights after the first update; those before it do not count.
    np.testing.assert_allclose(word_table(steps[1], "ema"), after[0], atol=1e-7)
    expected = np.average(after, axis=0, weights=DECAY ** np.arange(3, -1, -1))
    np.testing.assert_allclose(word_table(steps[4], "ema"), expected, atol=1e-6)
    assert np.abs(expected - after[-1]).max() > 1e-3
    # It is what is evaluated, and read where nothing is said.
    average = word_table(steps[4], "ema")
    assert np.array_equal(evaluated[0], average) and np.array_equal(word_table(tmp_path / "run", None), average)
    # A run that was not interrupted has the same bits.
    train(config, tmp_path / "whole", jax.devices()[:2], evaluate)
    assert hash_state(tmp_path / "whole" / "checkpoints" / "4") == hash_state(steps[4])
    export(tmp_path / "run", tmp_path / "export")
    card = (tmp_path / "export" / "README.md").read_text(encoding="utf-8")
    assert "moving average over the updates of the last stage, with a decay of 0.7" in card
    with pytest.raises(ValueError, match=r"export has no moving average of its weights; runs with config.optim.ema"):
        read_pretrained(tmp_path / "export", "ema")


def export(run, directory):
    source = read_pretrained(run)
    assert source.training[-1]["weights"] == "ema" and read_pretrained(run, "raw").training[-1]["weights"] == "raw"
    write_checkpoint(directory, source)


def test_a_run_without_one_has_none(corpus, minilm, tmp_path):
    config = load_config("mlm", corpus, minilm, steps=0)
    train(config, tmp_path / "run", jax.devices()[:1])
    with pytest.raises(ValueError, match="has no moving average"):
        read_pretrained(tmp_path / "run", "ema")
    assert "weights" not in read_pretrained(tmp_path / "run").training[-1]


def test_it_is_divided_as_the_optimizer_state_is(corpus, minilm):
    config = load_config("contrastive", corpus, minilm)
    stage, mesh = make_stage(config, EmbeddingConfig(config.model)), make_mesh()
    optimizer = make_optimizer(config.optim, learning_rate(config.optim, 3))
    for sharding, expected in (("replicated", P()), ("zero1", P(DATA)), ("fsdp", P(DATA))):
        state = abstract_state(stage, optimizer, mesh, sharding, ema=0.9)
        specs = state_specs(state, mesh, sharding)
        assert specs.ema == specs.opt_state[1].mu
        assert specs.ema["encoder"]["layers"][0]["attention"]["qkv"]["kernel"] == expected


@pytest.mark.parametrize("decay", [1.0, -0.1])
def test_a_rate_that_cannot_work(decay):
    fields = values("contrastive")
    fields["optim"]["ema"] = decay
    with pytest.raises(ConfigurationError, match=f"config.optim.ema is {decay:g}; write a decay rate below 1"):
        TrainConfig.from_mapping(fields).check(1)

"""Sources with losses of their own train together: on 1 and 8 devices, in rows and in chunks, and after a resume."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from nomic_jax.hf import Checkpoint
from nomic_jax.model import EmbeddingConfig, init_encoder
from nomic_jax.run.pretrained import read_pretrained
from nomic_jax.train.config import ConfigurationError
from nomic_jax.train.loop import train
from nomic_jax.train.objectives import make_stage, make_stream
from nomic_jax.train.reproduce import hash_state
from nomic_jax.train.sharding import DATA, make_mesh, put_rows
from nomic_jax.train.watch.metrics import read_metrics
from tests.train.test_stages import assert_same, three_steps
from tests.train.tiny_configs import load_config

OBJECTIVES = {
    "cosent": {"type": "scored", "columns": ["query", "document", "score"], "loss": "cosent"},
    "kl": {"type": "triplet", "scores": "scores", "loss": "kl", "infonce_weight": 0.5, "temperature": 0.1},
    "margin_mse": {"type": "triplet", "scores": "scores", "loss": "margin_mse", "score_range": [-5, 5]},
}


def write_mixture(folder, corpus, *names):
    rng = np.random.default_rng(0)
    rows = [json.loads(line) for line in (corpus / "triplets.jsonl").read_text().splitlines()]
    sources = []
    for name in names:
        scored = [row | {"score": rng.random(), "scores": rng.normal(size=6).round(3).tolist()} for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in scored))
        sources.append({"name": name, "bucket": f"{name}.jsonl", "objective": OBJECTIVES[name]})
    (folder / "mixture.yaml").write_text(json.dumps(sources))
    return str(folder / "mixture.yaml")


def mean_loss(config, stream, device_count, guide=None):
    """The loss of the first batch, and its metrics, by a model with random weights."""
    stage = make_stage(config, EmbeddingConfig(config.model), stream.layout, guide)
    mesh = make_mesh(jax.devices()[:device_count])

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P(), P(DATA)), out_specs=P())
    def sums(params, rows):
        return jax.lax.psum(stage.loss(params, rows), DATA)

    params = stage.init(jax.random.key(0)) | jax.tree.map(jnp.asarray, stage.frozen)
    found = sums(params, put_rows(stream.batch(0).arrays, mesh))
    return {name: float(x / found.weight) for name, x in (found.metrics | {"loss": found.loss}).items()}


def in_rows_and_chunks(folder, corpus, minilm, name):
    changes = {"data.mixture": write_mixture(folder, corpus, name), "loss.matryoshka_dims": (32, 8)}
    changes |= {"data.cache_dir": str(folder / "cache")}
    padded = load_config("finetune", corpus, minilm, **changes)
    return padded, load_config("finetune", corpus, minilm, **changes | {"data.layout": "packed"})


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_loss_in_rows_on_one_device_and_in_chunks_on_eight(tmp_path, corpus, minilm, tokenizer, name):
    padded, packed = in_rows_and_chunks(tmp_path, corpus, minilm, name)
    one = mean_loss(padded, make_stream(padded, tokenizer, 1), 1)
    eight = mean_loss(packed, make_stream(packed, tokenizer, 8), 8)
    assert one.keys() == eight.keys() >= {"loss", {"cosent": "concordance"}.get(name, "agreement")}
    assert one == pytest.approx(eight, rel=1e-5)


@pytest.mark.exhaustive(reason="the step adds the losses up as that of InfoNCE, which the default suite compares")
@pytest.mark.parametrize("name", OBJECTIVES)
def test_three_steps_in_rows_on_one_device_and_in_chunks_on_eight(tmp_path, corpus, minilm, tokenizer, name):
    padded, packed = in_rows_and_chunks(tmp_path, corpus, minilm, name)
    one, eight = three_steps(padded, tokenizer, 1), three_steps(packed, tokenizer, 8)
    # assert_same compares the accuracy, which InfoNCE alone has.
    for metrics in (*one[0], *eight[0]):
        metrics.setdefault("accuracy", 0.0)
    assert_same(eight, one)


def test_a_guide_that_is_the_model_has_nothing_to_teach(tmp_path, corpus, minilm, tokenizer):
    source = {"name": "text", "bucket": str(corpus / "text.jsonl")}
    source["objective"] = {"type": "self", "loss": "embedding_cosine"}
    (tmp_path / "mixture.yaml").write_text(json.dumps([source]))
    changes = {"data.mixture": str(tmp_path / "mixture.yaml"), "data.cache_dir": str(tmp_path / "cache")}
    config = load_config("contrastive", corpus, minilm, **changes, **{"data.layout": "packed"})
    with pytest.raises(
        ConfigurationError, match=r"'text' has the loss embedding_cosine, but no teacher: name a column"
    ):
        make_stream(config, tokenizer, 1)
    config = dataclasses.replace(config, loss=dataclasses.replace(config.loss, guide="a"))
    model = EmbeddingConfig(config.model)
    guide = Checkpoint(model, {"encoder": init_encoder(jax.random.key(0), config.model)}, tokenizer)
    found = mean_loss(config, make_stream(config, tokenizer, 8), 8, guide)
    assert found == pytest.approx({"loss": 0, "teacher_cosine": 1}, abs=1e-6)


def test_the_projection_to_a_teachers_width_is_no_part_of_the_model(tmp_path, corpus, minilm):
    rng = np.random.default_rng(0)
    rows = [json.loads(line) | {"vector": rng.normal(size=3).tolist()} for line in (corpus / "text.jsonl").open()]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    objective = {"type": "self", "vectors": "vector", "loss": "embedding_cosine"}
    source = {"name": "text", "bucket": "text.jsonl", "objective": objective}
    (tmp_path / "mixture.yaml").write_text(json.dumps([source]))
    changes = {"data.mixture": str(tmp_path / "mixture.yaml"), "data.cache_dir": str(tmp_path / "cache")}
    config = load_config("contrastive", corpus, minilm, steps=1, **changes, **{"loss.projection_dim": 3})
    train(config, tmp_path / "run")
    assert set(read_pretrained(tmp_path / "run").params) == {"encoder"}


OTHER = pytest.mark.exhaustive(reason="tests of dropout compare chunks with rows")


@pytest.mark.parametrize("layout", ["padded", pytest.param("packed", marks=OTHER)])
def test_a_text_twice_differs_by_dropout_alone(tmp_path, corpus, minilm, tokenizer, layout):
    source = {"name": "text", "bucket": str(corpus / "text.jsonl"), "objective": {"type": "self", "loss": "simcse"}}
    (tmp_path / "mixture.yaml").write_text(json.dumps([source]))
    changes = {"data.mixture": str(tmp_path / "mixture.yaml"), "data.cache_dir": str(tmp_path / "cache")}
    changes |= {"data.layout": layout, "loss.temperature": 0.05}
    config = load_config("contrastive", corpus, minilm, **changes)
    stream = make_stream(config, tokenizer, 8)
    seeds = [stream.batch(step).arrays["dropout"] for step in range(2)]
    assert len(set(np.concatenate(seeds).tolist())) == sum(map(len, seeds))  # other masks everywhere, and in each step
    np.testing.assert_array_equal(stream.batch(1, 1, 2).arrays["dropout"], np.split(seeds[1], 2)[1])

    def loss(rate):
        own = dataclasses.replace(config, loss=dataclasses.replace(config.loss, dropout=rate))
        return mean_loss(own, stream, 8)["loss"]

    assert loss(0.1) == loss(0.1) > loss(0.0) + 1e-3


@pytest.mark.exhaustive(reason="compiles three programs, twice; streams and formulas are tested by themselves")
def test_a_run_of_several_losses_resumes_exactly(tmp_path, corpus, minilm):
    changes = {"data.mixture": write_mixture(tmp_path, corpus, *OBJECTIVES), "data.cache_dir": str(tmp_path / "cache")}
    config = load_config("finetune", corpus, minilm, steps=9, log_every=1, **changes, **{"checkpoint.every": 4})
    train(config, tmp_path / "whole")
    train(config, tmp_path / "parts", stop=4)
    train(config, tmp_path / "parts")
    whole, parts = (read_metrics(tmp_path / name) for name in ("whole", "parts"))
    assert {line["source"] for line in whole} == set(OBJECTIVES)
    for left, right in zip(whole, parts, strict=True):
        assert (left["source"], left["loss"]) == (right["source"], right["loss"])
    assert hash_state(tmp_path / "whole" / "checkpoints" / "9") == hash_state(tmp_path / "parts" / "checkpoints" / "9")

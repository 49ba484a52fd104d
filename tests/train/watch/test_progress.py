"""What a run reports during training: MFU (checked against XLA's count), traces, evaluations, the best checkpoint."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nomic_jax.data.batches.stream import Batch
from nomic_jax.model import EncoderConfig, abstract_encoder, encode
from nomic_jax.train.config import ConfigurationError
from nomic_jax.train.loop import train
from nomic_jax.train.watch.flops import peak_flops, training_flops
from nomic_jax.train.watch.metrics import read_metrics
from tests.train.tiny_configs import load_config


def full_rows(rows, length, **arrays):
    return Batch(arrays, "text", rows * length, rows * length, rows * length * length)


def test_flops_are_those_of_xla():
    config = EncoderConfig(hidden_size=128, num_layers=2, num_heads=2, intermediate_size=512, vocab_size=1000)
    ids = jax.ShapeDtypeStruct((4, 256), jnp.int32)
    forward = jax.jit(lambda params, ids: encode(params, ids, dataclasses.replace(config, attention="xla")))
    counted = forward.lower(abstract_encoder(config), ids).compile().cost_analysis()["flops"]
    # XLA also counts norms, softmax and activations.
    assert 0.85 < training_flops(config, full_rows(4, 256)) / 3 / counted < 1.0


def test_flops_of_the_paper_s_model():
    """Forward pass per token: 0.227 GFLOP in the layers' matrices, 4 * D * layers = 36,864 FLOP per attended token."""
    for length, expected in ((512, 0.245e9), (2048, 0.302e9), (8192, 0.528e9)):
        assert training_flops(EncoderConfig(), full_rows(2, length)) / 3 / (2 * length) == pytest.approx(
            expected, rel=5e-3
        )
    target = np.zeros((2, round(0.3 * 2048)), np.int32)
    with_head = training_flops(EncoderConfig(), full_rows(2, 2048, target=target)) / 3 / (2 * 2048)
    # The head costs 0.0144 GFLOP. For 70 % of the tokens, the last layer skips its output projection and its MLP.
    assert with_head - 0.302e9 == pytest.approx(0.0144e9 - 0.7 * 2 * (768**2 + 3 * 768 * 3072), abs=0.0005e9)


def test_peaks():
    assert peak_flops("NVIDIA H100 80GB HBM3") == peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("cpu") is None


def test_lines_trace_and_mfu(corpus, minilm, tmp_path):
    config = load_config("contrastive", corpus, minilm, steps=4, peak_tflops=0.5, profile="2:3", log_every=2)
    train(config, tmp_path, jax.devices()[:2])
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [2, 4]
    for line in lines:
        assert 0 < line["mfu"] < 1 and 0 < line["real_tokens"] < line["padded_tokens"]
        assert line["compiled_shapes"] >= 1 and line["source"] in "ab"
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


@pytest.mark.parametrize("profile", ["5", "5:4", "0:3", "a:b"])
def test_a_range_of_steps_that_is_none(profile, corpus, minilm):
    with pytest.raises(ConfigurationError, match="write first:last"):
        load_config("mlm", corpus, minilm, profile=profile).check(1)


def test_a_tracker_that_is_not_installed(corpus, minilm, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(ModuleNotFoundError, match="pip install wandb"):
        train(load_config("mlm", corpus, minilm, wandb="project"), tmp_path, jax.devices()[:1])


class Figures:
    """An evaluation that returns the given scores in order and records the parameters of the evaluated models."""

    def __init__(self, scores):
        self.scores, self.models = list(scores), []

    def __call__(self, model):
        self.models.append(jax.tree.map(np.array, model.params))
        return {"task": {"ndcg@10": self.scores.pop(0), "recall@1": 0.0}}


def test_the_best_checkpoint_is_kept(corpus, minilm, tmp_path):
    from nomic_jax.run.pretrained import read_pretrained

    config = load_config(
        "contrastive",
        corpus,
        minilm,
        steps=8,
        sharding="fsdp",
        checkpoint=dict(every=1, keep=1),
        evaluation=dict(every=2, tasks="some", metric="ndcg@10"),
    )
    figures = Figures([float("nan"), 0.7])
    train(config, tmp_path, jax.devices()[:4], evaluate=figures, stop=5)
    figures.scores = [0.3, 0.7]
    train(config, tmp_path, jax.devices()[:4], evaluate=figures)
    lines = [json.loads(line) for line in (tmp_path / "evaluation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6, 8]
    np.testing.assert_equal([line["figure"] for line in lines], [np.nan, 0.7, 0.3, 0.7])
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["4", "8"]
    # Among equal scores, the earliest checkpoint is the best. The saved parameters are those that were evaluated.
    best = read_pretrained(tmp_path / "best")
    assert best.training[-1]["step"] == 4
    assert jax.tree.all(jax.tree.map(np.array_equal, best.params["encoder"], figures.models[1]["encoder"]))


def test_a_metric_that_no_task_has(corpus, minilm, tmp_path):
    config = load_config(
        "contrastive", corpus, minilm, evaluation=dict(every=1, tasks="some", metric="map"), batch_size=8
    )
    with pytest.raises(ConfigurationError, match="'map'; the tasks have ndcg@10, recall@1"):
        train(config, tmp_path, jax.devices()[:1], evaluate=Figures([0.1]))

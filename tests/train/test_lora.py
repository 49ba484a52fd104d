"""Training an adapter: only it has gradients and optimizer state, in every layout and sharding, over a kill."""

import sys

import jax
import numpy as np
import pytest

import convert.to_hf
from nomic_jax import Embedder
from nomic_jax.hf import Checkpoint, write_checkpoint
from nomic_jax.model import EmbeddingConfig, EncoderConfig, init_encoder
from nomic_jax.run.lineage import trace
from nomic_jax.run.pretrained import read_pretrained
from nomic_jax.train.config import ConfigurationError
from nomic_jax.train.loop import train
from nomic_jax.train.objectives import make_stage
from nomic_jax.train.optim import learning_rate, make_optimizer
from nomic_jax.train.reproduce import hash_state, reproduce
from nomic_jax.train.sharding import make_mesh
from nomic_jax.train.state import abstract_state
from tests.train.tiny_configs import TINY, load_config

RANK = 2


@pytest.fixture(scope="module")
def base(tokenizer, tmp_path_factory):
    """A small model in Hugging Face form, which peft could open."""
    sizes = {name: value for name, value in TINY.items() if name != "max_positions"}
    encoder = EncoderConfig.bert(**sizes, max_positions=128, max_trained_positions=128)
    params = jax.device_get(init_encoder(jax.random.key(0), encoder))
    folder = tmp_path_factory.mktemp("lora") / "base"
    write_checkpoint(folder, Checkpoint(EmbeddingConfig(encoder), {"encoder": params}, tokenizer, prompts={}))
    return folder


def config_of(corpus, minilm, base, **changes):
    changes = {"lora.rank": RANK, "optim.lr": 1e-2, "init_from": str(base), "data.tokenizer": ""} | changes
    return load_config("contrastive", corpus, minilm, **changes)


@pytest.fixture(scope="module")
def run(corpus, minilm, base, tmp_path_factory):
    """A run with a moving average, stopped after two of its three steps and resumed."""
    workdir = tmp_path_factory.mktemp("lora") / "run"
    changes = {"sharding": "zero1", "optim.ema": 0.5, "checkpoint.every": 1, "checkpoint.keep": 9}
    config = config_of(corpus, minilm, base, **changes)
    train(config, workdir, jax.devices()[:2], stop=2)
    train(config, workdir, jax.devices()[:2])
    return workdir


def leaves(tree):
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def test_only_the_adapter_is_trained(run, base):
    before, after = (leaves(read_pretrained(path).params["encoder"]) for path in (base, run))
    for name, leaf in before.items():
        change = after[name].astype(np.float64) - leaf
        if "layers" not in name or "kernel" not in name:
            assert not change.any(), name
            continue
        parts = np.split(change, 3, axis=-1) if "qkv" in name else [change]
        ranks = [np.linalg.matrix_rank(part, tol=1e-5 * np.linalg.norm(part)) for part in parts]
        assert ranks == [RANK] * len(parts), name


def test_a_killed_run_and_a_repetition_have_the_same_bits(run, corpus, minilm, base, tmp_path):
    again = reproduce(run / "checkpoints" / "3", tmp_path / "again", recorded_paths=True)
    assert again.identical and hash_state(run / "checkpoints" / "2") != again.found
    assert {finding.status for finding in trace(run, recorded_paths=True)} == {"verified"}


def test_the_average_is_that_of_the_adapter(run):
    def adapter(step, weights):
        return leaves(read_pretrained(run / "checkpoints" / str(step), weights).adapter.params)

    raw = [adapter(step, "raw") for step in (1, 2, 3)]
    for name, leaf in adapter(3, "ema").items():
        expected = np.average([each[name] for each in raw], axis=0, weights=[0.25, 0.5, 1.0])
        np.testing.assert_allclose(leaf, expected, atol=1e-6)


def test_the_optimizer_has_state_for_the_adapter_alone(corpus, minilm, base):
    config = config_of(corpus, minilm, base, **{"optim.ema": 0.5})
    encoder = read_pretrained(base).config
    stage = make_stage(config, encoder)
    optimizer = make_optimizer(config.optim, learning_rate(config.optim, 3))
    state = abstract_state(stage, optimizer, make_mesh(jax.devices()[:1]), ema=0.5)

    def size(tree):
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    D, F, r = 32, 64, RANK
    adapter = 4 * (4 * r * (D + D) + 2 * r * (D + F))  # query, key, value, output; up, down
    counts = 2 * 4
    assert size(state.params) == size(state.ema) == adapter
    assert size(state.opt_state) == 2 * adapter + counts
    assert size(stage.frozen) > 50 * adapter


@pytest.mark.slow(reason="compiles two training steps")
def test_layouts_and_shardings_take_the_same_steps(corpus, minilm, base, tmp_path):
    plain = config_of(corpus, minilm, base, **{"loss.learn_temperature": True})
    train(plain, tmp_path / "one", jax.devices()[:1])
    packed = {"data.layout": "packed", "data.chunk_tokens": 128, "kept_chunks": 0.5, "sharding": "fsdp"}
    other = config_of(corpus, minilm, base, **{"loss.learn_temperature": True, **packed})
    train(other, tmp_path / "four", jax.devices()[:4])
    one, four = (read_pretrained(tmp_path / name) for name in ("one", "four"))
    assert one.params["temperature"]["log_scale"] == pytest.approx(four.params["temperature"]["log_scale"], rel=1e-5)
    ours, theirs = leaves(one.adapter.params), leaves(four.adapter.params)
    assert ours.keys() == theirs.keys()
    for name, leaf in ours.items():
        np.testing.assert_allclose(leaf, theirs[name], atol=2e-4 * np.abs(leaf).max(), err_msg=name)


def test_exports_and_what_starts_from_them(run, corpus, minilm, base, tmp_path, monkeypatch):
    def to_hf(*arguments):
        monkeypatch.setattr(sys, "argv", ["to-hf", *map(str, arguments)])
        convert.to_hf.main()

    to_hf(run, tmp_path / "adapter", "--adapter")
    to_hf(run, tmp_path / "merged")
    texts = ["a small house", "a garden with trees"]
    vectors = Embedder(run).encode(texts)
    for folder in ("adapter", "merged"):
        np.testing.assert_allclose(Embedder(tmp_path / folder).encode(texts), vectors, atol=1e-6)
    assert np.abs(Embedder(base).encode(texts) - vectors).max() > 1e-3
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < 50_000
    # The next stage may train all of it.
    config = config_of(corpus, minilm, tmp_path / "adapter", steps=0, **{"lora.rank": 0})
    train(config, tmp_path / "next", jax.devices()[:1])
    np.testing.assert_allclose(Embedder(tmp_path / "next").encode(texts), vectors, atol=1e-6)
    found = {finding.status for finding in trace(tmp_path / "next", recorded_paths=True)}
    assert found == {"verified"}
    # peft cannot open a run.
    config = config_of(corpus, minilm, tmp_path / "next", steps=0)
    train(config, tmp_path / "last", jax.devices()[:1])
    with pytest.raises(SystemExit):
        to_hf(tmp_path / "last", tmp_path / "other", "--adapter")
    to_hf(tmp_path / "last", tmp_path / "other", f"--adapter={base}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora.rank": -1}, r"config.lora.rank is -1"),
        ({"lora.alpha": 0.0}, r"config.lora.alpha is 0; it must be positive"),
        ({"init_from": ""}, r"config.lora.rank needs config.init_from"),
        ({"lora.target_modules": "query,values"}, r"config.lora.target_modules: 'values' is no linear layer .* value"),
    ],
)
def test_settings_that_cannot_work(changes, message, corpus, minilm, base, tmp_path):
    with pytest.raises(ConfigurationError, match=message):
        train(config_of(corpus, minilm, base, **changes), tmp_path / "run", jax.devices()[:1])
    with pytest.raises(ConfigurationError, match="must be 0 in the mlm stage"):
        load_config("mlm", corpus, minilm, **{"lora.rank": 2}).check(1)

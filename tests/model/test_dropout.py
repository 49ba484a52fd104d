"""Dropout of the encoder: its rate, its places, and the same masks wherever activations are recomputed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nomic_jax.data.batches.packing import Layout, fill_chunks, plan_chunks
from nomic_jax.data.batches.shapes import Shape
from nomic_jax.model import EmbeddingConfig, EncoderConfig, encode, init_encoder
from nomic_jax.model import encoder as encoder_module
from nomic_jax.model.layers.dropout import Dropout, drop
from nomic_jax.train.objectives.chunks import embed_chunks

ENCODER = EncoderConfig(vocab_size=64, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=32)
IDS = np.random.default_rng(0).integers(1, 64, (2, 12)).astype(np.int32)


def test_the_share_that_is_dropped_and_the_scale_of_the_rest():
    x = jnp.ones((400, 500))
    dropped = drop(x, Dropout(jax.random.key(0), 0.1))
    assert jnp.mean(dropped == 0) == pytest.approx(0.1, abs=0.003)
    np.testing.assert_allclose(dropped[dropped != 0], 1 / 0.9, rtol=1e-4)
    again, other = (drop(x, Dropout(jax.random.key(0), 0.1), place) for place in (0, 1))
    assert (again == dropped).all() and (other != dropped).any()
    assert drop(x, None) is x and drop(x, Dropout(jax.random.key(0), 0.0)) is x


def test_it_is_after_the_embeddings_and_on_both_sums_of_each_layer(monkeypatch):
    """What remains without the outputs of the MLP is the formula with an MLP whose last kernel is 0."""
    params = init_encoder(jax.random.key(0), ENCODER)
    places = []

    def record(x, dropout, place=0):
        places.append((x.shape, place, dropout))
        return x

    def encoded(params, dropout=None):
        return jax.jit(lambda params: encode(params, jnp.asarray(IDS), ENCODER, dropout=dropout))(params)

    monkeypatch.setattr(encoder_module, "drop", record)
    jax.eval_shape(lambda key: encode(params, jnp.asarray(IDS), ENCODER, dropout=Dropout(key, 0.5)), jax.random.key(3))
    assert [place for _, place, _ in places] == [0, 0, 1, 0, 1] and {shape for shape, *_ in places} == {(2, 12, 16)}
    assert len({id(dropout) for *_, dropout in places}) == 3  # one for the embeddings, one for each layer
    monkeypatch.setattr(encoder_module, "drop", lambda x, dropout, place=0: x * (place == 0))
    without_mlp = encoded(params)
    monkeypatch.undo()
    silent = jax.tree.map(lambda leaf: leaf, params)
    for layer in silent["layers"].values():
        layer["mlp"]["down"]["kernel"] = 0 * layer["mlp"]["down"]["kernel"]
    np.testing.assert_allclose(encoded(silent), without_mlp, atol=1e-5)


ROWS = pytest.mark.exhaustive(reason="the same code around chunks of padded rows")


@pytest.mark.parametrize("packed", [True, pytest.param(False, marks=ROWS)])
def test_recomputed_activations_are_dropped_as_before(packed):
    """The same gradient for any policy, and for chunks that are kept or computed again."""
    layout = Layout((Shape(2, 16),), segments=2 if packed else 1)
    rng = np.random.default_rng(0)
    lengths = rng.integers(4, 8, (4, 1)) if packed else rng.integers(4, 16, (4, 1))
    plan = plan_chunks(lengths[:, 0], np.zeros((4, 0), np.int64), layout, 1)
    ids = rng.integers(1, 64, int(lengths.sum())).astype(np.int32)
    chunks = fill_chunks(plan, layout, slice(0, 1), ids, plan.length.ravel(), 0)
    chunks["dropout"] = np.arange(len(chunks["shape"]), dtype=np.uint32)
    params = init_encoder(jax.random.key(0), ENCODER)
    direction = rng.normal(size=(4, 16)).astype(np.float32)

    def gradient(policy, kept, rate):
        model = EmbeddingConfig(dataclasses.replace(ENCODER, recompute=policy))

        def loss(params):
            return jnp.sum(embed_chunks(params, chunks, model, layout, kept_chunks=kept, dropout_rate=rate) * direction)

        return jax.jit(jax.grad(loss))(params)

    expected = gradient("none", 1.0 if packed else 0.0, 0.3)
    for policy, kept in (("layer", 0.0),) if packed else (("attention", 0.0),):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradient(policy, kept, 0.3), expected)
    plain = gradient("none", 0.0, 0.0)
    assert any(np.abs(a - b).max() > 1e-3 for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(expected)))

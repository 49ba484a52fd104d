"""A checkpoint saved by any number of devices, whole or divided, is restored by any other, to the bit."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from nomic_jax.model import EmbeddingConfig
from nomic_jax.train.checkpoint import Checkpoints
from nomic_jax.train.config import CheckpointConfig
from nomic_jax.train.loop import make_stream
from nomic_jax.train.optim import learning_rate, make_optimizer
from nomic_jax.train.record import make_record
from nomic_jax.train.sharding import make_mesh
from nomic_jax.train.stages import make_stage
from nomic_jax.train.state import TrainState, state_specs
from tests.train.test_stages import load_config

PLACES = [(1, "replicated"), (2, "fsdp"), (4, "zero1"), (8, "fsdp")]


@pytest.fixture(scope="module")
def run(corpus, minilm, tokenizer):
    """(record, a state of random numbers on the host, its moments too)"""
    config = load_config("mlm", corpus, minilm)
    model = EmbeddingConfig(config.model)
    optimizer = make_optimizer(config.optim, learning_rate(config.optim, 3))
    shapes = jax.eval_shape(make_stage(config, model).init, jax.random.key(0))
    state = TrainState(jax.ShapeDtypeStruct((), np.int32), shapes, jax.eval_shape(optimizer.init, shapes))
    rng = np.random.default_rng(0)
    host = jax.tree.map(lambda leaf: (1e3 * rng.standard_normal(leaf.shape)).astype(leaf.dtype), state)
    return make_record(config, model, make_stream(config, tokenizer), tokenizer, device_count=1), host


def put(state, device_count, sharding):
    mesh = make_mesh(jax.devices()[:device_count])
    specs = state_specs(state, mesh, sharding)
    return jax.tree.map(lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), state, specs)


@pytest.mark.parametrize("saved", PLACES, ids=str)
def test_any_place_restores_what_any_other_saved(saved, run, tmp_path):
    record, host = run
    keep_all = CheckpointConfig(every=1, keep=9)
    with Checkpoints(tmp_path, keep_all, record) as checkpoints:
        checkpoints.save(1, put(host, *saved))
    zeros = jax.tree.map(np.zeros_like, host)
    for place in PLACES:
        with Checkpoints(tmp_path, keep_all, record) as checkpoints:
            restored = checkpoints.restore(put(zeros, *place))
        wanted = put(zeros, *place)
        for leaf, mine, like in zip(*map(jax.tree.leaves, (restored, host, wanted)), strict=True):
            assert np.array_equal(np.asarray(leaf), mine) and leaf.sharding == like.sharding

"""The step that is compiled from shapes is the step of a run, and its memory plan counts what is there."""

import jax
import numpy as np
import pytest

from nomic_jax.model import EmbeddingConfig
from nomic_jax.train.objectives import make_stage, make_stream
from nomic_jax.train.optim import learning_rate, make_optimizer
from nomic_jax.train.planning.compiled import compile_step, memory_plan
from nomic_jax.train.sharding import make_mesh, put_rows
from nomic_jax.train.state import abstract_state, init_state, make_train_step
from tests.train.tiny_configs import load_config


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        ("mlm", {"accumulate": 2, "sharding": "zero1"}),
        pytest.param(
            "contrastive",
            {"data.layout": "packed", "kept_chunks": 1.0},
            marks=pytest.mark.exhaustive(reason="mlm is checked; the packed program compiles twice as long"),
        ),
    ],
)
def test_a_step_from_shapes_is_that_of_a_run(stage, changes, corpus, minilm, tokenizer):
    config = load_config(stage, corpus, minilm, **changes)
    model, mesh = EmbeddingConfig(config.model), make_mesh(jax.devices()[:4])
    stream = make_stream(config, tokenizer, mesh.size)
    rows = stream.batch(0, 0, 1).arrays
    compiled = compile_step(config, model, rows, stream.layout, mesh)

    built = make_stage(config, model, stream.layout)
    optimizer = make_optimizer(config.optim, learning_rate(config.optim, config.steps))
    step = make_train_step(built, optimizer, mesh, config.accumulate, config.sharding)
    states = [init_state(jax.random.key(0), built, optimizer, mesh, {}, config.sharding) for _ in range(2)]
    abstract = abstract_state(built, optimizer, mesh, config.sharding)
    assert jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), states[0]) == jax.tree.map(
        lambda x: (x.shape, x.dtype, x.sharding), abstract
    )

    def bytes_on_a_device(tree):
        return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))

    placed = put_rows(rows, mesh)
    state_bytes, row_bytes = bytes_on_a_device(states[0]), bytes_on_a_device(placed)
    plan = memory_plan(compiled)
    assert plan.arguments == pytest.approx(state_bytes + row_bytes, rel=0.01)
    assert plan.aliased == pytest.approx(state_bytes, rel=0.01)
    assert plan.peak >= plan.arguments + bytes_on_a_device(states[0].params)  # the gradient
    ours, theirs = compiled(states[0], placed, {}), step(states[1], placed, {})
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b)

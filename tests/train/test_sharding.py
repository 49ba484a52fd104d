"""Collectives, host transfers and the division of the state over devices in a training step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from nomic_jax.model import EmbeddingConfig, EncoderConfig, abstract_encoder
from nomic_jax.train.objectives import make_stage, make_stream
from nomic_jax.train.optim import learning_rate, make_optimizer
from nomic_jax.train.sharding import DATA, divided, make_mesh, put_rows
from nomic_jax.train.state import DETERMINISTIC, init_state, make_train_step
from nomic_jax.train.watch.hlo import collectives
from tests.train.tiny_configs import STAGES, load_config

ELSEWHERE = pytest.mark.exhaustive(reason="test_hlo.py checks that no stage has a collective in a loop")
OTHER_STAGES = pytest.mark.exhaustive(
    reason="three_steps of test_stages.py forbids transfers in every stage and layout"
)


def make(stage, corpus, minilm, tokenizer, sharding="replicated"):
    config = load_config(stage, corpus, minilm)
    mesh = make_mesh()
    stage = make_stage(config, EmbeddingConfig(config.model))
    optimizer = make_optimizer(config.optim, learning_rate(config.optim, config.steps))
    state = init_state(jax.random.key(0), stage, optimizer, mesh, {}, sharding)
    step = make_train_step(stage, optimizer, mesh, config.accumulate, sharding)
    return state, step, put_rows(make_stream(config, tokenizer).batch(0).arrays, mesh)


def collectives_of(step, state, rows, devices: int) -> dict[str, list[tuple[int, int | None]]]:
    """Maps each kind of collective to a list of (bytes, times per step)."""
    found: dict[str, list[tuple[int, int | None]]] = {"all-gather": [], "reduce-scatter": [], "all-reduce": []}
    for each in collectives(step.lower(state, rows).compile().as_text(), devices):
        found[each.kind].append((each.bytes, each.times))
    return found


def test_a_contrastive_step_gathers_and_reduces_once(corpus, minilm, tokenizer):
    state, step, rows = make("contrastive", corpus, minilm, tokenizer)
    found = collectives_of(step, state, rows, 8)
    embeddings, hashes = 16 * 32 * 4, 16 * 2 * 4
    # The hashes of queries, the hashes of documents, and the document embeddings, each of all devices.
    assert sorted(found["all-gather"]) == [(hashes, 1), (hashes, 1), (embeddings, 1)]
    assert found["reduce-scatter"] == [(embeddings, 1)]  # the documents' gradient
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    # The gradient and the sums of loss, weight and accuracy share one all-reduce.
    assert found["all-reduce"] == [((parameters + 3) * 4, 1)]


@pytest.mark.parametrize(
    ("stage", "accumulate"),
    [
        pytest.param("mlm", 1, marks=ELSEWHERE),
        ("mlm", 4),
        pytest.param("contrastive", 1, marks=ELSEWHERE),
        pytest.param("finetune", 1, marks=ELSEWHERE),
    ],
)
def test_gradients_are_reduced_once_outside_of_any_loop(stage, accumulate, corpus, minilm, tokenizer):
    config = load_config(stage, corpus, minilm)
    mesh = make_mesh(jax.devices()[:4])
    built = make_stage(config, EmbeddingConfig(config.model))
    optimizer = make_optimizer(config.optim, learning_rate(config.optim, config.steps))
    state = init_state(jax.random.key(0), built, optimizer, mesh, {})
    step = make_train_step(built, optimizer, mesh, accumulate)
    rows = put_rows(make_stream(config, tokenizer).batch(0).arrays, mesh)
    ((_, times),) = collectives_of(step, state, rows, 4)["all-reduce"]
    assert times == 1


@pytest.mark.parametrize(
    "stage",
    [pytest.param(stage, marks=() if stage == "contrastive" else OTHER_STAGES) for stage in STAGES],
)
def test_nothing_moves_between_host_and_devices_in_a_step(stage, corpus, minilm, tokenizer):
    state, step, rows = make(stage, corpus, minilm, tokenizer)
    state, _ = step(state, rows)
    with jax.transfer_guard("disallow"):
        state, metrics = step(state, rows)
    assert np.isfinite(float(metrics["loss"]))


@pytest.mark.parametrize(
    "sharding",
    ["fsdp", pytest.param("zero1", marks=pytest.mark.exhaustive(reason="fsdp divides the optimizer state too"))],
)
def test_a_divided_state_is_divided(sharding, corpus, minilm, tokenizer):
    state, step, rows = make("contrastive", corpus, minilm, tokenizer, sharding)

    def bytes_on_a_device(tree):
        return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))

    for _ in range(2):
        whole = sum(leaf.nbytes for leaf in jax.tree.leaves(state.params))
        assert bytes_on_a_device(state.opt_state) < 2 * whole / 8 * 1.05
        expected = whole / 8 * 1.05 if sharding == "fsdp" else whole
        assert bytes_on_a_device(state.params) <= expected
        state, _ = step(state, rows)


def test_a_step_that_is_not_finite_changes_nothing_but_its_number(corpus, minilm, tokenizer):
    state, step, rows = make("contrastive", corpus, minilm, tokenizer)
    state, _ = step(state, rows)
    before = jax.device_get(state)
    poisoned = jax.tree.map(lambda x: x, state.params)
    norm = poisoned["encoder"]["layers"][0]["norm2"]
    norm["scale"] = norm["scale"].at[0].set(np.nan)
    state, metrics = step(state._replace(params=poisoned), rows)
    assert metrics["skipped"] == 1 and int(state.step) == int(before.step) + 1
    assert jax.tree.all(jax.tree.map(np.array_equal, before.opt_state, jax.device_get(state.opt_state)))
    # The schedule did not advance: the logged learning rate is that of the second update.
    assert metrics["updates"] == 1 and step(state._replace(params=before.params), rows)[1]["updates"] == 1


@pytest.mark.parametrize(("devices", "share"), [(8, 0.999), (64, 0.999), (256, 0.999), (512, 0.62), (1024, 0.62)])
def test_most_of_the_model_can_be_divided_over_many_devices(devices, share):
    params = abstract_encoder(EncoderConfig())
    specs = divided(params, AbstractMesh((devices,), (DATA,)))
    pairs = list(zip(jax.tree.leaves(params), jax.tree.leaves(specs)))
    for leaf, spec in pairs:
        assert DATA not in spec or leaf.shape[spec.index(DATA)] % devices == 0
    total = sum(leaf.size for leaf, _ in pairs)
    assert sum(leaf.size for leaf, spec in pairs if DATA in spec) >= share * total


@pytest.mark.parametrize(
    "stage, changes",
    [
        ("mlm", {}),
        ("mlm", {"data.document_mask": True}),
        ("contrastive", {"data.layout": "padded"}),
        ("contrastive", {"data.layout": "bucketed", "loss.learn_temperature": True}),
        ("finetune", {"data.layout": "packed", "kept_chunks": 0.5, "loss.matryoshka_dims": (16, 32)}),
    ],
)
@pytest.mark.parametrize("model", ["nomic", "bert"])
def test_no_scatter_adds_floats_to_indices_that_may_repeat(stage, changes, model, corpus, minilm, tokenizer):
    """On a GPU such a scatter adds in any order, and slowly where indices repeat."""
    config = load_config(stage, corpus, minilm, **changes)
    mesh = make_mesh(jax.devices()[:1])
    stream = make_stream(config, tokenizer)
    bert = EncoderConfig.bert(
        hidden_size=32, num_layers=1, num_heads=2, intermediate_size=64, max_positions=2048, max_trained_positions=2048
    )
    embedder = EmbeddingConfig(config.model if model == "nomic" else bert, pooling="cls" if model == "bert" else "mean")
    built = make_stage(config, embedder, stream.layout)
    optimizer = make_optimizer(config.optim, learning_rate(config.optim, config.steps))
    state = jax.eval_shape(lambda key: init_state(key, built, optimizer, mesh, {}), jax.random.key(0))
    step = make_train_step(built, optimizer, mesh)
    program = step.lower(state, stream.batch(0).arrays).as_text("hlo")
    scatters = [line for line in program.splitlines() if " scatter(" in line and " = f32[" in line]
    assert all("unique_indices=true" in line for line in scatters)
    # The test can fail: this is the scatter of a gather that does not say that no index repeats.
    gather = jax.jit(jax.grad(lambda table: jnp.sum(table[jnp.array([1, 1])] ** 2))).lower(jnp.ones((4, 2)))
    assert any(" scatter(" in line and "unique_indices" not in line for line in gather.as_text("hlo").splitlines())


def test_xla_knows_the_options_for_the_same_bits():
    """An unknown option is an error on every backend; what they do shows on a GPU only (tests/gpu)."""
    assert jax.jit(lambda x: 2 * x, compiler_options=DETERMINISTIC)(1.0) == 2.0
    with pytest.raises(Exception, match="xla_gpu_no_such_option"):
        jax.jit(lambda x: 2 * x, compiler_options={"xla_gpu_no_such_option": True})(1.0)

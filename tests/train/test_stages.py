"""Three optimizer steps of each stage give the same results on 1 and 8 devices, with and without memory saving."""

import contextlib
import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest
import tokenizers
from jax.sharding import PartitionSpec as P

from nomic_jax.data.mixture import read_mixture
from nomic_jax.data.tokens.tokenizer import Tokenizer
from nomic_jax.hf import Checkpoint
from nomic_jax.model import EmbeddingConfig, init_encoder
from nomic_jax.run.pretrained import read_pretrained, write_pretrained
from nomic_jax.train.config import ConfigurationError
from nomic_jax.train.loop import train
from nomic_jax.train.objectives import make_stage, make_stream
from nomic_jax.train.optim import learning_rate, make_optimizer
from nomic_jax.train.sharding import DATA, make_mesh, put_rows, replicated
from nomic_jax.train.state import init_state, make_train_step
from tests.train.tiny_configs import load_config


def three_steps(config, tokenizer, device_count, sharding="replicated", guide=None):
    """Returns (metrics of each step, parameters). Steps 2 and 3 fail on any transfer between host and devices."""
    mesh = make_mesh(jax.devices()[:device_count])
    stream = make_stream(config, tokenizer, device_count)
    stage = make_stage(config, EmbeddingConfig(config.model), stream.layout, guide)
    optimizer = make_optimizer(config.optim, learning_rate(config.optim, config.steps))
    state = init_state(jax.random.key(0), stage, optimizer, mesh, {}, sharding)
    step = make_train_step(stage, optimizer, mesh, config.accumulate, sharding)
    frozen = jax.device_put(stage.frozen, replicated(mesh))
    history = []
    for i in range(3):
        rows = put_rows(stream.batch(i).arrays, mesh)
        with jax.transfer_guard("disallow") if i else contextlib.nullcontext():
            state, metrics = step(state, rows, frozen)
        history.append({name: float(value) for name, value in metrics.items()})
    return history, jax.device_get(state.params)


@functools.lru_cache
def three_steps_on_one_device(config, tokenizer):
    return three_steps(config, tokenizer, 1)


def assert_same(a, b, tolerance=1e-5):
    for left, right in zip(a[0], b[0]):
        assert left["loss"] == pytest.approx(right["loss"], rel=tolerance)
        assert left["grad_norm"] == pytest.approx(right["grad_norm"], rel=tolerance)
        assert left["accuracy"] == pytest.approx(right["accuracy"], abs=1e-6)
    difference = jax.tree.map(np.subtract, a[1], b[1])
    assert optax.tree.norm(difference) <= tolerance * optax.tree.norm(b[1])
    # Single leaves differ a little more: a bias is only the sum of three Adam steps, which divide by tiny gradients.
    for path, leaf in jax.tree.leaves_with_path(jax.tree.map(relative, a[1], b[1])):
        assert leaf <= 10 * tolerance, jax.tree_util.keystr(path)


def relative(left, right):
    return np.linalg.norm(left - right) / max(np.linalg.norm(right), 1e-12)


PAIRWISE = pytest.mark.exhaustive(reason="other pairs of the default suite cover each stage and each sharding")


@pytest.mark.slow(reason="compiles two training steps")
@pytest.mark.parametrize("stage", ["mlm", "contrastive", pytest.param("finetune", marks=PAIRWISE)])
def test_one_device_and_eight_agree(stage, corpus, minilm, tokenizer):
    config = load_config(stage, corpus, minilm)
    one = three_steps_on_one_device(config, tokenizer)
    assert one[0][2]["loss"] != one[0][0]["loss"]
    assert_same(three_steps(config, tokenizer, 8), one)


@pytest.mark.parametrize(
    "stage, sharding",
    [
        ("mlm", "zero1"),
        pytest.param("contrastive", "zero1", marks=PAIRWISE),
        # test_loss_options_agree_between_one_device_and_eight runs this pair with all options of the loss.
        pytest.param("finetune", "fsdp", marks=PAIRWISE),
    ],
)
def test_divided_states_take_the_same_steps(stage, sharding, corpus, minilm, tokenizer):
    config = load_config(stage, corpus, minilm)
    assert_same(three_steps(config, tokenizer, 8, sharding), three_steps_on_one_device(config, tokenizer))


def test_micro_batches_give_the_gradient_of_the_whole_batch(corpus, minilm, tokenizer):
    whole = three_steps_on_one_device(load_config("mlm", corpus, minilm), tokenizer)
    assert_same(three_steps(load_config("mlm", corpus, minilm, accumulate=4), tokenizer, 2), whole)


@pytest.mark.slow(reason="compiles two training steps, one of them for every chunk length")
@pytest.mark.parametrize(
    "stage, layout, kept_chunks",
    [
        ("contrastive", "bucketed", 0.0),
        pytest.param("finetune", "bucketed", 0.0, marks=PAIRWISE),
        ("finetune", "packed", 0.5),
    ],
)
def test_layouts_give_the_same_step(stage, layout, kept_chunks, corpus, minilm, tokenizer, monkeypatch):
    # Every chunk length is compiled; a large step makes them few.
    monkeypatch.setattr("nomic_jax.data.batches.packing.LENGTH_STEP", 24)
    plain = load_config(stage, corpus, minilm)
    data = dataclasses.replace(plain.data, layout=layout, chunk_tokens=128)
    chunked = dataclasses.replace(plain, data=data, kept_chunks=kept_chunks)
    assert_same(three_steps(chunked, tokenizer, 2), three_steps_on_one_device(plain, tokenizer))


def test_mlm_head_in_parts_gives_the_same_step(corpus, minilm, tokenizer, monkeypatch):
    config = load_config("mlm", corpus, minilm)
    whole = three_steps_on_one_device(config, tokenizer)
    monkeypatch.setattr("nomic_jax.train.losses.vocabulary.PREDICTIONS_AT_A_TIME", 60)
    assert_same(three_steps(config, tokenizer, 2), whole)


def test_document_mask_keeps_documents_apart(corpus, minilm, tokenizer):
    """With the mask, the tokens of one document in a row do not change the loss of another document."""
    config = load_config("mlm", corpus, minilm, **{"data.document_mask": True})
    stage = make_stage(config, EmbeddingConfig(config.model))
    # The initial weights are too small for attention to weight tokens differently.
    params = jax.tree.map(lambda x: 8 * x, jax.jit(stage.init)(jax.random.key(0)))
    rows = make_stream(config, tokenizer).batch(0).arrays
    last = rows["segment"].max(axis=1, keepdims=True)
    assert (last > 1).any(), "every row holds a single document; the test needs shorter documents"
    row = int(np.argmax(last[:, 0] > 1))
    rows = {name: array[row : row + 1] for name, array in rows.items()}
    in_last = np.take_along_axis(rows["segment"], rows["position"], 1) == rows["segment"].max()
    only_first = rows | {"target": np.where(in_last, -1, rows["target"])}
    changed = only_first | {"ids": np.where(rows["segment"] == rows["segment"].max(), 1996, rows["ids"])}
    loss = jax.jit(lambda rows: stage.loss(params, rows).loss)
    assert float(loss(only_first)) == pytest.approx(float(loss(changed)), rel=1e-6)
    del changed["segment"], only_first["segment"]
    assert float(loss(only_first)) != pytest.approx(float(loss(changed)), rel=1e-3)


def test_mixture_of_the_test_corpus(corpus):
    a, b = read_mixture(str(corpus / "pairs.yaml"), "pair")
    assert (a.query_prefix, a.document_prefix) == ("search_query", "search_document")
    assert (b.columns, b.query_prefix, b.document_prefix) == (("title", "body"), "clustering", "clustering")


OPTIONS = dict(
    learn_temperature=True, bidirectional=True, matryoshka_dims=(8, 32), matryoshka_weights=(1.0, 0.5), column_tile=10
)


@pytest.mark.slow(reason="compiles two training steps with every option of the loss")
def test_loss_options_agree_between_one_device_and_eight(corpus, minilm, tokenizer):
    plain = load_config("finetune", corpus, minilm)
    config = dataclasses.replace(plain, loss=dataclasses.replace(plain.loss, **OPTIONS))
    one = three_steps(config, tokenizer, 1)
    assert one[1]["temperature"]["log_scale"] != np.log(1 / config.loss.temperature).astype(np.float32)
    assert_same(three_steps(config, tokenizer, 8, "fsdp"), one)


@pytest.mark.slow(reason="compiles two training steps with two encoders")
def test_a_guide_leaves_out_what_it_finds_as_similar_as_the_positive(corpus, minilm, tokenizer):
    """A guide changes the loss; with a margin of 2 it masks nothing."""
    plain = load_config("contrastive", corpus, minilm)
    model = EmbeddingConfig(plain.model)
    guide = Checkpoint(model, {"encoder": init_encoder(jax.random.key(7), model.encoder)}, tokenizer)

    def losses(guide, margin):
        """Returns the losses of three batches on one device, without optimizer steps between them."""
        config = dataclasses.replace(plain, loss=dataclasses.replace(plain.loss, guide_margin=margin))
        stage = make_stage(config, model, None, guide)

        @jax.jit
        @functools.partial(jax.shard_map, mesh=make_mesh(jax.devices()[:1]), in_specs=(P(), P(DATA)), out_specs=P())
        def loss(params, rows):
            return jax.lax.psum(stage.loss(params, rows).loss, DATA)

        params = jax.jit(stage.init)(jax.random.key(0)) | stage.frozen
        stream = make_stream(config, tokenizer)
        return [float(loss(params, stream.batch(i).arrays)) for i in range(3)]

    def losses_of_steps(device_count, layout):
        config = dataclasses.replace(plain, data=dataclasses.replace(plain.data, layout=layout, chunk_tokens=128))
        return [line["loss"] for line in three_steps(config, tokenizer, device_count, guide=guide)[0]]

    assert losses(guide, 2.0) == pytest.approx(losses(None, 0.0), rel=1e-6)
    some = losses_of_steps(1, "padded")
    assert some == pytest.approx(losses_of_steps(4, "packed"), rel=1e-5)
    without = [line["loss"] for line in three_steps_on_one_device(plain, tokenizer)[0]]
    assert all(0 < a < 0.99 * b for a, b in zip(some, without))


def test_a_guide_of_another_vocabulary(corpus, minilm, tmp_path):
    config = load_config("contrastive", corpus, minilm)
    # Swap the ids of two words.
    text = Tokenizer.from_directory(minilm).backend.to_str()
    swapped = text.replace('"house":', '"[house]":').replace('"garden":', '"house":').replace('"[house]":', '"garden":')
    other = dataclasses.replace(read_pretrained(minilm), tokenizer=Tokenizer(tokenizers.Tokenizer.from_str(swapped)))
    write_pretrained(tmp_path / "guide", other)
    loss = dataclasses.replace(config.loss, guide=str(tmp_path / "guide"))
    with pytest.raises(ConfigurationError, match="has another vocabulary"):
        train(dataclasses.replace(config, loss=loss), tmp_path / "run", jax.devices()[:1])


def test_a_learnt_temperature_goes_on_in_the_next_stage(corpus, minilm, tmp_path):
    # The same program as in test_loss_options_agree_between_one_device_and_eight.
    config = load_config("finetune", corpus, minilm)
    config = dataclasses.replace(config, loss=dataclasses.replace(config.loss, **OPTIONS))
    train(config, tmp_path / "one", jax.devices()[:1])
    learnt = read_pretrained(tmp_path / "one").params["temperature"]["log_scale"]
    assert learnt != np.float32(-np.log(config.loss.temperature))
    train(dataclasses.replace(config, init_from=str(tmp_path / "one"), steps=0), tmp_path / "two", jax.devices()[:1])
    assert read_pretrained(tmp_path / "two").params["temperature"]["log_scale"] == learnt


def test_a_source_may_keep_its_rows_apart(corpus, minilm, tokenizer, tmp_path):
    """Without in-batch negatives, the loss of a batch is the sum of the losses of its rows alone."""
    plain = load_config("finetune", corpus, minilm)
    mesh = make_mesh(jax.devices()[:1])
    for apart in (False, True):
        mixture = tmp_path / f"{apart}.yaml"
        options = "in_batch_negatives: false" if apart else ""
        source = f"{{name: a, bucket: {corpus / 'triplets.jsonl'}, objective: {{type: triplet}}, {options}}}"
        mixture.write_text(f"datasets: [{source}]\n")
        config = dataclasses.replace(plain, data=dataclasses.replace(plain.data, mixture=str(mixture), layout="padded"))
        rows = make_stream(config, tokenizer).batch(0).arrays
        stage = make_stage(config, EmbeddingConfig(config.model))
        params = stage.init(jax.random.key(0))

        @jax.jit
        @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P(), P(DATA)), out_specs=P())
        def loss(params, rows, stage=stage):
            return jax.lax.psum(stage.loss(params, rows).loss, DATA)

        whole = float(loss(params, rows))
        alone = sum(float(loss(params, {name: x[i : i + 1] for name, x in rows.items()})) for i in range(16))
        assert (whole == pytest.approx(alone, rel=1e-5)) is apart and whole > 1

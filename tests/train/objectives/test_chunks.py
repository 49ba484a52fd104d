"""Embeddings and gradients computed in chunks equal those of one text at a time, on 1 and on 8 devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from nomic_jax.data.batches.packing import Layout, fill_chunks, plan_chunks
from nomic_jax.data.batches.shapes import Shape, pad_right
from nomic_jax.model import EmbeddingConfig, EncoderConfig, embed, init_encoder
from nomic_jax.train.objectives.chunks import embed_chunks
from nomic_jax.train.sharding import DATA, make_mesh, put_rows

# init_std is large enough for attention to weight tokens differently.
ENCODER = EncoderConfig(
    vocab_size=128, hidden_size=64, num_layers=2, num_heads=2, intermediate_size=128, max_positions=64, init_std=0.2
)
ROWS, DOCUMENTS, LONGEST = 64, 2, 64
LAYOUTS = {
    # The budget of 4 x 48 = 192 tokens is not a multiple of 8 x 16 = 2 x 64 = 128.
    "bucketed": Layout((Shape(4, 48), Shape(8, 16), Shape(2, 64))),
    "packed": Layout((Shape(4, 64), Shape(1, 64)), segments=6),
    "one chunk": Layout((Shape(64, 64),), segments=6),
}


def model(pooling):
    return EmbeddingConfig(ENCODER, pooling=pooling, layer_norm=True, dim=48)


@pytest.fixture(scope="module")
def params():
    params = init_encoder(jax.random.key(0), ENCODER)
    # Add noise: initial ones and zeros would hide a missing gradient.
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return tree.unflatten([leaf + 0.1 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys)])


@pytest.fixture(scope="module")
def texts():
    """[ROWS][1 + DOCUMENTS] token ids: the query, then the documents. Each length compiles once, so there are few."""
    rng = np.random.default_rng(0)
    lengths = np.concatenate(
        [
            rng.choice([1, 7], (ROWS, 1)),
            rng.choice([1, 7, 41, LONGEST], (ROWS, DOCUMENTS), p=[0.1, 0.6, 0.25, 0.05]),
        ],
        axis=1,
    )
    lengths[5, 1] = LONGEST
    return [[rng.integers(1, ENCODER.vocab_size, length) for length in row] for row in lengths]


@pytest.fixture(scope="module")
def weights():
    return np.random.default_rng(1).standard_normal((ROWS, 1 + DOCUMENTS, 48)).astype(np.float32)


@pytest.fixture(scope="module")
def plain(params, texts, weights):
    """Maps pooling to (embeddings of single texts, gradient of their weighted sum from one padded batch)."""

    @functools.cache
    def compute(pooling):
        one = jax.jit(lambda ids: embed(params, {"ids": ids, "length": jnp.array([ids.shape[1]])}, model(pooling))[0])
        alone = np.array([[one(ids[None]) for ids in row] for row in texts])
        flat = [ids for row in texts for ids in row]
        batch = {"ids": pad_right(flat, LONGEST, 0), "length": np.array([len(ids) for ids in flat], np.int32)}

        def loss(params):
            return jnp.sum(embed(params, batch, model(pooling)).reshape(weights.shape) * weights)

        return alone, jax.jit(jax.grad(loss))(params)

    return compute


def in_plan_order(plan, rows_of):
    """Returns the entries of [ROWS, 1 + DOCUMENTS] by device: the queries, then the documents row by row."""
    return [
        entry
        for rows in plan.rows
        for entry in [rows_of[r][0] for r in rows] + [document for r in rows for document in rows_of[r][1:]]
    ]


def chunked(params, texts, weights, pooling, layout, device_count, kept_chunks):
    """Returns (plan, embeddings in plan order, gradient). The parameters are replicated over the devices."""
    lengths = np.array([[len(ids) for ids in row] for row in texts])
    plan = plan_chunks(lengths[:, 0], lengths[:, 1:], layout, device_count)
    ids = in_plan_order(plan, texts)
    lengths = np.array([len(text) for text in ids])
    arrays = fill_chunks(plan, layout, slice(0, device_count), np.concatenate(ids), lengths, pad_id=0)
    rows = {"chunks": arrays, "weights": {"weights": np.array(in_plan_order(plan, weights))}}
    mesh = make_mesh(jax.devices()[:device_count])

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P(), P(DATA)), out_specs=(P(DATA), P()))
    def run(params, rows):
        def loss(params):
            embedding_NE = embed_chunks(params, rows["chunks"], model(pooling), layout, kept_chunks=kept_chunks)
            return jnp.sum(embedding_NE * rows["weights"]["weights"]), embedding_NE

        gradient, embedding_NE = jax.grad(loss, has_aux=True)(params)
        return embedding_NE, gradient

    return plan, *run(params, {name: put_rows(part, mesh) for name, part in rows.items()})


PAIRWISE = pytest.mark.exhaustive(reason="other cases of the default suite cover each layout and each pooling")


@pytest.mark.slow(reason="compiles the gradient for every chunk length, and the forward pass for every text length")
@pytest.mark.parametrize(
    "kind, pooling, device_count, kept_chunks",
    [
        ("bucketed", "mean", 8, 0),
        ("packed", "cls", 8, 0.5),
        ("one chunk", "mean", 1, 1.0),
        pytest.param("bucketed", "cls", 1, 0, marks=PAIRWISE),
        pytest.param("packed", "mean", 8, 0.5, marks=PAIRWISE),
        pytest.param("packed", "cls", 8, 0, marks=PAIRWISE),
        pytest.param("packed", "mean", 1, 1.0, marks=PAIRWISE),
    ],
)
def test_chunks_give_what_single_texts_give(kind, pooling, device_count, kept_chunks, params, texts, weights, plain):
    layout = LAYOUTS[kind]
    plan, embedding_NE, gradient = chunked(params, texts, weights, pooling, layout, device_count, kept_chunks)
    if (
        device_count > 1 or kind == "bucketed"
    ):  # on one device, these texts fill packed chunks of the largest shape only
        assert set(plan.shape.ravel()) >= set(range(len(layout.shapes))), "the plan does not use every shape"
    if device_count > 1 and kind == "bucketed":
        assert (plan.shape == len(layout.shapes)).any(), "no chunk is empty"
        assert (plan.shape != plan.shape[0]).any(), "all devices take the same branches"
    assert (plan.shape.size == device_count) is (kind == "one chunk")
    alone, expected = plain(pooling)
    np.testing.assert_allclose(embedding_NE, np.array(in_plan_order(plan, alone)), atol=1e-5)
    for path, leaf in jax.tree.leaves_with_path(jax.tree.map(relative, gradient, expected)):
        assert leaf <= 1e-5, jax.tree_util.keystr(path)


def relative(left, right):
    return np.linalg.norm(left - right) / np.linalg.norm(right)


@pytest.mark.slow(reason="compiles the gradient for every chunk shape")
def test_memory_is_that_of_one_shape(params):
    """The branches for the shapes share one allocation for activations."""
    shapes = (Shape(32, 64), Shape(64, 32), Shape(128, 16), Shape(42, 48))

    def temporary_bytes(layout):
        size = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
        # Both layouts get buffers of the same size.
        chunks = {"ids": size((4, 2048)), "shape": size((4,)), "place": size((8,)), "length": size((4, 128))}
        loss = jax.jit(jax.grad(lambda params, chunks: embed_chunks(params, chunks, model("mean"), layout).sum()))
        return loss.lower(params, chunks).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(Layout(shapes)) < 1.3 * temporary_bytes(Layout(shapes[:1]))


@pytest.mark.parametrize("count, kept_chunks, has_loop", [(1, 1, False), (1, 0, True), (2, 1, True)])
def test_a_single_kept_chunk_is_computed_without_a_loop(params, count, kept_chunks, has_loop):
    layout = LAYOUTS["one chunk"]
    size = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    tokens = size((count, 64 * 64))
    chunks = {"ids": tokens, "segment": tokens, "shape": size((count,)), "place": size((8,))}
    gradient = jax.grad(lambda *args: embed_chunks(*args, model("mean"), layout, kept_chunks=kept_chunks).sum())
    assert ("while[" in str(jax.make_jaxpr(gradient)(params, chunks))) == has_loop


def test_chunks_of_several_lengths_cannot_be_kept(params):
    with pytest.raises(ValueError, match="kept_chunks is for packed layouts"):
        jax.eval_shape(
            lambda: embed_chunks(
                params,
                {"ids": jnp.zeros((2, 192), jnp.int32), "shape": jnp.zeros(2, jnp.int32)},
                model("mean"),
                LAYOUTS["bucketed"],
                kept_chunks=1,
            )
        )

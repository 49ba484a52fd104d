"""The gradient of every parameter in bfloat16 is that of float32 up to the rounding of single numbers.

A sum over the occurrences of a token is right only in float32, and only texts with frequent tokens show that: the ids
follow Zipf's law, with 30 % [MASK], and with [CLS] and [SEP] around every text. The embeddings get a given cotangent:
that of the contrastive loss depends on similarities divided by a temperature of .02, which magnifies the rounding of
the forward pass about twentyfold (``test_temperature_magnifies_the_rounding_of_the_forward_pass``).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from nomic_jax.data.batches.packing import Layout, fill_chunks, plan_chunks
from nomic_jax.data.batches.shapes import Shape, pad_right
from nomic_jax.model import EmbeddingConfig, EncoderConfig, embed, init_encoder
from nomic_jax.train.config import LabelledData
from nomic_jax.train.losses.contrastive import contrastive_loss
from nomic_jax.train.objectives import make_stage
from nomic_jax.train.objectives.chunks import embed_chunks
from nomic_jax.train.sharding import DATA, make_mesh
from tests.train.tiny_configs import load_config

SIZES = dict(vocab_size=512, hidden_size=64, num_layers=2, num_heads=2, intermediate_size=128)
MODELS = {
    "nomic": EncoderConfig(**SIZES, max_positions=128, max_trained_positions=128),
    "bert": EncoderConfig.bert(**SIZES, max_positions=128, max_trained_positions=128),
}
CLS, SEP, MASK, FIRST_WORD = 1, 2, 3, 4
LONGEST, ROW = 96, 128
# Documents of a row: one positive, and with hard negatives three.
DOCUMENTS = {"contrastive": 1, "finetune": 3}
LABELLED = LabelledData("rows.jsonl", "tokenizer", ("text",), 3, LONGEST)
LAYOUTS = {
    "padded": None,
    "bucketed": Layout((Shape(16, 64), Shape(32, 32), Shape(8, LONGEST))),
    "packed": Layout((Shape(8, 128), Shape(2, 128)), segments=8),
}


def lengths_of(texts):
    return np.array([len(ids) for ids in texts], np.int32)


def texts(count, rng):
    """Ids of texts of many lengths."""
    made = []
    for length in rng.integers(8, LONGEST + 1, count):
        words = FIRST_WORD + np.minimum(rng.zipf(1.2, length - 2), SIZES["vocab_size"] - FIRST_WORD) - 1
        made.append(
            np.concatenate([[CLS], np.where(rng.random(length - 2) < 0.3, MASK, words), [SEP]]).astype(np.int32)
        )
    return made


def assert_same_gradient(loss_of, encoder, params):
    """Compares ``jax.grad(loss_of(encoder))`` in bfloat16 and in float32, leaf by leaf (relative L2)."""
    ours, exact = (
        jax.jit(jax.grad(loss_of(dataclasses.replace(encoder, dtype=dtype))))(params)
        for dtype in ("bfloat16", "float32")
    )
    for (path, leaf), expected in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(exact), strict=True):
        assert np.linalg.norm(expected) > 0, jax.tree_util.keystr(path)
        assert leaf.dtype == jnp.float32
        relative = np.linalg.norm(leaf - expected) / np.linalg.norm(expected)
        assert relative <= 0.02, (jax.tree_util.keystr(path), relative)


def every_case():
    """Pairwise, by default: each stage with each layout, each recompute policy and each model."""
    default = {
        ("mlm", "rows", "elementwise", "nomic"),
        ("mlm", "documents", "none", "bert"),
        ("contrastive", "padded", "layer", "nomic"),
        ("contrastive", "bucketed", "none", "bert"),
        ("contrastive", "packed", "attention", "nomic"),
        ("finetune", "packed", "elementwise", "bert"),
        ("classify", "padded", "attention", "bert"),
    }
    others = pytest.mark.exhaustive(reason="the default cases cover each stage, layout, policy and model")
    layouts = {"mlm": ("rows", "documents"), "classify": ("padded",)}
    for stage in ("mlm", "contrastive", "finetune", "classify"):
        for layout in layouts.get(stage, LAYOUTS):
            for recompute in ("none", "elementwise", "attention", "layer"):
                for model in MODELS:
                    case = (stage, layout, recompute, model)
                    yield pytest.param(*case, marks=() if case in default else others)


@pytest.mark.slow(reason="compiles two gradients")
@pytest.mark.parametrize("stage, layout, recompute, model", list(every_case()))
def test_gradient_of_every_leaf(stage, layout, recompute, model, corpus, minilm):
    encoder = dataclasses.replace(MODELS[model], recompute=recompute)
    config = load_config("mlm" if stage == "classify" else stage, corpus, minilm)
    rng = np.random.default_rng(0)
    if stage == "mlm":
        rows = masked_rows(rng, with_documents=layout == "documents")
        chunks = Layout((Shape(1, ROW),), 32) if layout == "documents" else None
    elif stage == "classify":
        own = texts(100, rng)
        # The vectors of random weights are much alike. With labels of equal frequency their gradients would cancel.
        label = rng.choice(3, len(own), p=[0.7, 0.2, 0.1])
        length = lengths_of(own)
        rows = {"ids": pad_right(own, LONGEST, 0), "length": length, "first_length": length // 2, "label": label}
        config, chunks = dataclasses.replace(config, stage="classify", data=LABELLED), None
    else:
        return check_embeddings(encoder, LAYOUTS[layout], DOCUMENTS[stage], rng)

    def loss_of(encoder):
        stage_of = make_stage(config, EmbeddingConfig(encoder), chunks)
        return lambda params: stage_of.loss(params, rows).loss

    params = make_stage(config, EmbeddingConfig(encoder), chunks).init(jax.random.key(0))
    assert_same_gradient(loss_of, encoder, params)


def masked_rows(rng, with_documents):
    """A masked-LM batch. The targets are as frequent as the other tokens."""
    ids = np.concatenate(texts(100, rng))
    ids = ids[: len(ids) // ROW * ROW].reshape(-1, ROW)
    position = np.argsort(ids != MASK, axis=1, kind="stable")[:, :38].astype(np.int32)
    rows = {"ids": ids, "position": position, "target": rng.permuted(ids, axis=1)[:, :38]}
    if with_documents:
        rows["segment"] = np.cumsum(ids == CLS, axis=1, dtype=np.int32) + (ids[:, :1] != CLS)
    return rows


def check_embeddings(encoder, layout, documents, rng):
    """Compares the gradients for a given cotangent of the embeddings of 32 rows: queries and their documents."""
    rows = 32
    own = [texts(1 + documents, rng) for _ in range(rows)]
    cotangent = rng.normal(size=(rows * (1 + documents), encoder.hidden_size)).astype(np.float32)
    if layout is None:
        flat = [text for row in own for text in row]
        batch = {"ids": pad_right(flat, LONGEST, 0), "length": lengths_of(flat)}
    else:
        lengths = np.array([lengths_of(row) for row in own])
        plan = plan_chunks(lengths[:, 0], lengths[:, 1:], layout, 1)
        order = plan.rows[0]
        flat = [own[row][0] for row in order] + [text for row in order for text in own[row][1:]]
        batch = fill_chunks(plan, layout, slice(0, 1), np.concatenate(flat), lengths_of(flat), pad_id=0)

    def loss_of(encoder):
        model = EmbeddingConfig(encoder)

        @functools.partial(jax.shard_map, mesh=make_mesh(jax.devices()[:1]), in_specs=(P(), P(DATA)), out_specs=P())
        def loss(params, batch):
            if layout is None:
                vectors = embed(params, batch, model)
            else:
                vectors = embed_chunks(params, batch, model, layout, kept_chunks=0.5 if layout.packed else 0.0)
            return jax.lax.psum(jnp.sum(vectors * cotangent), DATA)

        return lambda params: loss(params, batch)

    assert_same_gradient(loss_of, encoder, init_encoder(jax.random.key(0), encoder))


def test_temperature_magnifies_the_rounding_of_the_forward_pass():
    """With embeddings rounded to bfloat16, off by .17 %, the gradient of the queries is off by 3 %."""
    rng = np.random.default_rng(0)
    query, document = rng.normal(size=(64, 64)), rng.normal(size=(64, 1, 64))
    document += query[:, None]  # cosine similarities of about .7, as in a trained model
    query, document = (jnp.float32(x / np.linalg.norm(x, axis=-1, keepdims=True)) for x in (query, document))
    hashes = rng.integers(0, 2**32, (64, 2), dtype=np.uint32)

    def relative_error(temperature):
        @jax.jit
        @functools.partial(
            jax.shard_map, mesh=make_mesh(jax.devices()[:1]), in_specs=P(), out_specs=P(), check_vma=False
        )
        def gradient(query, document):
            def loss(query):
                loss, _ = contrastive_loss(
                    query, document, hashes, hashes[:, None], temperature=temperature, axis_name=DATA
                )
                return loss

            return jax.grad(loss)(query)

        rounded = (x.astype(jnp.bfloat16).astype(jnp.float32) for x in (query, document))
        ours, exact = gradient(*rounded), gradient(query, document)
        return float(np.linalg.norm(ours - exact) / np.linalg.norm(exact))

    assert relative_error(1.0) < 0.002
    assert 0.02 < relative_error(0.02) < 0.05

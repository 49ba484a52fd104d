"""Checks the collectives of the compiled contrastive loss, and that it never holds all logits if it uses tiles."""

import functools
import re
from collections import Counter

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from nomic_jax.train.losses.contrastive import contrastive_loss
from nomic_jax.train.sharding import DATA, make_mesh
from tests.train.losses.test_loss import TEMPERATURE, B, E


def compiled_gradient(devices, rows, negatives, **options):
    """Compiles the gradient of the local sum, without the reductions that the training step adds."""
    mesh = make_mesh(jax.devices()[:devices])

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P(DATA), out_specs=P(DATA))
    def gradient(q, d, qh, dh):
        def loss(q, d):
            return contrastive_loss(q, d, qh, dh, temperature=TEMPERATURE, axis_name=DATA, **options)[0]

        return jax.grad(loss, (0, 1))(q, d)

    shapes = (rows, E), (rows, 1 + negatives, E), (rows, 2), (rows, 1 + negatives, 2)
    dtypes = jnp.float32, jnp.float32, jnp.uint32, jnp.uint32
    arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in zip(shapes, dtypes)]
    return jax.jit(gradient).lower(*arguments).compile()


def collectives(compiled):
    """Counts each (operation, shape of one result), including those inside a combined operation."""
    found = Counter()
    names = "all-gather|reduce-scatter|all-reduce|all-to-all|collective-permute|collective-broadcast"
    for line in compiled.as_text().splitlines():
        if match := re.search(rf"= (.*?) ({names})(?:-start)?\(", line):
            for shape in re.findall(r"\w+\[[\d,]*\]", match[1]):
                found[match[2], shape] += 1
    return found


def test_one_gather_and_one_scatter_of_the_embeddings():
    hashes = {("all-gather", "u32[64,2]"): 1, ("all-gather", "u32[16,2]"): 1}
    documents = {("all-gather", f"f32[64,{E}]"): 1, ("reduce-scatter", f"f32[8,{E}]"): 1}
    queries = {("all-gather", f"f32[16,{E}]"): 1, ("reduce-scatter", f"f32[2,{E}]"): 1}
    assert collectives(compiled_gradient(8, B, 3)) == hashes | documents
    everything = {"bidirectional": True, "matryoshka_dims": (4, 8, E), "column_tile": 10}
    assert collectives(compiled_gradient(8, B, 3, **everything)) == hashes | documents | queries


def test_tiles_never_hold_all_logits():
    rows, tile = 2048, 128
    whole, tiled = (compiled_gradient(1, rows, 0, bidirectional=True, column_tile=size) for size in (0, tile))
    all_logits = f"[{rows},{rows}]"
    assert all_logits in whole.as_text()
    assert all_logits not in tiled.as_text() and f"[{rows // tile},{rows},{tile}]" not in tiled.as_text()
    whole_bytes, tiled_bytes = (x.memory_analysis().temp_size_in_bytes for x in (whole, tiled))
    assert whole_bytes > 4 * rows * rows
    assert tiled_bytes < whole_bytes / 4

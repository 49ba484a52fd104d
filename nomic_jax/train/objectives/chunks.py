"""Embeds the texts of a batch chunk by chunk; chunks may have different shapes (``nomic_jax.data.batches.packing``)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from nomic_jax.data.batches.packing import Layout
from nomic_jax.data.batches.shapes import Shape
from nomic_jax.model import EmbeddingConfig, embed, encode
from nomic_jax.model.heads import pool_segments


def embed_chunks(
    params: dict, chunks: dict[str, jax.Array], model: EmbeddingConfig, layout: Layout, *, kept_chunks: float = 0.0
) -> jax.Array:
    """Returns embeddings [N, E] of a device's texts, in the order of the plan; may run inside ``jax.shard_map``.

    Every chunk takes the branch of its shape. Devices may take different branches of the same program, and the program
    does not depend on the lengths of the texts. Empty chunks compute nothing.

    Args:
      params: encoder parameters.
      chunks: one device's arrays of ``fill_chunks``.
      model: the encoder and its pooling.
      layout: the shapes of the chunks.
      kept_chunks: share of the chunks whose activations are kept for the backward pass; the others are recomputed in
      it.
        Kept chunks are computed in the largest shape. Above 0 only for layouts whose rows all have one length.
    """
    # A zero that varies over devices like the chunks do. Added within a branch, it would put a reduction into the
    # branch's backward pass, which would wait for devices that took another branch.
    zero = jnp.sum(chunks["ids"][:0]).astype(jnp.float32)
    params = jax.tree.map(lambda x: x + zero.astype(x.dtype), params)
    empty_SE = jnp.zeros((layout.slots, model.output_dim), jnp.float32) + zero

    def branch(shape: Shape, recompute: bool) -> Callable[[dict[str, jax.Array]], jax.Array]:
        def compute(chunk: dict[str, jax.Array]) -> jax.Array:
            embedding_SE = _embed_chunk(params, chunk, shape, model, layout)
            return jnp.pad(embedding_SE, ((0, layout.slots - len(embedding_SE)), (0, 0)))

        # Around each branch: around the switch, the activations of all branches would be allocated together.
        # prevent_cse=False: the two passes are in different loops, so the compiler cannot merge them.
        return jax.checkpoint(compute, prevent_cse=False) if recompute else compute

    def empty(chunk: dict[str, jax.Array]) -> jax.Array:
        return empty_SE

    recomputing = [branch(shape, True) for shape in layout.shapes] + [empty]

    def recomputed_chunk(chunk: dict[str, jax.Array]) -> jax.Array:
        return jax.lax.switch(chunk["shape"], recomputing, chunk)

    def kept_chunk(chunk: dict[str, jax.Array]) -> jax.Array:
        return jax.lax.cond(chunk["shape"] < len(layout.shapes), branch(layout.shapes[0], False), empty, chunk)

    if kept_chunks and len({shape.length for shape in layout.shapes}) > 1:
        raise ValueError("kept_chunks is for packed layouts; chunks of several row lengths are always computed twice")
    kept = round(kept_chunks * len(chunks["shape"]))
    stacked = {name: array for name, array in chunks.items() if name != "place"}
    parts = [
        jax.lax.map(one_chunk, part)
        for one_chunk, part in (
            (kept_chunk, {name: array[:kept] for name, array in stacked.items()}),
            (recomputed_chunk, {name: array[kept:] for name, array in stacked.items()}),
        )
        if len(part["shape"])
    ]
    embedding_SE = jnp.concatenate(parts).reshape(-1, model.output_dim)
    return embedding_SE.at[chunks["place"]].get(mode="promise_in_bounds", unique_indices=True)


def _embed_chunk(
    params: dict, chunk: dict[str, jax.Array], shape: Shape, model: EmbeddingConfig, layout: Layout
) -> jax.Array:
    """Embeddings [rows * segments, E] of a chunk of a known shape."""
    tokens = shape.rows * shape.length
    ids_BL = chunk["ids"][:tokens].reshape(shape)
    if not layout.packed:
        # An unused row has length 0, for which attention kernels return unspecified values. One pad token avoids that.
        length_B = jnp.maximum(chunk["length"][: shape.rows], 1)
        return embed(params, {"ids": ids_BL, "length": length_B}, model)
    segment_BL = chunk["segment"][:tokens].reshape(shape)
    hidden_BLD = encode(params, ids_BL, model.encoder, segment_BL=segment_BL, max_segments=layout.segments)
    return pool_segments(hidden_BLD, segment_BL, layout.segments, model).reshape(-1, model.output_dim)

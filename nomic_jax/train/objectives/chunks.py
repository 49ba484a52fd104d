"""Embeds the texts of a batch chunk by chunk; chunks may have different shapes (``nomic_jax.data.batches.packing``)."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp

from nomic_jax.data.batches.packing import Layout
from nomic_jax.data.batches.shapes import Shape
from nomic_jax.model import EmbeddingConfig, EncoderConfig, embed, encode
from nomic_jax.model.encoder import cast_kernels
from nomic_jax.model.heads import pool_segments
from nomic_jax.model.layers.dropout import Dropout
from nomic_jax.model.varying import varying_as

Chunk = dict[str, jax.Array]
# Names of the loops in the compiled program, whose number of turns depends on the batch.
KEPT_CHUNKS, RECOMPUTED_CHUNKS = "kept_chunks", "recomputed_chunks"


def embed_chunks(
    params: dict,
    chunks: dict[str, jax.Array],
    model: EmbeddingConfig,
    layout: Layout,
    *,
    kept_chunks: float = 0.0,
    dropout_rate: float = 0.0,
) -> jax.Array:
    """Returns embeddings [N, E] of a device's texts, in the order of the plan; may run inside ``jax.shard_map``.

    The chunks with text are computed one after the other, in the forward and in the backward pass. The program does not
    depend on the lengths of the texts, and devices may have different numbers and shapes of chunks.

    Args:
      params: encoder parameters.
      chunks: one device's arrays of ``fill_chunks``; for dropout, also ``dropout``, a seed of each chunk.
      model: the encoder and its pooling.
      layout: the shapes of the chunks.
      kept_chunks: share of the chunks whose activations are kept for the backward pass; the others are recomputed in
        it. Kept chunks are computed in the largest shape. Above 0 only for layouts whose rows all have one length.
      dropout_rate: see ``nomic_jax.model.layers.dropout``; used if there are seeds.
    """
    if kept_chunks and len({shape.length for shape in layout.shapes}) > 1:
        raise ValueError("kept_chunks is for packed layouts; chunks of several row lengths are always computed twice")
    count = len(chunks["shape"])
    kept = round(kept_chunks * count)
    stacked = {name: array for name, array in chunks.items() if name != "place"}
    # Parameters that do not vary over devices would make each turn of the backward pass add up over devices.
    params = jax.tree.map(lambda x: varying_as(x, chunks["ids"]), params)

    def compute(shape: Shape, params: dict, chunk: Chunk) -> jax.Array:
        seed = chunk.get("dropout")
        dropout = None if seed is None else Dropout(jax.random.key(seed), dropout_rate)
        embedding_SE = _embed_chunk(params, chunk, shape, model, layout, dropout)
        return jnp.pad(embedding_SE, ((0, layout.slots - len(embedding_SE)), (0, 0)))

    if count == kept == 1:
        embedding_NSE = compute(layout.shapes[0], params, jax.tree.map(lambda x: x[0], stacked))[None]
    else:
        embedding_NSE = _in_a_loop(compute, params, stacked, model.encoder, layout, kept)
    embedding_SE = embedding_NSE.reshape(-1, model.output_dim)
    return embedding_SE.at[chunks["place"]].get(mode="promise_in_bounds", unique_indices=True)


def _in_a_loop(
    compute: Callable[[Shape, dict, Chunk], jax.Array],
    params: dict,
    chunks: Chunk,
    encoder: EncoderConfig,
    layout: Layout,
    kept: int,
) -> jax.Array:
    """Returns the embeddings [N, slots, E] of N chunks; 0 for empty chunks, which come last.

    ``jax.lax.map`` would keep a copy of the parameters for every chunk, and compute empty chunks or branch around them.
    Here a kept chunk stores what its backward pass needs besides the parameters, once, in its place.
    """
    count = len(chunks["shape"])
    in_largest = functools.partial(compute, layout.shapes[0])

    def chunk_at(chunks: Chunk, i: jax.Array) -> Chunk:
        return {name: jax.lax.dynamic_index_in_dim(array, i, keepdims=False) for name, array in chunks.items()}

    def by_shape(function: Callable[[Shape], Callable], chunk: Chunk, *arguments: Any) -> Any:
        return jax.lax.switch(chunk["shape"], [function(shape) for shape in layout.shapes], *arguments)

    # The backward pass may belong to another trace. It must get all arrays as arguments.
    def with_text(chunks: Chunk) -> jax.Array:
        return jnp.sum(chunks["shape"] < len(layout.shapes))

    def zeros(chunks: Chunk, like: Any, *leading: int) -> Any:
        return jax.tree.map(lambda x: varying_as(jnp.zeros((*leading, *x.shape), x.dtype), chunks["ids"]), like)

    def recomputed(params: dict, chunks: Chunk, embedding_NSE: jax.Array, first: int) -> jax.Array:
        def turn(i: jax.Array, embedding_NSE: jax.Array) -> jax.Array:
            chunk = chunk_at(chunks, i)
            here_SE = by_shape(lambda shape: functools.partial(compute, shape), chunk, params, chunk)
            return embedding_NSE.at[i].set(here_SE)

        if first == count:
            return embedding_NSE
        with jax.named_scope(RECOMPUTED_CHUNKS):
            return jax.lax.fori_loop(first, with_text(chunks), turn, embedding_NSE)

    # Once, not in every turn.
    cast = functools.partial(cast_kernels, config=encoder)
    first_chunk = chunk_at(chunks, jnp.zeros((), jnp.int32))
    embedding_SE = jax.eval_shape(in_largest, params, first_chunk)
    residuals_of = _Residuals(in_largest, cast(params), first_chunk) if kept else None

    @jax.custom_vjp
    def embeddings(params: dict, chunks: Chunk) -> jax.Array:
        return recomputed(cast(params), chunks, zeros(chunks, embedding_SE, count), 0)

    def forward(params: dict, chunks: Chunk):
        params = cast(params)
        embedding_NSE = zeros(chunks, embedding_SE, count)
        if residuals_of is None:
            return recomputed(params, chunks, embedding_NSE, 0), (params, chunks, [], [])

        def turn(i: jax.Array, carry: tuple[jax.Array, list[jax.Array]]) -> tuple[jax.Array, list[jax.Array]]:
            embedding_NSE, buffers = carry
            here_SE, _, own = residuals_of(params, chunk_at(chunks, i))
            buffers = [jax.lax.dynamic_update_index_in_dim(buffer, leaf, i, 0) for buffer, leaf in zip(buffers, own)]
            return embedding_NSE.at[i].set(here_SE), buffers

        # The residuals without the chunk are those of any chunk. The compiler drops what else is computed here.
        _, shared, own = residuals_of(params, chunk_at(chunks, jnp.zeros((), jnp.int32)))
        carry = embedding_NSE, [zeros(chunks, leaf, kept) for leaf in own]
        with jax.named_scope(KEPT_CHUNKS):
            embedding_NSE, buffers = jax.lax.fori_loop(0, jnp.minimum(with_text(chunks), kept), turn, carry)
        return recomputed(params, chunks, embedding_NSE, kept), (params, chunks, shared, buffers)

    def backward(residuals: tuple, cotangent_NSE: jax.Array) -> tuple[dict, None]:
        params, chunks, shared, buffers = residuals

        def add(gradient: dict, more: dict) -> dict:
            return jax.tree.map(lambda total, x: total + x.astype(total.dtype), gradient, more)

        def kept_turn(i: jax.Array, gradient: dict) -> dict:
            assert residuals_of is not None
            own = [jax.lax.dynamic_index_in_dim(buffer, i, keepdims=False) for buffer in buffers]
            return add(gradient, residuals_of.pullback(shared, own)(cotangent_NSE[i])[0])

        def recomputed_turn(i: jax.Array, gradient: dict) -> dict:
            chunk = chunk_at(chunks, i)

            def of_shape(shape: Shape) -> Callable[[dict, Chunk, jax.Array], dict]:
                # Around each shape: the activations of all shapes would be allocated together.
                return lambda params, chunk, cotangent_SE: jax.vjp(
                    lambda params: compute(shape, params, chunk), params
                )[1](cotangent_SE)[0]

            return add(gradient, by_shape(of_shape, chunk, params, chunk, cotangent_NSE[i]))

        gradient = zeros(chunks, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), params))
        if kept:
            with jax.named_scope(KEPT_CHUNKS):
                gradient = jax.lax.fori_loop(0, jnp.minimum(with_text(chunks), kept), kept_turn, gradient)
        if kept < count:
            with jax.named_scope(RECOMPUTED_CHUNKS):
                gradient = jax.lax.fori_loop(kept, with_text(chunks), recomputed_turn, gradient)
        return gradient, None

    embeddings.defvjp(forward, backward)
    return embeddings(params, chunks)


class _Residuals:
    """What the backward pass of a chunk needs, apart: arrays that all chunks share, and those of the chunk.

    A call returns (embeddings [slots, E], shared, own). Shared are the residuals that depend on the parameters alone,
    such as the parameters themselves or their casts.
    """

    def __init__(self, compute: Callable[[dict, Chunk], jax.Array], params: dict, chunk: Chunk):
        self._compute = compute
        jaxpr = jax.make_jaxpr(self._flat)(params, chunk).jaxpr
        depends = set(jaxpr.invars[len(jax.tree.leaves(params)) :])
        for equation in jaxpr.eqns:
            if any(isinstance(x, jax.extend.core.Var) and x in depends for x in equation.invars):
                depends |= set(equation.outvars)
        self._is_own = [isinstance(x, jax.extend.core.Var) and x in depends for x in jaxpr.outvars[1:]]

    def _flat(self, params: dict, chunk: Chunk) -> list[jax.Array]:
        embedding_SE, pullback = jax.vjp(lambda params: self._compute(params, chunk), params)
        leaves, self._structure = jax.tree.flatten(pullback)
        return [embedding_SE, *leaves]

    def __call__(self, params: dict, chunk: Chunk) -> tuple[jax.Array, list[jax.Array], list[jax.Array]]:
        embedding_SE, *leaves = self._flat(params, chunk)
        shared, own = (
            [leaf for leaf, is_own in zip(leaves, self._is_own, strict=True) if is_own is wanted]
            for wanted in (False, True)
        )
        return embedding_SE, shared, own

    def pullback(self, shared: list[jax.Array], own: list[jax.Array]) -> Callable[[jax.Array], tuple[dict]]:
        """Returns the function (cotangent of the embeddings) -> (gradient of the parameters,)."""
        shared_leaves, own_leaves = iter(shared), iter(own)
        leaves = [next(own_leaves if is_own else shared_leaves) for is_own in self._is_own]
        return jax.tree.unflatten(self._structure, leaves)


def _embed_chunk(
    params: dict, chunk: Chunk, shape: Shape, model: EmbeddingConfig, layout: Layout, dropout: Dropout | None
) -> jax.Array:
    """Embeddings [rows * segments, E] of a chunk of a known shape."""
    tokens = shape.rows * shape.length
    ids_BL = chunk["ids"][:tokens].reshape(shape)
    if not layout.packed:
        # An unused row has length 0, for which attention kernels return unspecified values. One pad token avoids that.
        length_B = jnp.maximum(chunk["length"][: shape.rows], 1)
        return embed(params, {"ids": ids_BL, "length": length_B}, model, dropout)
    segment_BL = chunk["segment"][:tokens].reshape(shape)
    hidden_BLD = encode(
        params, ids_BL, model.encoder, segment_BL=segment_BL, max_segments=layout.segments, dropout=dropout
    )
    return pool_segments(hidden_BLD, segment_BL, layout.segments, model, params).reshape(-1, model.output_dim)

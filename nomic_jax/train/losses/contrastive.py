"""The losses, as sums over a device's rows; the training step turns them into the global mean."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nomic_jax.train.losses.settings import MAX_SCALE

MASKED = jnp.finfo(jnp.float32).min


class _Candidates(NamedTuple):
    """The candidates of one direction of the loss, from all devices: documents, or queries.

    Attributes:
      row_N: row of the global batch that the candidate comes from; -1 for padding.
      is_positive_N: True for the candidate of its row's pair; False for mined negatives.
      query_hash_N2: hash of the query of its row.
      document_hash_N2: hash of the document, or of the positive of its row if the candidate is a query.
      guide_NG: the guide's embeddings; None without a guide.
    """

    embedding_NE: jax.Array
    row_N: jax.Array
    is_positive_N: jax.Array
    query_hash_N2: jax.Array
    document_hash_N2: jax.Array
    guide_NG: jax.Array | None


class _Anchors(NamedTuple):
    """This device's queries, or its positives. Fields are as in _Candidates; hashes are those of the pair.

    Attributes:
      in_batch_b1: bool [b, 1] or [1, 1]; False where candidates of other rows are excluded.
      threshold_b1: candidates with a higher guide score are not negatives.
    """

    embedding_bE: jax.Array
    row_b: jax.Array
    query_hash_b2: jax.Array
    document_hash_b2: jax.Array
    in_batch_b1: jax.Array
    guide_bG: jax.Array | None
    threshold_b1: jax.Array


def contrastive_loss(
    query_bE: jax.Array,
    document_bCE: jax.Array,
    query_hash_b2: jax.Array,
    document_hash_bC2: jax.Array,
    *,
    temperature: float | jax.Array,
    axis_name: str,
    bidirectional: bool = False,
    in_batch_negatives: bool | jax.Array = True,
    guide_query_bG: jax.Array | None = None,
    guide_document_bCG: jax.Array | None = None,
    guide_margin: float = 0.0,
    matryoshka_dims: tuple[int, ...] = (),
    matryoshka_weights: tuple[float, ...] = (),
    column_tile: int = 0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """InfoNCE of each query against the documents of all devices (paper eq. 1; with negatives, section 3.4).

    Runs on each device of ``axis_name``, inside ``jax.shard_map``. Every document of every device, positive or mined
    negative, is a candidate of every query. A candidate that is the positive again (the same document text, or the
    positive of a row with the same query text) is left out of the sum.

    ``bidirectional`` adds the direction document -> query: each positive against the queries of all devices, without
    those of rows with the same document or query text. Mined negatives are not used. The loss is the mean of both
    directions (sentence-transformers' MultipleNegativesRankingLoss with both directions and
    partition_mode="per_direction").

    Args:
      query_bE: this device's query embeddings, normalised.
      document_bCE: this device's documents, C = 1 + negatives of each row, the positive first, normalised.
      query_hash_b2, document_hash_bC2: uint32; equal means equal text.
      temperature: divides the cosine similarities; an array if learnt (``temperature_of``).
      axis_name: the mesh axis to gather over.
      in_batch_negatives: a scalar, or [b]; may be traced. A query for which it is False has only its own row's
        documents as candidates, and a positive only its own query: the loss of the direction document -> query is 0.
      guide_query_bG, guide_document_bCG: embeddings of a guide (a teacher), normalised; both or none. A candidate
        whose guide similarity to the anchor exceeds that of the row's pair by more than ``guide_margin`` counts as a
        false negative and is left out, in both directions and also if it was mined (GISTEmbed, arXiv:2402.16829).
        sentence-transformers' "absolute" margin has the opposite sign.
      matryoshka_dims: the loss is a weighted sum over these sizes; each term uses the first ``dim`` components,
        normalised again. Empty for the full embeddings (arXiv:2205.13147).
      matryoshka_weights: one weight for each size; they need not sum to 1 (as in sentence-transformers). Empty for 1
        each.
      column_tile: candidates compared at a time, in the forward and the backward pass, for batches whose [b, N] logits
        do not fit. It costs one more matmul in the backward pass. 0 for all at once.

    Returns:
      The sum of the loss over this device's queries, and sums of metrics. "accuracy" counts the queries whose positive
      scores higher than every candidate that was not left out, at the largest Matryoshka size.

    Raises:
      ValueError: Matryoshka dims or weights that do not fit, or half a guide.
    """
    b, C, E = document_bCE.shape
    dims, weights = zip(*weights_of(E, matryoshka_dims, matryoshka_weights))
    if (guide_query_bG is None) != (guide_document_bCG is None):
        raise ValueError("a guide needs both guide_query_bG and guide_document_bCG")

    def gather(x: jax.Array) -> jax.Array:
        return jax.lax.all_gather(x, axis_name, tiled=True)

    # float32 from here on: with a temperature of .02 a bfloat16 logit of 40 is off by up to .125.
    query_bE, document_bCE = query_bE.astype(jnp.float32), document_bCE.astype(jnp.float32)
    positive_bE = document_bCE[:, 0]
    all_query_hash_B2 = gather(query_hash_b2)
    all_document_hash_N2 = gather(document_hash_bC2.reshape(b * C, 2))
    B = all_query_hash_B2.shape[0]

    guide_positive_bG, guide_NG, threshold_b1 = None, None, jnp.full((1, 1), jnp.inf)
    if guide_query_bG is not None and guide_document_bCG is not None:
        guide_query_bG = jax.lax.stop_gradient(guide_query_bG).astype(jnp.float32)
        guide_document_bCG = jax.lax.stop_gradient(guide_document_bCG).astype(jnp.float32)
        guide_positive_bG = guide_document_bCG[:, 0]
        guide_NG = gather(guide_document_bCG.reshape(b * C, -1))
        threshold_b1 = jnp.sum(guide_query_bG * guide_positive_bG, axis=1, keepdims=True) + guide_margin

    anchors = _Anchors(
        embedding_bE=query_bE,
        row_b=jax.lax.axis_index(axis_name) * b + jnp.arange(b),
        query_hash_b2=query_hash_b2,
        document_hash_b2=document_hash_bC2[:, 0],
        in_batch_b1=jnp.reshape(jnp.asarray(in_batch_negatives, bool), (-1, 1)),
        guide_bG=guide_query_bG,
        threshold_b1=threshold_b1,
    )
    documents = _Candidates(
        embedding_NE=gather(document_bCE.reshape(b * C, E)),
        row_N=jnp.arange(B * C) // C,
        is_positive_N=jnp.arange(B * C) % C == 0,
        query_hash_N2=jnp.repeat(all_query_hash_B2, C, axis=0),
        document_hash_N2=all_document_hash_N2,
        guide_NG=guide_NG,
    )
    positive_db = jnp.stack(
        [
            jnp.sum(first_components(query_bE, dim) * first_components(positive_bE, dim), axis=1) / temperature
            for dim in dims
        ]
    )
    negatives_db, best_db = _logsumexp_of_negatives(anchors, documents, temperature, dims, column_tile)
    # log(e^positive + e^negatives) - positive, without the cancellation between the two when the loss is small.
    loss_db = jax.nn.softplus(negatives_db - positive_db)

    if bidirectional:
        queries = _Candidates(
            embedding_NE=gather(query_bE),
            row_N=jnp.arange(B),
            is_positive_N=jnp.ones(B, bool),
            query_hash_N2=all_query_hash_B2,
            document_hash_N2=all_document_hash_N2[::C],
            guide_NG=None if guide_query_bG is None else gather(guide_query_bG),
        )
        anchors = anchors._replace(embedding_bE=positive_bE, guide_bG=guide_positive_bG)
        negatives_db, _ = _logsumexp_of_negatives(anchors, queries, temperature, dims, column_tile)
        loss_db = (loss_db + jax.nn.softplus(negatives_db - positive_db)) / 2

    largest = dims.index(max(dims))
    metrics = {"accuracy": jnp.sum(positive_db[largest] > best_db[largest]).astype(jnp.float32)}
    return jnp.sum(jnp.array(weights)[:, None] * loss_db), metrics


def weights_of(E: int, dims: tuple[int, ...], weights: tuple[float, ...]) -> list[tuple[int, float]]:
    """The (size, weight) of each term of a Matryoshka loss of embeddings of ``E`` components; ((E, 1),) without dims.

    Raises:
      ValueError: sizes beyond the embeddings, or another number of weights.
    """
    dims = dims or (E,)
    weights = weights or (1.0,) * len(dims)
    if not all(0 < dim <= E for dim in dims):
        raise ValueError(f"matryoshka_dims {dims} must lie within 1..{E}, the width of the embeddings")
    if len(weights) != len(dims):
        raise ValueError(f"there are {len(weights)} matryoshka_weights for {len(dims)} matryoshka_dims")
    return list(zip(dims, weights))


def _logsumexp_of_negatives(
    anchors: _Anchors, candidates: _Candidates, temperature: float | jax.Array, dims: tuple[int, ...], column_tile: int
) -> tuple[jax.Array, jax.Array]:
    """The log-sum-exp and the maximum of each anchor's logits to its negatives, by dim; both [dims, b]."""

    def of_tile(tile: _Candidates) -> tuple[jax.Array, jax.Array]:
        negative_bT = _is_negative(anchors, tile)
        total, best = [], []
        for dim in dims:
            similarity_bT = _similarity(
                first_components(anchors.embedding_bE, dim), first_components(tile.embedding_NE, dim)
            )
            logits_bT = jnp.where(negative_bT, similarity_bT / temperature, MASKED)
            total.append(jax.nn.logsumexp(logits_bT, axis=1))
            best.append(jnp.max(jax.lax.stop_gradient(logits_bT), axis=1))
        return jnp.stack(total), jnp.stack(best)

    N = candidates.row_N.shape[0]
    if not 0 < column_tile < N:
        return of_tile(candidates)

    def in_tiles(x_N: jax.Array, fill: int = 0) -> jax.Array:
        padding = [(0, -N % column_tile)] + [(0, 0)] * (x_N.ndim - 1)
        return jnp.pad(x_N, padding, constant_values=fill).reshape(-1, column_tile, *x_N.shape[1:])

    tiles = jax.tree.map(in_tiles, candidates)._replace(row_N=in_tiles(candidates.row_N, -1))
    # Without the checkpoint the backward pass would keep every tile's logits: all of [b, N] again.
    total_tdb, best_tdb = jax.lax.map(jax.checkpoint(of_tile, prevent_cse=False), tiles)
    return jax.nn.logsumexp(total_tdb, axis=0), jnp.max(best_tdb, axis=0)


def _is_negative(anchors: _Anchors, tile: _Candidates) -> jax.Array:
    """bool [b, T]: False for the positive, its duplicates, what the guide scores above the positive, and padding."""
    own_row_bT = anchors.row_b[:, None] == tile.row_N
    # True for the positive itself too.
    same_document_bT = _equal_hash(anchors.document_hash_b2, tile.document_hash_N2)
    # Only the pair of a row with the same query is a positive here; that row's mined negatives stay negatives.
    same_query_bT = _equal_hash(anchors.query_hash_b2, tile.query_hash_N2) & tile.is_positive_N
    negative_bT = ~(same_document_bT | same_query_bT) & (own_row_bT | anchors.in_batch_b1) & (tile.row_N >= 0)
    if anchors.guide_bG is not None and tile.guide_NG is not None:
        negative_bT &= _similarity(anchors.guide_bG, tile.guide_NG) <= anchors.threshold_b1
    return negative_bT


def _similarity(a_mE: jax.Array, b_nE: jax.Array) -> jax.Array:
    """Similarities [m, n] in full float32; by default a GPU would round the operands to TF32's 10 bits."""
    return jnp.einsum("me,ne->mn", a_mE, b_nE, precision=jax.lax.Precision.HIGHEST)


def first_components(x_nE: jax.Array, dim: int) -> jax.Array:
    """The first ``dim`` components, normalised again; unchanged if ``dim`` is the full size."""
    if dim == x_nE.shape[1]:
        return x_nE
    x_nE = x_nE[:, :dim]
    # As in model.pool: the gradient at the zero vector is 0, not NaN.
    return x_nE * jax.lax.rsqrt(jnp.maximum(jnp.sum(x_nE**2, axis=1, keepdims=True), 1e-24))


def _equal_hash(a_m2: jax.Array, b_n2: jax.Array) -> jax.Array:
    """[m, n]"""
    return (a_m2[:, None, 0] == b_n2[None, :, 0]) & (a_m2[:, None, 1] == b_n2[None, :, 1])


def init_temperature(temperature: float) -> dict[str, jax.Array]:
    """Parameters of a learnable temperature: the log of its inverse, a float32 scalar, as in CLIP.

    Raises:
      ValueError: ``temperature`` is below 1 / MAX_SCALE.
    """
    if not temperature >= 1 / MAX_SCALE:
        raise ValueError(f"a learnable temperature starts at {1 / MAX_SCALE} or above, not at {temperature}")
    return {"log_scale": jnp.asarray(-math.log(temperature), jnp.float32)}


def temperature_of(params: dict[str, jax.Array]) -> jax.Array:
    """The temperature, a float32 scalar of at least 1 / MAX_SCALE.

    The clamp acts on the value only. The gradient passes through it, so a scale beyond the bound can return; with a
    plain minimum its gradient would stay 0.
    """
    log_scale = params["log_scale"]
    excess = jax.lax.stop_gradient(jnp.maximum(log_scale - math.log(MAX_SCALE), 0.0))
    return jnp.exp(excess - log_scale)


def masked_cross_entropy(logits_TV: jax.Array, target_T: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sums of the cross-entropy and of correct predictions over tokens, float32; targets of -1 are ignored."""
    used_T = target_T >= 0
    # A comparison, not a gather: the gradient of a gather is a scatter.
    is_target_TV = jnp.arange(logits_TV.shape[1]) == target_T[:, None]
    loss_T = jax.nn.logsumexp(logits_TV, axis=-1) - jnp.sum(jnp.where(is_target_TV, logits_TV, 0.0), axis=-1)
    correct_T = jnp.argmax(logits_TV, axis=-1) == target_T
    return jnp.sum(jnp.where(used_T, loss_T, 0.0)), jnp.sum(used_T & correct_T).astype(jnp.float32)

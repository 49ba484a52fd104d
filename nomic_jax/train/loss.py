"""The losses, as sums over a device's rows; the training step turns them into the global mean."""

import jax
import jax.numpy as jnp

MASKED = jnp.finfo(jnp.float32).min


def contrastive_loss(
    query_bE: jax.Array,
    document_bCE: jax.Array,
    query_hash_b2: jax.Array,
    document_hash_bC2: jax.Array,
    *,
    temperature: float,
    axis_name: str,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """InfoNCE of each query against the documents of all devices (paper eq. 1; with negatives, section 3.4).

    Runs on each device of ``axis_name``, inside ``jax.shard_map``. Every document of every device, positive or mined
    negative, is a candidate of every query. A candidate that is the positive again (the same document text, or the
    positive of a row with the same query text) is left out of the sum.

    Args:
      query_bE: this device's query embeddings, normalised.
      document_bCE: its documents, C = 1 + negatives a row, the positive first, normalised.
      query_hash_b2, document_hash_bC2: uint32; equal means equal text.
      temperature: divides the cosine similarities.
      axis_name: the mesh axis to gather over.

    Returns:
      The sum of the loss over this device's queries, and metric sums ("accuracy": positive scored highest).
    """
    b, C, E = document_bCE.shape

    # float32 from here on: with a temperature of .02 a bfloat16 logit of 40 is off by up to .125.
    def gather(x: jax.Array) -> jax.Array:
        return jax.lax.all_gather(x, axis_name, tiled=True)

    candidate_NE = gather(document_bCE.astype(jnp.float32).reshape(b * C, E))
    candidate_hash_N2 = gather(document_hash_bC2.reshape(b * C, 2))
    all_query_hash_B2 = gather(query_hash_b2)
    logits_bN = query_bE.astype(jnp.float32) @ candidate_NE.T / temperature

    target_b = (jax.lax.axis_index(axis_name) * b + jnp.arange(b)) * C
    same_document_bN = _equal_hash(document_hash_bC2[:, 0], candidate_hash_N2)
    # Only the positive of a row with the same query is a positive here; that row's negatives stay negatives.
    same_query_bB = _equal_hash(query_hash_b2, all_query_hash_B2)
    same_query_bN = (same_query_bB[:, :, None] & (jnp.arange(C) == 0)).reshape(b, -1)
    is_target_bN = jnp.arange(logits_bN.shape[1]) == target_b[:, None]
    logits_bN = jnp.where((same_document_bN | same_query_bN) & ~is_target_bN, MASKED, logits_bN)

    positive_b = jnp.take_along_axis(logits_bN, target_b[:, None], axis=1)[:, 0]
    loss_b = jax.nn.logsumexp(logits_bN, axis=1) - positive_b
    metrics = {"accuracy": jnp.sum(jnp.argmax(logits_bN, axis=1) == target_b).astype(jnp.float32)}
    return jnp.sum(loss_b), metrics


def _equal_hash(a_m2: jax.Array, b_n2: jax.Array) -> jax.Array:
    """[m, n]"""
    return (a_m2[:, None, 0] == b_n2[None, :, 0]) & (a_m2[:, None, 1] == b_n2[None, :, 1])


def masked_cross_entropy(logits_TV: jax.Array, target_T: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sums over tokens of the cross-entropy and of correct predictions, float32; targets of -1 do not count."""
    used_T = target_T >= 0
    safe_target_T = jnp.maximum(target_T, 0)
    loss_T = jax.nn.logsumexp(logits_TV, axis=-1) - jnp.take_along_axis(logits_TV, safe_target_T[:, None], 1)[:, 0]
    correct_T = jnp.argmax(logits_TV, axis=-1) == safe_target_T
    return jnp.sum(jnp.where(used_T, loss_T, 0.0)), jnp.sum(used_T & correct_T).astype(jnp.float32)

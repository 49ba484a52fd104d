"""Losses on scores: of pairs that people have scored, and of a teacher for the candidates of a query.

Like ``contrastive_loss``, they are sums over a device's rows, which run inside ``jax.shard_map``. Embeddings are
normalised, so that all similarities are cosines.
"""

import jax
import jax.numpy as jnp

from nomic_jax.train.losses.contrastive import MASKED, first_components, weights_of

PAIR_LOSSES = ("cosent", "angle", "cosine_mse")
TEACHER_LOSSES = ("kl", "margin_mse")


def scored_pair_loss(
    name: str,
    query_bE: jax.Array,
    document_bE: jax.Array,
    score_b: jax.Array,
    *,
    temperature: float | jax.Array,
    axis_name: str,
    dims: tuple[int, ...] = (),
    weights: tuple[float, ...] = (),
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of pairs with a score each.

    cosent      log(1 + sum exp((s_j - s_i) / temperature)) over all pairs i, j of the batch, of all devices, where i
                has the higher score; s is the cosine (CoSENT, doi:10.1109/TASLP.2024.3402087). Only the order of the
                scores counts.
    angle       the same, with the similarity of AnglE (arXiv:2309.12871, see ``angle_similarity``) as s
    cosine_mse  (s - score)^2

    They are sentence-transformers' CoSENTLoss, AnglELoss and CosineSimilarityLoss, for 1 / temperature as ``scale``.

    Args:
      name: one of PAIR_LOSSES.
      query_bE, document_bE: this device's embeddings, normalised.
      score_b: scores, the higher the more similar; for "cosine_mse" on the scale of cosines.
      temperature: not for "cosine_mse".
      axis_name: the mesh axis to gather over: B scalars, not the embeddings.
      dims, weights: Matryoshka, see ``contrastive_loss``.

    Returns:
      The sum over this device's rows, so that the sum of all devices is the batch size times the loss of the batch, and
      "concordance": of the pairs i, j of different scores, the share that the cosines order as the scores do.
    """

    def gather(x: jax.Array) -> jax.Array:
        return jax.lax.all_gather(x, axis_name, tiled=True)

    query_bE, document_bE = query_bE.astype(jnp.float32), document_bE.astype(jnp.float32)
    b = score_b.shape[0]
    all_score_B = gather(score_b)
    B = all_score_B.shape[0]
    is_higher_bB = all_score_B > score_b[:, None]
    total = jnp.zeros_like(score_b[0])
    cosine_b = jnp.sum(query_bE * document_bE, axis=1)
    for dim, weight in weights_of(query_bE.shape[1], dims, weights):
        parts = first_components(query_bE, dim), first_components(document_bE, dim)
        similarity_b = jnp.sum(parts[0] * parts[1], axis=1)
        if name == "cosine_mse":
            total += weight * jnp.sum((similarity_b - score_b) ** 2)
            continue
        if name == "angle":
            similarity_b = angle_similarity(*parts)
        logit_b = similarity_b / temperature
        higher_b = jax.nn.logsumexp(jnp.where(is_higher_bB, -gather(logit_b), MASKED), axis=1)
        # The sum over this device's rows, then over devices; the zero is the 1 of the formula.
        partial = jax.nn.logsumexp(logit_b + higher_b)
        total += weight * b * jax.nn.softplus(jax.nn.logsumexp(gather(partial[None])))
    all_cosine_B = gather(jax.lax.stop_gradient(cosine_b))
    ordered = jnp.sum(is_higher_bB & (all_cosine_B > cosine_b[:, None])).astype(jnp.float32)
    pairs = jax.lax.psum(jnp.sum(is_higher_bB).astype(jnp.float32), axis_name)
    return total, {"concordance": B * ordered / jnp.maximum(pairs, 1)}


def angle_similarity(x_bE: jax.Array, y_bE: jax.Array) -> jax.Array:
    """AnglE's similarity [b] of normalised embeddings: abs(cosine + sine), where components i and i + E / 2 are paired.

    As sentence-transformers' ``pairwise_angle_sim``; an odd E gets a zero.
    """
    x_bE, y_bE = (jnp.pad(z, ((0, 0), (0, z.shape[1] % 2))) for z in (x_bE, y_bE))
    (a, b), (c, d) = jnp.split(x_bE, 2, axis=1), jnp.split(y_bE, 2, axis=1)
    return jnp.abs(jnp.sum(x_bE * y_bE, axis=1) + jnp.sum(b * c - a * d, axis=1))


def teacher_score_loss(
    name: str,
    query_bE: jax.Array,
    document_bCE: jax.Array,
    score_bC: jax.Array,
    *,
    temperature: float | jax.Array,
    dims: tuple[int, ...] = (),
    weights: tuple[float, ...] = (),
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of each query's own candidates against a teacher's scores of them.

    kl          KL(softmax(score) || softmax(cosine / temperature)) (sentence-transformers' DistillKLDivLoss without its
                factor temperature^2, which would make it vanish beside InfoNCE at .02)
    margin_mse  the mean over the negatives of ((cosine of the document - of the negative) - (its score - the
                negative's))^2 (arXiv:2010.02666, MarginMSELoss)

    Args:
      name: one of TEACHER_LOSSES.
      query_bE, document_bCE: embeddings of the queries and of their candidates, the document first, normalised.
      score_bC: the teacher's scores, divided by its temperature.
      temperature: of the student, for "kl".
      dims, weights: Matryoshka, see ``contrastive_loss``.

    Returns:
      The sum over this device's rows, and "agreement": the number of queries for which the model's best candidate is
      the teacher's.
    """
    query_bE, document_bCE = query_bE.astype(jnp.float32), document_bCE.astype(jnp.float32)
    b, C, E = document_bCE.shape
    total = jnp.zeros_like(score_bC[0, 0])

    def cosines(dim: int) -> jax.Array:
        document_nE = first_components(document_bCE.reshape(b * C, E), dim)
        return jnp.einsum(
            "be,bce->bc",
            first_components(query_bE, dim),
            document_nE.reshape(b, C, -1),
            precision=jax.lax.Precision.HIGHEST,
        )

    for dim, weight in weights_of(E, dims, weights):
        cosine_bC = cosines(dim)
        if name == "kl":
            target_bC = jax.nn.log_softmax(score_bC, axis=1)
            own_bC = jax.nn.log_softmax(cosine_bC / temperature, axis=1)
            loss_b = jnp.sum(jnp.exp(target_bC) * (target_bC - own_bC), axis=1)
        else:
            error_bM = (cosine_bC[:, :1] - cosine_bC[:, 1:]) - (score_bC[:, :1] - score_bC[:, 1:])
            loss_b = jnp.mean(error_bM**2, axis=1)
        total += weight * jnp.sum(loss_b)
    agrees_b = jnp.argmax(cosines(E), axis=1) == jnp.argmax(score_bC, axis=1)
    return total, {"agreement": jnp.sum(agrees_b).astype(jnp.float32)}

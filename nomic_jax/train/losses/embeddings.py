"""Embedding distillation: the embedding of a text against a teacher's vector (arXiv:2301.12005, arXiv:2004.09813)."""

import jax
import jax.numpy as jnp

from nomic_jax.train.losses.contrastive import contrastive_loss, first_components, weights_of
from nomic_jax.train.typed_fields import ConfigurationError

EMBEDDING_LOSSES = ("embedding_mse", "embedding_cosine", "embedding_infonce")


def init_projection(key: jax.Array, width: int, teacher_width: int) -> dict[str, jax.Array]:
    """Parameters of the linear projection to a teacher's width: kernel [E, T], bias [T].

    The kernel's columns are orthonormal, or its rows if T > E: so the embedding itself gets the teacher's cosines. With
    other singular values, it would learn cosines that only the projection turns into the teacher's.
    """
    kernel = jax.nn.initializers.orthogonal()(key, (width, teacher_width), jnp.float32)
    return {"kernel": kernel, "bias": jnp.zeros(teacher_width, jnp.float32)}


def embedding_loss(
    name: str,
    embedding_bnE: jax.Array,
    target_bnT: jax.Array,
    *,
    hash_bn2: jax.Array | None = None,
    temperature: float | jax.Array = 1.0,
    axis_name: str = "",
    projection: dict[str, jax.Array] | None = None,
    dims: tuple[int, ...] = (),
    weights: tuple[float, ...] = (),
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of the texts of each row against a teacher's vectors.

    embedding_mse     mean over the components of (embedding - vector)^2 (sentence-transformers' MSELoss)
    embedding_cosine  1 - cosine of embedding and vector (its EmbedDistillLoss)
    embedding_infonce  InfoNCE of the embedding against the vectors of the same column of all devices: its text's own
                      vector, among those of other texts (contrastive distillation, arXiv:1910.10699). From random
                      weights the other two first learn the mean of all vectors, and little else for long; here that
                      gains nothing.

    Args:
      name: one of EMBEDDING_LOSSES.
      embedding_bnE: this device's embeddings, normalised; n texts of each row.
      target_bnT: the teacher's vectors.
      hash_bn2, temperature, axis_name: of embedding_infonce; equal hashes mean equal texts, see ``contrastive_loss``.
      projection: of ``init_projection``; None where T = E.
      dims, weights: Matryoshka, see ``contrastive_loss``. Truncated embeddings are compared with the first components
        of the vectors; with a projection, with the whole vectors, by the first rows of its kernel.

    Returns:
      The sum over this device's rows of the mean over their texts, and "teacher_cosine": the sum of the mean cosines
      between embedding (projected) and vector, at full size.

    Raises:
      ConfigurationError: the widths differ without a projection, or the projection has another width.
    """
    b, n, E = embedding_bnE.shape
    T = target_bnT.shape[-1]
    width = E if projection is None else projection["bias"].shape[0]
    if width != T:
        raise ConfigurationError(
            f"the teacher's vectors have {T} components, the model's {E}: write config.loss.projection_dim="
            f"{0 if T == E else T}"
        )
    embedding_NE = embedding_bnE.astype(jnp.float32).reshape(b * n, E)
    target_NT = jax.lax.stop_gradient(target_bnT).astype(jnp.float32).reshape(b * n, T)

    def compared(dim: int) -> tuple[jax.Array, jax.Array]:
        own_Nd = first_components(embedding_NE, dim)
        if projection is None:
            return own_Nd, target_NT[:, :dim]
        product = jnp.matmul(own_Nd, projection["kernel"][:dim], precision=jax.lax.Precision.HIGHEST)
        return product + projection["bias"], target_NT

    def cosine(own: jax.Array, target: jax.Array) -> jax.Array:
        return jnp.sum(_unit(own) * _unit(target), axis=1)

    def infonce(own: jax.Array, target: jax.Array) -> jax.Array:
        assert hash_bn2 is not None
        own_bnT, target_bnT = (_unit(x).reshape(b, n, -1) for x in (own, target))
        terms = [
            contrastive_loss(
                own_bnT[:, i],
                target_bnT[:, i, None],
                hash_bn2[:, i],
                hash_bn2[:, i, None],
                temperature=temperature,
                axis_name=axis_name,
            )[0]
            for i in range(n)
        ]
        return jnp.sum(jnp.stack(terms))

    total = jnp.sum(jnp.zeros_like(embedding_NE[0]))
    for dim, weight in weights_of(E, dims, weights):
        own, target = compared(dim)
        if name == "embedding_infonce":
            total += weight * infonce(own, target) / n
            continue
        loss_N = jnp.mean((own - target) ** 2, axis=1) if name == "embedding_mse" else 1 - cosine(own, target)
        total += weight * jnp.sum(loss_N) / n
    return total, {"teacher_cosine": jnp.sum(jax.lax.stop_gradient(cosine(*compared(E)))) / n}


def _unit(x_NT: jax.Array) -> jax.Array:
    return x_NT * jax.lax.rsqrt(jnp.maximum(jnp.sum(x_NT**2, axis=1, keepdims=True), 1e-24))

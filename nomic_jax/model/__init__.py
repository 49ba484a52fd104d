"""The encoder. It uses jax and flax only; it does not handle meshes, files or the hub."""

from nomic_jax.model.config import EncoderConfig
from nomic_jax.model.encoder import abstract_encoder, encode, init_encoder
from nomic_jax.model.heads import (
    EmbeddingConfig,
    classifier_logits,
    embed,
    init_classifier,
    init_mlm_head,
    mlm_logits,
    mlm_transform,
    pool,
)

__all__ = [
    "EmbeddingConfig",
    "EncoderConfig",
    "abstract_encoder",
    "classifier_logits",
    "embed",
    "encode",
    "init_classifier",
    "init_encoder",
    "init_mlm_head",
    "mlm_logits",
    "mlm_transform",
    "pool",
]

"""The encoder: jax and flax only; it knows no mesh, no files and no hub."""

from nomic_jax.model.config import EncoderConfig
from nomic_jax.model.encoder import abstract_encoder, encode, init_encoder
from nomic_jax.model.heads import EmbeddingConfig, embed, init_mlm_head, mlm_logits, pool

__all__ = [
    "EmbeddingConfig",
    "EncoderConfig",
    "abstract_encoder",
    "embed",
    "encode",
    "init_encoder",
    "init_mlm_head",
    "mlm_logits",
    "pool",
]

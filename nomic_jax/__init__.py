"""Nomic Embed in JAX: train, convert and use long-context text embedders."""

from nomic_jax.embedder import Embedder
from nomic_jax.model import EmbeddingConfig, EncoderConfig, embed

__all__ = ["Embedder", "EmbeddingConfig", "EncoderConfig", "embed"]
__version__ = "0.1.0"

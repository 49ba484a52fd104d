"""Nomic Embed in JAX: train, convert and use long-context text embedders."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nomic_jax.embedder import Embedder
    from nomic_jax.model import EmbeddingConfig, EncoderConfig, embed

__all__ = ["Embedder", "EmbeddingConfig", "EncoderConfig", "embed"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Imported when first used: processes that prepare data need no jax, which takes seconds to import.
    if name == "Embedder":
        from nomic_jax.embedder import Embedder

        return Embedder
    if name in __all__:
        from nomic_jax import model

        return getattr(model, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

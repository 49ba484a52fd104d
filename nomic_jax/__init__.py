"""Nomic Embed in JAX: train, convert and use long-context text embedders."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nomic_jax.fitting.fit import fit
    from nomic_jax.fitting.run import Run
    from nomic_jax.inference.classifier import Classifier, CrossEncoder
    from nomic_jax.inference.embedder import Embedder
    from nomic_jax.inference.integrations import langchain_embeddings, llama_index_embedding, mteb_encoder
    from nomic_jax.inference.sentence_transformers.quantization import quantize_embeddings
    from nomic_jax.model import EmbeddingConfig, EncoderConfig, embed

__version__ = "0.2.0"
__all__ = [
    "Classifier",
    "CrossEncoder",
    "Embedder",
    "EmbeddingConfig",
    "EncoderConfig",
    "Run",
    "embed",
    "fit",
    "langchain_embeddings",
    "llama_index_embedding",
    "mteb_encoder",
    "quantize_embeddings",
]

_MODULES = {
    "Run": "nomic_jax.fitting.run",
    "fit": "nomic_jax.fitting.fit",
    "Classifier": "nomic_jax.inference.classifier",
    "CrossEncoder": "nomic_jax.inference.classifier",
    "Embedder": "nomic_jax.inference.embedder",
    "langchain_embeddings": "nomic_jax.inference.integrations",
    "llama_index_embedding": "nomic_jax.inference.integrations",
    "mteb_encoder": "nomic_jax.inference.integrations",
    "quantize_embeddings": "nomic_jax.inference.sentence_transformers.quantization",
    "EmbeddingConfig": "nomic_jax.model",
    "EncoderConfig": "nomic_jax.model",
    "embed": "nomic_jax.model",
}


def __getattr__(name: str) -> Any:
    # Modules are imported on first use: importing JAX takes seconds, and data preparation does not need it.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)

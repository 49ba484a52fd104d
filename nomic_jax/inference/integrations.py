"""An ``Embedder`` as what other libraries expect: an mteb encoder, LangChain's Embeddings, a LlamaIndex embedding.

Each library is imported only by the function that is named after it; ``pip install "nomic_jax[integrations]"`` brings
all three. The adapters hold no state of their own: they hand texts to the ``Embedder``, each with its prompt.
"""

import asyncio
import contextlib
import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from nomic_jax.evals.tasks.contract import PROMPTS
from nomic_jax.inference.embedder import Embedder

if TYPE_CHECKING:
    from langchain_core.embeddings import Embeddings
    from llama_index.core.embeddings import BaseEmbedding
    from mteb.models.abs_encoder import AbsEncoder
    from mteb.types import PromptType


def mteb_encoder(
    embedder: Embedder,
    name: str | None = None,
    *,
    normalize_embeddings: bool = True,
    unnormalized_types: Collection[str] = (),
    truncate_dim: int | None = None,
) -> "AbsEncoder":
    """A model for ``mteb.evaluate(model, tasks)``, mteb 2.

    A text gets the prompt that the model has under mteb's own names (task name, task type, "query" and "document");
    else, in a model with nomic's prompts, the one of ``nomic_jax.evals.tasks.contract.PROMPTS``; else none.

    Args:
      embedder: its prompts and ``max_length`` are those of the evaluation. The published scores are at 512 tokens:
        ``Embedder.from_pretrained(..., max_length=512)``.
      name: what mteb files the results under, "organisation/model"; "nomic_jax/embedder" if None, and "nomic_jax/" goes
        in front of a name without a "/".
      normalize_embeddings: see ``Embedder.encode``; the same for all tasks but those of the next argument.
      unnormalized_types: mteb's types of tasks whose embeddings are not normalised, not even where the model has a
        Normalize module. The published scores are without it for "Classification".
      truncate_dim: see ``Embedder.encode``.

    Raises:
      ModuleNotFoundError: mteb is not installed.
    """
    with _extra("mteb_encoder"):
        from mteb.models import ModelMeta
        from mteb.models.abs_encoder import AbsEncoder

    options = {"normalize_embeddings": normalize_embeddings, "truncate_dim": truncate_dim}
    identity = options | ({"unnormalized_types": sorted(unnormalized_types)} if unnormalized_types else {})
    raw = embedder.with_settings(normalize=False) if unnormalized_types else embedder
    theirs = {key: embedder.prompts[prompt] for key, prompt in PROMPTS.items() if prompt in embedder.prompts}
    prompts = theirs | embedder.prompts
    # mteb wants every field said, and None for what is not known: date, licence, training data and the like.
    unknown = {field: None for field, info in ModelMeta.model_fields.items() if info.is_required()}
    known = {
        "name": _full_name(name),
        "revision": _fingerprint(embedder, identity),
        "n_parameters": sum(leaf.size for leaf in jax.tree.leaves(embedder.params)),
        "max_tokens": embedder.max_length,
        "embed_dim": truncate_dim or embedder.config.output_dim,
        "framework": ["JAX"],
        "similarity_fn_name": "cosine",
        "use_instructions": any(prompts.values()),
    }

    class Encoder(AbsEncoder):
        model = embedder
        model_prompts = prompts
        mteb_model_meta = ModelMeta(**unknown | known)

        def encode(
            self,
            inputs: Iterable[Mapping[str, Any]],
            *,
            task_metadata: Any,
            hf_split: str,
            hf_subset: str,
            prompt_type: "PromptType | None" = None,
            **kwargs: Any,
        ) -> np.ndarray:
            """Embeddings, float32 [N, dim], of the "text" of batches; ``kwargs`` are options of ``Embedder.encode``."""
            texts = [text for batch in inputs for text in batch["text"]]
            key = self.get_prompt_name(task_metadata, prompt_type)
            is_raw = task_metadata.type in unnormalized_types
            source = raw if is_raw else embedder
            by_side = {"query": source.encode_query, "document": source.encode_document}
            encode = by_side.get(prompt_type or "", source.encode)
            given = options | ({"normalize_embeddings": False} if is_raw else {}) | kwargs
            return encode(texts, prompt=None if key is None else prompts[key], **given)

    return Encoder()


def langchain_embeddings(embedder: Embedder, **encode_options: Any) -> "Embeddings":
    """LangChain's Embeddings: documents with the prompt "document", queries with the prompt "query".

    Args:
      embedder: what computes.
      encode_options: options of ``Embedder.encode``, for every call: batch_size, truncate_dim, ...

    Raises:
      ModuleNotFoundError: langchain-core is not installed.
    """
    with _extra("langchain_embeddings"):
        from langchain_core.embeddings import Embeddings

    class NomicJaxEmbeddings(Embeddings):
        def embed_documents(self, texts: list[str]) -> list[list[float]]:
            return embedder.encode_document(texts, **encode_options).tolist()

        def embed_query(self, text: str) -> list[float]:
            return embedder.encode_query(text, **encode_options).tolist()

    return NomicJaxEmbeddings()


def llama_index_embedding(embedder: Embedder, name: str | None = None, **encode_options: Any) -> "BaseEmbedding":
    """LlamaIndex' BaseEmbedding: texts with the prompt "document", queries with the prompt "query".

    Args:
      embedder: what computes.
      name: start of ``model_name``, as in ``mteb_encoder``.
      encode_options: options of ``Embedder.encode``, for every call: batch_size, truncate_dim, ...

    Raises:
      ModuleNotFoundError: llama-index-core is not installed.
    """
    with _extra("llama_index_embedding"):
        from llama_index.core.embeddings import BaseEmbedding

    class NomicJaxEmbedding(BaseEmbedding):
        @classmethod
        def class_name(cls) -> str:
            return "NomicJaxEmbedding"

        def _get_query_embedding(self, query: str) -> list[float]:
            return embedder.encode_query(query, **encode_options).tolist()

        def _get_text_embedding(self, text: str) -> list[float]:
            return embedder.encode_document(text, **encode_options).tolist()

        def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
            return embedder.encode_document(texts, **encode_options).tolist()

        # In a thread, so that the event loop goes on meanwhile. LlamaIndex' own default of the last is text by text.
        async def _aget_query_embedding(self, query: str) -> list[float]:
            return await asyncio.to_thread(self._get_query_embedding, query)

        async def _aget_text_embedding(self, text: str) -> list[float]:
            return await asyncio.to_thread(self._get_text_embedding, text)

        async def _aget_text_embeddings(self, texts: list[str]) -> list[list[float]]:
            return await asyncio.to_thread(self._get_text_embeddings, texts)

    # The most LlamaIndex hands over at once: the Embedder makes its own batches, of texts of like length, and the more
    # texts it has to choose from, the less it pads.
    return NomicJaxEmbedding(
        model_name=f"{_full_name(name)}@{_fingerprint(embedder, encode_options)}", embed_batch_size=2048
    )


@contextlib.contextmanager
def _extra(function: str) -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{function} needs {error.name}, which is not installed: pip install 'nomic_jax[integrations]'",
            name=error.name,
        ) from error


def _full_name(name: str | None) -> str:
    name = name or "embedder"
    return name if "/" in name else f"nomic_jax/{name}"


def _fingerprint(embedder: Embedder, options: dict[str, Any]) -> str:
    """12 hex digits of all that decides a vector.

    mteb keeps scores by name and revision, LlamaIndex' ingestion keeps vectors by model_name: without this, the next
    checkpoint under the same name would be given those of the last.
    """
    settings = (embedder.identity, embedder.prompts, embedder.default_prompt_name, options)
    return hashlib.sha256(repr(settings).encode()).hexdigest()[:12]

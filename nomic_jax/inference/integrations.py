"""Adapters from ``Embedder`` to other libraries: an mteb encoder, LangChain's Embeddings, a LlamaIndex embedding.

Each library is imported only by the function named after it; ``pip install "nomic_jax[integrations]"`` installs all
three. The adapters have no state of their own: they pass texts to the ``Embedder``, each with its prompt.
"""

import asyncio
import hashlib
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from nomic_jax.data.prompts import find_prompt
from nomic_jax.evals.tasks.contract import PROMPTS
from nomic_jax.extras import needs
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
    normalize_embeddings: bool | None = None,
    unnormalized_types: Collection[str] = (),
    truncate_dim: int | None = None,
) -> "AbsEncoder":
    """Returns a model for ``mteb.evaluate(model, tasks)``, mteb 2.

    A text gets the model's prompt under mteb's own names (task name, task type, "query" and "document"). If there is
    none, it gets that of ``nomic_jax.evals.tasks.contract.PROMPTS``, by the rule of ``nomic_jax.data.prompts``.
    Otherwise it gets no prompt.

    Args:
      embedder: its prompts and ``max_length`` apply to the evaluation. The published scores are at 512 tokens:
        ``Embedder.from_pretrained(..., max_length=512)``.
      name: the name under which mteb stores the results, "organisation/model"; "nomic_jax/embedder" if None. A name
        without a "/" is prefixed with "nomic_jax/".
      normalize_embeddings: see ``Embedder.encode``; applies to all tasks except those of ``unnormalized_types``. None
        for True if the model's similarity, which mteb uses, is the cosine.
      unnormalized_types: mteb's task types whose embeddings are not normalised, even if the model has a Normalize
        module. The published scores for "Classification" are without normalisation.
      truncate_dim: see ``Embedder.encode``.

    Raises:
      MissingPackage: mteb is not installed.
    """
    with needs("mteb_encoder", "nomic_jax[integrations]"):
        from mteb.models import ModelMeta
        from mteb.models.abs_encoder import AbsEncoder

    if normalize_embeddings is None:
        normalize_embeddings = _normalizes(embedder)
    options = {"normalize_embeddings": normalize_embeddings, "truncate_dim": truncate_dim}
    identity: dict[str, Any] = options | ({} if _normalizes(embedder) else {"similarity": embedder.similarity_fn_name})
    identity |= {"unnormalized_types": sorted(unnormalized_types)} if unnormalized_types else {}
    raw = embedder.with_settings(normalize=False) if unnormalized_types else embedder
    found = {key: find_prompt(embedder.prompts, name) for key, name in PROMPTS.items()}
    theirs = {key: text for key, text in found.items() if text is not None}
    prompts = theirs | embedder.prompts
    # mteb requires every field; None stands for unknown values, such as date, licence and training data.
    unknown = {field: None for field, info in ModelMeta.model_fields.items() if info.is_required()}
    known = {
        "name": _full_name(name),
        "revision": _fingerprint(embedder, identity),
        "n_parameters": sum(leaf.size for leaf in jax.tree.leaves(embedder.params)),
        "max_tokens": embedder.max_length,
        "embed_dim": truncate_dim or embedder.config.output_dim,
        "framework": ["JAX"],
        "similarity_fn_name": embedder.similarity_fn_name,
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
            """Returns float32 [N, dim] for the "text" of batches; ``kwargs`` are options of ``Embedder.encode``."""
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
    """Returns LangChain's Embeddings: documents with the prompt "document", queries with the prompt "query".

    Args:
      embedder: computes the embeddings.
      encode_options: options of ``Embedder.encode``, for every call: batch_size, truncate_dim, ...; vectors have length
        1 if the model's similarity is the cosine, unless ``normalize_embeddings`` is given.

    Raises:
      MissingPackage: langchain-core is not installed.
    """
    with needs("langchain_embeddings", "nomic_jax[integrations]"):
        from langchain_core.embeddings import Embeddings

    encode_options = {"normalize_embeddings": _normalizes(embedder)} | encode_options

    class NomicJaxEmbeddings(Embeddings):
        def embed_documents(self, texts: list[str]) -> list[list[float]]:
            return embedder.encode_document(texts, **encode_options).tolist()

        def embed_query(self, text: str) -> list[float]:
            return embedder.encode_query(text, **encode_options).tolist()

    return NomicJaxEmbeddings()


def llama_index_embedding(embedder: Embedder, name: str | None = None, **encode_options: Any) -> "BaseEmbedding":
    """Returns LlamaIndex's BaseEmbedding: texts with the prompt "document", queries with the prompt "query".

    Args:
      embedder: computes the embeddings.
      name: start of ``model_name``, as in ``mteb_encoder``.
      encode_options: options of ``Embedder.encode``, for every call: batch_size, truncate_dim, ...; vectors have length
        1 if the model's similarity is the cosine, unless ``normalize_embeddings`` is given.

    Raises:
      MissingPackage: llama-index-core is not installed.
    """
    with needs("llama_index_embedding", "nomic_jax[integrations]"):
        from llama_index.core.embeddings import BaseEmbedding

    encode_options = {"normalize_embeddings": _normalizes(embedder)} | encode_options

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

        # These run in a thread and do not block the event loop. LlamaIndex's default of the last embeds text by text.
        async def _aget_query_embedding(self, query: str) -> list[float]:
            return await asyncio.to_thread(self._get_query_embedding, query)

        async def _aget_text_embedding(self, text: str) -> list[float]:
            return await asyncio.to_thread(self._get_text_embedding, text)

        async def _aget_text_embeddings(self, texts: list[str]) -> list[list[float]]:
            return await asyncio.to_thread(self._get_text_embeddings, texts)

    # LlamaIndex passes at most 2048 texts at once. The Embedder makes its own batches of texts of similar length; with
    # more texts to choose from, it pads less.
    return NomicJaxEmbedding(
        model_name=f"{_full_name(name)}@{_fingerprint(embedder, encode_options)}", embed_batch_size=2048
    )


def _normalizes(embedder: Embedder) -> bool:
    """Whether vectors are scaled to length 1. Vector stores compare by inner product or cosine alike."""
    return embedder.similarity_fn_name == "cosine"


def _full_name(name: str | None) -> str:
    name = name or "embedder"
    return name if "/" in name else f"nomic_jax/{name}"


def _fingerprint(embedder: Embedder, options: dict[str, Any]) -> str:
    """Returns 12 hex digits that identify everything that determines a vector.

    mteb stores scores by name and revision, and LlamaIndex's ingestion stores vectors by model_name. Without the
    fingerprint, a new checkpoint would get the stored results of an old one with the same name.
    """
    settings = (embedder.identity, embedder.prompts, embedder.default_prompt_name, options)
    return hashlib.sha256(repr(settings).encode()).hexdigest()[:12]

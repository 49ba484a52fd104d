"""Inference with an embedder: maps texts to vectors.

``embed`` (in nomic_jax.model) is the pure function of (params, batch). ``Embedder`` adds tokenizer, prompts, batching
and devices, with the names and semantics of sentence-transformers.
"""

import dataclasses
import functools
import hashlib
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from nomic_jax.data.prompts import prompt_for
from nomic_jax.data.tokens.tokenizer import Tokenizer
from nomic_jax.hf import NOMIC_PROMPTS, Checkpoint
from nomic_jax.inference.batches import Computation
from nomic_jax.inference.forks import check_not_forked
from nomic_jax.inference.inputs import TextInputs, as_texts, check_texts
from nomic_jax.inference.sentence_transformers.devices import find_devices
from nomic_jax.inference.sentence_transformers.methods import ReportedScores, SentenceTransformerMethods
from nomic_jax.inference.sentence_transformers.opening import (
    check_refused,
    configured,
    model_options,
    open_model,
    tokenizer_options,
)
from nomic_jax.inference.sentence_transformers.outputs import Output, check_options
from nomic_jax.inference.sentence_transformers.signatures import renamed, same_parameters
from nomic_jax.inference.similarity import SIMILARITIES
from nomic_jax.model import EmbeddingConfig


class Embedder(TextInputs, SentenceTransformerMethods):
    """A text embedder read from a checkpoint, with the methods of sentence-transformers' SentenceTransformer.

    Attributes can be set; a value that cannot be used is refused, and so is a name that does not exist. An embedder can
    be pickled, for example to pass it to a process that was spawned.

    Attributes:
      params: encoder parameters, on the devices; the first argument of ``nomic_jax.embed``.
      config: the encoder and its pooling; the last argument of ``nomic_jax.embed``.
      tokenizer: text -> token ids.
      prompts: name -> text prepended to an input; "query" and "document" are always there.
      default_prompt_name: the prompt of ``encode`` if none is named.
      similarity_fn_name: "cosine", "dot", "euclidean" or "manhattan".
      max_length: maximum number of tokens per text; longer texts are cut. ``max_seq_length`` is the same.
      truncate_dim: number of leading components that ``encode`` returns (Matryoshka); None for all.
    """

    def __init__(
        self,
        model_name_or_path: str | Path | None = None,
        *,
        modules: None = None,
        device: Any = None,
        prompts: Mapping[str, str] | None = None,
        default_prompt_name: str | None = None,
        cache_folder: str | Path | None = None,
        trust_remote_code: bool = False,
        revision: str | None = None,
        local_files_only: bool = False,
        token: bool | str | None = None,
        use_auth_token: bool | str | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        processor_kwargs: Mapping[str, Any] | None = None,
        config_kwargs: None = None,
        model_card_data: None = None,
        backend: str = "jax",
        similarity_fn_name: Any = None,
        truncate_dim: int | None = None,
        dtype: str | None = None,
        max_length: int | None = None,
        layer_norm: bool | None = None,
        attention: str = "auto",
        **unknown: Any,
    ):
        """Opens a checkpoint directory (``nomic_jax.hf.families``), a training run, or a model of the hub.

        Args:
          model_name_or_path: a Hugging Face directory, a run's working directory or one of its checkpoints, or a name
            on the hub such as "nomic-ai/nomic-embed-text-v1".
          device: "cpu", "cuda" (all GPUs), "cuda:1", "tpu", a JAX device or a list; None for JAX's default backend.
          prompts: name -> text, added to those of the model.
          default_prompt_name: the prompt of ``encode`` if none is named; None for the model's.
          revision: branch, tag or commit on the hub.
          cache_folder, local_files_only, token: see ``nomic_jax.hf.hub.download``.
          similarity_fn_name: None for the model's.
          truncate_dim: number of leading components to return (Matryoshka); None for the checkpoint's value.
          dtype: computation dtype, "float32", "bfloat16" or "float16"; None for bfloat16 on a GPU that has flash
            attention, float32 elsewhere (``nomic_jax.inference.precision``). Vectors are float32 in any case.
          max_length: maximum number of tokens per text; None for the checkpoint's value.
          layer_norm: LayerNorm between pooling and truncation; None for the checkpoint's value. The published directory
            of nomic-embed-text-v1.5 does not declare its LayerNorm. It is applied for the name on the hub; for a local
            copy, pass ``layer_norm=True``.
          attention: see ``nomic_jax.model.attention``.
          use_auth_token, model_kwargs, processor_kwargs, backend: names of sentence-transformers;
            docs/sentence_transformers.md says which values are taken.
          modules, trust_remote_code, config_kwargs, model_card_data: refused.

        Raises:
          CheckpointError, ConfigError: this encoder does not implement the checkpoint, or the checkpoint is invalid.
          FileNotFoundError: there is no such directory, and the hub has no such model or cannot be reached.
          TypeError, ValueError: an argument has no meaning here; the message says what to use instead.
        """
        check_not_forked()
        processor_kwargs = processor_kwargs or unknown.pop("tokenizer_kwargs", None)  # the old name
        refused = {"modules": modules, "config_kwargs": config_kwargs, "model_card_data": model_card_data}
        check_refused(backend, unknown, refused | {"trust_remote_code": trust_remote_code})
        given = model_options(model_kwargs) | tokenizer_options(processor_kwargs)
        checkpoint, card = open_model(
            model_name_or_path,
            revision=revision,
            token=use_auth_token if token is None else token,
            cache_folder=cache_folder,
            local_files_only=local_files_only,
        )
        checkpoint = configured(
            checkpoint,
            dtype=dtype or given.get("dtype"),
            max_length=max_length or given.get("max_length"),
            truncate_dim=truncate_dim,
            layer_norm=layer_norm,
            attention=attention,
            prompts=prompts,
            default_prompt_name=default_prompt_name,
            similarity=similarity_fn_name,
            device=device,
        )
        self._hold(checkpoint, device, card)

    def _hold(self, checkpoint: Checkpoint, device: Any = None, card: str | None = None) -> None:
        check_not_forked()
        if checkpoint.tokenizer is None:
            raise ValueError("the checkpoint has no tokenizer")
        self.config = checkpoint.config
        self.tokenizer = checkpoint.tokenizer
        own = NOMIC_PROMPTS if checkpoint.prompts is None else checkpoint.prompts
        self.prompts = own | {role: prompt_for(own, role) for role in ("query", "document")}
        self.default_prompt_name = checkpoint.default_prompt_name
        self.similarity_fn_name = checkpoint.similarity
        self.max_length = checkpoint.max_length or checkpoint.config.encoder.max_positions
        self.model_card_data = ReportedScores()
        # What an export of this model says, besides the attributes.
        self._source, self._card = dataclasses.replace(checkpoint, params={}), card
        self._put_on_devices(checkpoint.params["encoder"], find_devices(device))
        self._warned: set[str] = set()

    @classmethod
    def from_params(
        cls,
        params: dict,
        config: EmbeddingConfig,
        tokenizer: Tokenizer,
        *,
        prompts: Mapping[str, str] | None = None,
        default_prompt_name: str | None = None,
        similarity_fn_name: str = "cosine",
        max_length: int | None = None,
        device: Any = None,
    ) -> "Embedder":
        """Wraps encoder parameters. The other arguments are the attributes of the class, and ``device`` as above."""
        checkpoint = Checkpoint(
            config,
            {"encoder": params},
            tokenizer,
            prompts=dict(prompts or {}),
            default_prompt_name=default_prompt_name,
            similarity=similarity_fn_name,
            max_length=max_length,
        )
        embedder = cls.__new__(cls)
        embedder._hold(checkpoint, device)
        return embedder

    @classmethod
    def from_pretrained(cls, path_or_hub_id: str | Path, **options: Any) -> "Embedder":
        """Opens a model; the constructor does the same and describes the options."""
        return cls(path_or_hub_id, **options)

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        *,
        dtype: str | None = None,
        max_length: int | None = None,
        truncate_dim: int | None = None,
        layer_norm: bool | None = None,
        attention: str = "auto",
    ) -> "Embedder":
        """Wraps a model that has been read or is in training. The other arguments are those of the constructor."""
        embedder = cls.__new__(cls)
        embedder._hold(
            configured(
                checkpoint,
                dtype=dtype,
                max_length=max_length,
                truncate_dim=truncate_dim,
                layer_norm=layer_norm,
                attention=attention,
            )
        )
        return embedder

    def with_settings(self, *, max_length: int | None = None, normalize: bool | None = None) -> "Embedder":
        """Returns an embedder with the same weights (not copied) and other settings; None leaves one unchanged."""
        config = self.config if normalize is None else dataclasses.replace(self.config, normalize=normalize)
        embedder = Embedder.__new__(Embedder)
        vars(embedder).update(vars(self) | {"config": config, "prompts": dict(self.prompts), "_warned": set()})
        embedder.max_length = max_length or self.max_length
        return embedder

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "max_length":
            maximum = self.config.encoder.max_positions
            if not isinstance(value, int) or not 2 <= value <= maximum:
                raise ValueError(f"max_length {value!r} is not within 2..{maximum}")
        elif name == "default_prompt_name" and value is not None:
            self._prefix(value, None)
        elif name == "similarity_fn_name":
            value = getattr(value, "value", value) or "cosine"  # an enumeration's value; None is its default
            if value not in SIMILARITIES:
                raise ValueError(f"similarity {value!r}; write one of {', '.join(SIMILARITIES)}")
        elif name == "params":
            vars(self).pop("_weights_sha256", None)
        elif type(self) is Embedder and name not in _ATTRIBUTES and not hasattr(Embedder, name):
            known = ", ".join(sorted(known for known in _ATTRIBUTES if not known.startswith("_")))
            raise AttributeError(f"Embedder has no attribute {name!r} that can be set; it has {known}")
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        # Devices cannot be pickled. The receiving process puts the parameters on its own.
        return vars(self) | {"params": jax.tree.map(np.asarray, self.params), "_rows": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._put_on_devices(state["params"], find_devices(None))

    @property
    def dim(self) -> int:
        """The number of components of a vector."""
        return self.config.output_dim

    @property
    def truncate_dim(self) -> int | None:
        """The number of leading components that ``encode`` returns; None for all. It can be set."""
        return self.config.dim

    @truncate_dim.setter
    def truncate_dim(self, value: int | None) -> None:
        if value is not None:
            self._check_dim(value)
        self.config = dataclasses.replace(self.config, dim=value)

    @functools.cached_property
    def _weights_sha256(self) -> str:
        weights = hashlib.sha256()
        for leaf in jax.tree.leaves(self.params):
            weights.update(np.ascontiguousarray(leaf).data)
        return weights.hexdigest()

    @property
    def identity(self) -> dict[str, str | int]:
        """Everything that a vector depends on besides its text and prompt. It identifies stored vectors and scores."""
        return {
            "weights": self._weights_sha256,
            "configuration": repr(self.config),
            "tokenizer": self.tokenizer.sha256,
            "max_length": self.max_length,
        }

    @renamed(sentences="inputs")
    def encode(
        self,
        inputs: str | Iterable[str],
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        output_value: Literal["sentence_embedding", "token_embeddings"] | None = "sentence_embedding",
        precision: Literal["float32", "int8", "uint8", "binary", "ubinary"] | None = "float32",
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        device: Any = None,
        normalize_embeddings: bool = False,
        truncate_dim: int | None = None,
        pool: dict[str, Any] | None = None,
        chunk_size: int | None = None,
        **unknown: Any,
    ) -> Any:
        """Returns the embeddings of texts, float32 [N, dim], in the order of the texts; [dim] for a single string.

        A vector depends only on its text (and prompt), not on the other inputs.

        Args:
          inputs: a text or texts: a list, an array, a column of a table, a generator. Tokens beyond ``max_length`` are
            cut, with a warning.
          prompt_name: key of ``prompts``; its text is prepended to every input.
          prompt: a prefix, instead of a name.
          batch_size: maximum number of texts per batch, over all devices, where texts are padded. Packed texts (on a
            CPU, and on a GPU with flash attention of packed rows) are limited by their tokens instead.
          show_progress_bar: None shows one only if the work takes more than 3 seconds.
          output_value: "token_embeddings" returns the encoder's output for the tokens of each text, a list of float32
            [tokens, D]; None a list of dictionaries with input_ids, attention_mask and both kinds of embeddings.
          precision: see ``quantize_embeddings``. Ranges of int8 and uint8 are those of these embeddings.
          convert_to_numpy: False returns a list of torch tensors.
          convert_to_tensor: return a torch tensor; for token embeddings, a list of them.
          device: compute on these devices, and move the embedder there; a list is used for this call only.
          normalize_embeddings: scale to length 1, after truncation. False returns the output of the model's modules; if
            they include Normalize, this output has length 1 before truncation.
          truncate_dim: return the first components only; None for the attribute ``truncate_dim``.
          pool: of ``start_multi_process_pool``.
          chunk_size: number of texts that are sorted by length and computed together; None for all.

        Raises:
          TypeError: ``inputs`` is not iterable, or an input is not a string; the message names its index.
          ValueError: an input is not valid Unicode, an option is unknown or out of range, or int8 of a single text.
          ModuleNotFoundError: a tensor is asked for, and torch is not installed.
          RuntimeError: this process was forked after its parent had used JAX.
        """
        check_not_forked()
        check_options(output_value, precision, batch_size, chunk_size, unknown)
        texts, is_single = as_texts(inputs)
        dim = self.config.output_dim if truncate_dim is None else truncate_dim
        self._check_dim(dim)
        prefix = self._prefix(prompt_name, prompt)
        check_texts([prefix], "prompt")
        self._warn_of_prefixes(texts, prefix, is_chosen=prompt is not None or prompt_name is not None)
        ids, cut = self._tokenize(texts, prefix)
        if cut:
            warnings.warn(
                f"{cut} of {len(texts)} texts were longer than {self.max_length} tokens and were truncated",
                stacklevel=3,
            )
        params, rows = self._placement(device, pool)
        computation = Computation(
            params,
            dataclasses.replace(self.config, dim=None),
            rows,
            max_length=self.max_length,
            batch_size=batch_size,
            show_progress_bar=False if is_single else show_progress_bar,
            chunk_size=chunk_size,
        )
        output = Output(
            dim, normalize_embeddings, precision or "float32", convert_to_numpy, convert_to_tensor, self.device
        )
        if output_value == "sentence_embedding":
            found = output.vectors(computation.vectors(ids))
        elif output_value == "token_embeddings":
            found = output.tokens(computation.hidden_states(ids))
        else:
            found = output.features(ids, computation.hidden_states(ids), computation.vectors(ids))
        return found[0] if is_single else found

    @same_parameters(encode)
    def encode_query(
        self, inputs: Any, prompt_name: str | None = None, prompt: str | None = None, *rest: Any, **options: Any
    ) -> Any:
        """Calls ``encode`` with the query prompt, unless another one is given. Options are those of ``encode``."""
        return self.encode(inputs, *self._role_prompt("query", prompt_name, prompt), *rest, **options)

    @same_parameters(encode)
    def encode_document(
        self, inputs: Any, prompt_name: str | None = None, prompt: str | None = None, *rest: Any, **options: Any
    ) -> Any:
        """Calls ``encode`` with the document prompt, unless another one is given. Options are those of ``encode``."""
        return self.encode(inputs, *self._role_prompt("document", prompt_name, prompt), *rest, **options)

    def _check_dim(self, dim: int) -> None:
        if not isinstance(dim, int) or not 1 <= dim <= self.config.width:
            raise ValueError(f"truncate_dim {dim!r} is not within 1..{self.config.width}")


# What ``Embedder`` sets, besides its properties.
_ATTRIBUTES = {
    *("params", "config", "tokenizer", "prompts", "default_prompt_name", "similarity_fn_name", "max_length"),
    *("model_card_data", "_rows", "_warned", "_source", "_card"),
}

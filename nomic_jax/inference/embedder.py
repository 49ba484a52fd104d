"""Inference with an embedder: maps texts to vectors.

``embed`` (in nomic_jax.model) is the pure function of (params, batch). ``Embedder`` adds tokenizer, prompts, batching
and devices, with the names and semantics of sentence-transformers.
"""

import dataclasses
import functools
import hashlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from nomic_jax.data.prompts import prompt_for
from nomic_jax.data.tokens.tokenizer import Tokenizer, truncate
from nomic_jax.hf import NOMIC_PROMPTS, Checkpoint, read_checkpoint
from nomic_jax.hf.hub import download
from nomic_jax.inference.batches import encode_ids
from nomic_jax.inference.forks import check_not_forked
from nomic_jax.inference.inputs import as_texts, check_texts
from nomic_jax.inference.precision import computation_dtype
from nomic_jax.inference.similarity import SIMILARITIES
from nomic_jax.model import EmbeddingConfig
from nomic_jax.run.pretrained import read_pretrained


class Embedder:
    """A text embedder read from a checkpoint.

    Attributes can be set; a value that cannot be used is refused, and so is a name that does not exist. An embedder can
    be pickled, for example to pass it to a process that was spawned.

    Attributes:
      params: encoder parameters, on the devices; the first argument of ``nomic_jax.embed``.
      config: the encoder and its pooling; the last argument of ``nomic_jax.embed``.
      tokenizer: text -> token ids.
      prompts: name -> text prepended to an input.
      default_prompt_name: the prompt of ``encode`` if none is named.
      similarity_fn_name: "cosine", "dot", "euclidean" or "manhattan".
      max_length: maximum number of tokens per text; longer texts are cut. ``max_seq_length`` is the same.
      truncate_dim: number of leading components that ``encode`` returns (Matryoshka); None for all.
    """

    def __init__(
        self,
        params: dict,
        config: EmbeddingConfig,
        tokenizer: Tokenizer,
        *,
        prompts: dict[str, str] | None = None,
        default_prompt_name: str | None = None,
        similarity_fn_name: str = "cosine",
        max_length: int | None = None,
    ):
        self.config = config
        self.tokenizer = tokenizer
        self.prompts = dict(prompts or {})
        self.default_prompt_name = default_prompt_name
        self.similarity_fn_name = similarity_fn_name
        self.max_length = max_length or config.encoder.max_positions
        self._put_on_devices(params)
        self._warned: set[str] = set()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "max_length":
            maximum = self.config.encoder.max_positions
            if not isinstance(value, int) or not 2 <= value <= maximum:
                raise ValueError(f"max_length {value!r} is not within 2..{maximum}")
        elif name == "default_prompt_name" and value is not None:
            self._prefix(value, None)
        elif name == "similarity_fn_name" and value not in SIMILARITIES:
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
        self._put_on_devices(state["params"])

    def _put_on_devices(self, params: dict) -> None:
        check_not_forked()
        mesh = jax.make_mesh(
            (jax.local_device_count(),), ("data",), axis_types=(AxisType.Auto,), devices=jax.local_devices()
        )
        self._rows = NamedSharding(mesh, P("data"))
        self.params = jax.device_put(params, NamedSharding(mesh, P()))

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path,
        *,
        revision: str | None = None,
        dtype: str | None = None,
        max_length: int | None = None,
        truncate_dim: int | None = None,
        layer_norm: bool | None = None,
        attention: str = "auto",
    ) -> "Embedder":
        """Opens a checkpoint directory (nomic-bert or BERT family), a training run, or a model of the hub.

        Args:
          path_or_hub_id: a Hugging Face directory, a run's working directory or one of its checkpoints, or a name on
            the hub such as "nomic-ai/nomic-embed-text-v1".
          revision: branch, tag or commit on the hub.
          dtype: computation dtype, "float32", "bfloat16" or "float16"; None for bfloat16 on a GPU that has flash
            attention, float32 elsewhere (``nomic_jax.inference.precision``). Vectors are float32 in any case.
          max_length: maximum number of tokens per text; None for the checkpoint's value.
          truncate_dim: number of leading components to return (Matryoshka); None for the checkpoint's value.
          layer_norm: LayerNorm between pooling and truncation; None for the checkpoint's value. The published directory
            of nomic-embed-text-v1.5 does not declare its LayerNorm. It is applied for the name on the hub; for a local
            copy, pass ``layer_norm=True``.
          attention: see ``nomic_jax.model.attention``.

        Raises:
          CheckpointError, ConfigError: this encoder does not implement the checkpoint, or the checkpoint is invalid.
          FileNotFoundError: there is no such directory, and the hub has no such model or cannot be reached.
        """
        check_not_forked()
        directory = Path(path_or_hub_id)
        checkpoint = (
            read_pretrained(directory)
            if directory.is_dir()
            else read_checkpoint(download(str(path_or_hub_id), revision))
        )
        if checkpoint.tokenizer is None:
            raise FileNotFoundError(f"{path_or_hub_id} holds neither tokenizer.json nor vocab.txt")
        if layer_norm is None and str(path_or_hub_id) == "nomic-ai/nomic-embed-text-v1.5":
            layer_norm = True
        return cls.from_checkpoint(
            checkpoint,
            dtype=dtype,
            max_length=max_length,
            truncate_dim=truncate_dim,
            layer_norm=layer_norm,
            attention=attention,
        )

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
        """Wraps a model that has been read or is in training. The other arguments are those of ``from_pretrained``."""
        if checkpoint.tokenizer is None:
            raise ValueError("the checkpoint has no tokenizer")
        config = dataclasses.replace(
            checkpoint.config,
            encoder=dataclasses.replace(
                checkpoint.config.encoder, dtype=computation_dtype(dtype, attention), attention=attention
            ),
            layer_norm=checkpoint.config.layer_norm if layer_norm is None else layer_norm,
            dim=checkpoint.config.dim if truncate_dim is None else truncate_dim,
        )
        return cls(
            checkpoint.params["encoder"],
            config,
            checkpoint.tokenizer,
            prompts=NOMIC_PROMPTS if checkpoint.prompts is None else checkpoint.prompts,
            default_prompt_name=checkpoint.default_prompt_name,
            similarity_fn_name=checkpoint.similarity,
            max_length=max_length or checkpoint.max_length,
        )

    def with_settings(self, *, max_length: int | None = None, normalize: bool | None = None) -> "Embedder":
        """Returns an embedder with the same weights (not copied) and other settings; None leaves one unchanged."""
        config = self.config if normalize is None else dataclasses.replace(self.config, normalize=normalize)
        return Embedder(
            self.params,
            config,
            self.tokenizer,
            prompts=self.prompts,
            default_prompt_name=self.default_prompt_name,
            similarity_fn_name=self.similarity_fn_name,
            max_length=max_length or self.max_length,
        )

    @property
    def dim(self) -> int:
        """The number of components of a vector."""
        return self.config.output_dim

    @property
    def max_seq_length(self) -> int:
        """``max_length`` under the name of sentence-transformers. It can be set."""
        return self.max_length

    @max_seq_length.setter
    def max_seq_length(self, value: int) -> None:
        self.max_length = value

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

    def encode(
        self,
        inputs: str | Sequence[str],
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 64,
        show_progress_bar: bool | None = None,
        normalize_embeddings: bool = False,
        truncate_dim: int | None = None,
    ) -> np.ndarray:
        """Returns the embeddings of texts, float32 [N, dim], in the order of the texts; [dim] for a single string.

        A vector depends only on its text (and prompt), not on the other inputs.

        Args:
          inputs: a text or a sequence of texts. Tokens beyond ``max_length`` are cut, with a warning.
          prompt_name: key of ``prompts``; its text is prepended to every input.
          prompt: a prefix, instead of a name.
          batch_size: maximum number of texts per batch, over all devices; batches of long texts are smaller.
          show_progress_bar: None shows one only if the work takes more than 3 seconds.
          normalize_embeddings: scale to length 1, after truncation. False returns the output of the model's modules; if
            they include Normalize, this output has length 1 before truncation.
          truncate_dim: return the first components only; None for the attribute ``truncate_dim``.

        Raises:
          TypeError: ``inputs`` is not a sequence, or an input is not a string; the message names its index.
          ValueError: an input is not valid Unicode, a prompt name is unknown, or a dimension is out of range.
          RuntimeError: this process was forked after its parent had used JAX.
        """
        check_not_forked()
        is_single = isinstance(inputs, str)
        texts = as_texts([inputs] if isinstance(inputs, str) else inputs)
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        dim = self.config.output_dim if truncate_dim is None else truncate_dim
        self._check_dim(dim)
        prefix = self._prefix(prompt_name, prompt)
        check_texts([prefix], "prompt")
        self._warn_of_prefixes(texts, prefix, is_chosen=prompt is not None or prompt_name is not None)
        ids, cut = self._tokenize(texts, prefix)
        if cut:
            warnings.warn(
                f"{cut} of {len(texts)} texts were longer than {self.max_length} tokens and were truncated",
                stacklevel=2,
            )
        vectors = self._encode_ids(ids, batch_size, False if is_single else show_progress_bar)[:, :dim]
        if normalize_embeddings:
            vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        vectors = np.ascontiguousarray(vectors)
        return vectors[0] if is_single else vectors

    def encode_query(
        self, inputs: str | Sequence[str], prompt_name: str | None = None, prompt: str | None = None, **options
    ) -> np.ndarray:
        """Calls ``encode`` with the query prompt, unless another one is given. Options are those of ``encode``."""
        return self.encode(inputs, *self._role_prompt("query", prompt_name, prompt), **options)

    def encode_document(
        self, inputs: str | Sequence[str], prompt_name: str | None = None, prompt: str | None = None, **options
    ) -> np.ndarray:
        """Calls ``encode`` with the document prompt, unless another one is given. Options are those of ``encode``."""
        return self.encode(inputs, *self._role_prompt("document", prompt_name, prompt), **options)

    def similarity(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Returns similarities [len(a), len(b)] by ``similarity_fn_name``. Distances are negated: higher is closer."""
        return SIMILARITIES[self.similarity_fn_name](*(np.atleast_2d(np.asarray(x, np.float32)) for x in (a, b)))

    def _check_dim(self, dim: int) -> None:
        if not isinstance(dim, int) or not 1 <= dim <= self.config.encoder.hidden_size:
            raise ValueError(f"truncate_dim {dim!r} is not within 1..{self.config.encoder.hidden_size}")

    def _role_prompt(self, role: str, prompt_name: str | None, prompt: str | None) -> tuple[str | None, str | None]:
        """Returns (prompt_name, prompt) for ``encode``: the given one, else the role's, else none (not the default)."""
        if prompt_name is not None or prompt is not None:
            return prompt_name, prompt
        return None, prompt_for(self.prompts, role)

    def _prefix(self, prompt_name: str | None, prompt: str | None) -> str:
        if prompt is not None:
            return prompt
        name = self.default_prompt_name if prompt_name is None else prompt_name
        if name is None:
            return ""
        if name not in self.prompts:
            known = ", ".join(self.prompts) or "none"
            raise ValueError(f"unknown prompt_name {name!r}; this model's prompts are: {known}")
        return self.prompts[name]

    def _warn_of_prefixes(self, texts: list[str], prefix: str, is_chosen: bool) -> None:
        """Warns once about texts without the prefix that the model was trained with, and once about texts with two."""
        known = tuple(dict.fromkeys(text for text in self.prompts.values() if text.strip()))
        if not known:
            return
        carrying = next((i for i, text in enumerate(texts) if text.startswith(known)), None)
        if prefix and carrying is not None:
            self._warn_once(
                "two prefixes",
                f"input {carrying} already starts with a prefix, and {prefix!r} goes in front of it; give texts "
                f"without prefixes, or prompt=''",
            )
        elif not prefix and not is_chosen and not all(text.startswith(known) for text in texts):
            self._warn_once(
                "no prefix",
                f"this model was trained with a prefix on every text, such as {known[0]!r}; use encode_query and "
                f"encode_document, or a prompt_name: {', '.join(self.prompts)}",
            )

    def _warn_once(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(message, stacklevel=4)

    def _tokenize(self, texts: list[str], prefix: str) -> tuple[list[np.ndarray], int]:
        """Returns the token ids of each text, and the number of texts that were cut."""
        whole = self.tokenizer.encode([prefix + text for text in texts])
        cut = sum(len(ids) > self.max_length for ids in whole)
        return [truncate(ids, self.max_length, self.tokenizer.suffix) for ids in whole], cut

    def _encode_ids(self, ids: list[np.ndarray], batch_size: int, show_progress_bar: bool | None) -> np.ndarray:
        """Returns the output of the model's modules for token ids, at full width."""
        config = dataclasses.replace(self.config, dim=None)
        return encode_ids(self.params, ids, config, self._rows, self.max_length, batch_size, show_progress_bar)


# What ``Embedder`` sets, besides its properties.
_ATTRIBUTES = {
    *("params", "config", "tokenizer", "prompts", "default_prompt_name", "similarity_fn_name", "max_length"),
    *("_rows", "_warned"),
}

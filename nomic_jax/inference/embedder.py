"""Inference with an embedder: maps texts to vectors.

``embed`` (in nomic_jax.model) is the pure function of (params, batch). ``Embedder`` adds tokenizer, prompts, batching
and devices, with the names and semantics of sentence-transformers.
"""

import dataclasses
import functools
import hashlib
import os
import time
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from nomic_jax.data.batches.shapes import Shape, length_sorted_batches, pad_right
from nomic_jax.data.prompts import prompt_for
from nomic_jax.data.tokens.tokenizer import Tokenizer, check_unicode, truncate
from nomic_jax.hf import NOMIC_PROMPTS, Checkpoint, read_checkpoint
from nomic_jax.hf.hub import download
from nomic_jax.inference.call_size import texts_per_call
from nomic_jax.inference.similarity import SIMILARITIES
from nomic_jax.model import EmbeddingConfig, embed
from nomic_jax.run.pretrained import read_pretrained


class Embedder:
    """A text embedder read from a checkpoint.

    Attributes:
      params: encoder parameters, on the devices; the first argument of ``nomic_jax.embed``.
      config: the encoder and its pooling; the last argument of ``nomic_jax.embed``.
      tokenizer: text -> token ids.
      prompts: name -> text prepended to an input.
      default_prompt_name: the prompt of ``encode`` if none is named.
      similarity_fn_name: "cosine", "dot", "euclidean" or "manhattan".
      max_length: maximum number of tokens per text; longer texts are cut.
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
        if not 2 <= self.max_length <= config.encoder.max_positions:
            raise ValueError(f"max_length {max_length} is not within 2..{config.encoder.max_positions}")
        if default_prompt_name is not None:
            self._prefix(default_prompt_name, None)
        if similarity_fn_name not in SIMILARITIES:
            raise ValueError(f"similarity {similarity_fn_name!r}; write one of {', '.join(SIMILARITIES)}")
        mesh = jax.make_mesh(
            (jax.local_device_count(),), ("data",), axis_types=(AxisType.Auto,), devices=jax.local_devices()
        )
        self._rows = NamedSharding(mesh, P("data"))
        self.params = jax.device_put(params, NamedSharding(mesh, P()))
        self._warned: set[str] = set()

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
          dtype: computation dtype, "float32" (default), "bfloat16" or "float16".
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
        _use_compilation_cache()
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
                checkpoint.config.encoder, dtype=jnp.dtype(dtype or "float32").name, attention=attention
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

    @functools.cached_property
    def identity(self) -> dict[str, str | int]:
        """Everything that a vector depends on besides its text and prompt. It identifies stored vectors and scores."""
        weights = hashlib.sha256()
        for leaf in jax.tree.leaves(self.params):
            weights.update(np.ascontiguousarray(leaf).data)
        return {
            "weights": weights.hexdigest(),
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
        normalize_embeddings: bool = True,
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
          truncate_dim: return the first components only; None for ``config.dim``.

        Raises:
          TypeError: an input is not a string; the message names its index.
          ValueError: an input is not valid Unicode, a prompt name is unknown, or a dimension is out of range.
        """
        is_single = isinstance(inputs, str)
        texts = [inputs] if isinstance(inputs, str) else _as_list(inputs)
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        dim = self.config.output_dim if truncate_dim is None else truncate_dim
        if not 1 <= dim <= self.config.encoder.hidden_size:
            raise ValueError(f"truncate_dim {dim} is not within 1..{self.config.encoder.hidden_size}")
        _check_texts(texts)
        prefix = self._prefix(prompt_name, prompt)
        _check_texts([prefix], "prompt")
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
        out = np.zeros((len(ids), config.output_dim), np.float32)
        bar = tqdm(
            total=len(ids),
            desc="encoding",
            unit=" texts",
            # With this delay, tqdm shows no bar for short work.
            delay=3 if show_progress_bar is None else 0,
            disable=show_progress_bar is False,
        )

        def collect(rows: np.ndarray, embeddings: jax.Array) -> None:
            out[rows] = np.asarray(embeddings)[: len(rows)]
            bar.update(len(rows))

        in_flight: list[tuple[np.ndarray, jax.Array]] = []
        lengths = np.array([len(x) for x in ids], np.int32)
        for rows, shape in length_sorted_batches(
            lengths,
            max_length=self.max_length,
            batch_size=batch_size,
            texts_per_device=functools.partial(texts_per_call, config.encoder),
            devices=self._rows.mesh.size,
        ):
            # Filler rows have no tokens. Their outputs are discarded.
            batch = {"ids": np.zeros(shape, np.int32), "length": np.zeros(shape.rows, np.int32)}
            batch["ids"][: len(rows)] = pad_right([ids[row] for row in rows], shape.length, config.encoder.pad_token_id)
            batch["length"][: len(rows)] = lengths[rows]
            if (shape, config) not in _compiled:
                _describe(bar, f"compiling for {shape.rows} x {shape.length} tokens")
            in_flight.append((rows, _embed(self.params, jax.device_put(batch, self._rows), config)))
            _compiled.add((shape, config))
            bar.set_description_str("encoding", refresh=False)
            # Keep one batch in flight: the host prepares the next batch while the device computes.
            if len(in_flight) > 1:
                collect(*in_flight.pop(0))
        while in_flight:
            collect(*in_flight.pop(0))
        bar.close()
        return out


# Shapes and configurations compiled in this process. They are used only to report a compilation.
_compiled: set[tuple[Shape, EmbeddingConfig]] = set()


@functools.partial(jax.jit, static_argnums=2)
def _embed(params: dict, batch: dict, config: EmbeddingConfig) -> jax.Array:
    return embed(params, batch, config).astype(jnp.float32)


def _describe(bar: tqdm, text: str) -> None:
    """Sets the description of a bar. A visible bar is redrawn; tqdm alone would also show a bar before its delay."""
    if not bar.disable:
        bar.set_description_str(text, refresh=time.time() - bar.start_t >= bar.delay)


def _use_compilation_cache() -> None:
    """Stores compiled programs on disk for later processes, unless JAX's own settings say otherwise.

    (JAX_COMPILATION_CACHE_DIR names another directory, JAX_ENABLE_COMPILATION_CACHE=false disables the cache.)
    """
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(home / "nomic_jax" / "jax"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def _as_list(inputs: Iterable[str]) -> list[str]:
    # Iterating over a mapping or a set would give its keys, iterating over bytes would give numbers.
    if isinstance(inputs, (bytes, bytearray, dict, set)) or not isinstance(inputs, Iterable):
        raise TypeError(f"inputs is {type(inputs).__name__}, expected a string or a sequence of strings")
    return list(inputs)


def _check_texts(texts: list[str], what: str = "input") -> None:
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"{what} {i} is {type(text).__name__}, expected a string")
        check_unicode(text, what, i)

"""The inference function: texts in, vectors out.

``embed`` (in nomic_jax.model) is the pure function of (params, batch); ``Embedder`` puts tokenizer, prompts, batching
and devices around it, with the names and meanings of sentence-transformers.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from nomic_jax.data.batching import pad_right, padded_length
from nomic_jax.data.tokenizer import Tokenizer
from nomic_jax.hf import read_checkpoint
from nomic_jax.model import EmbeddingConfig, embed

TEXTS_PER_TOKENIZER_CALL = 8192


class Embedder:
    """A text embedder read from a checkpoint.

    Attributes:
      params: encoder parameters, on the devices; the first argument of ``nomic_jax.embed``.
      config: the encoder and its pooling; the last argument of ``nomic_jax.embed``.
      prompts: name -> text put in front of an input.
      max_length: tokens kept of a text.
    """

    def __init__(
        self,
        params: dict,
        config: EmbeddingConfig,
        tokenizer: Tokenizer,
        *,
        prompts: dict[str, str] | None = None,
        max_length: int | None = None,
    ):
        self.config = config
        self.tokenizer = tokenizer
        self.prompts = dict(prompts or {})
        self.max_length = max_length or config.encoder.max_positions
        if not 2 <= self.max_length <= config.encoder.max_positions:
            raise ValueError(f"max_length {max_length} is not within 2..{config.encoder.max_positions}")
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
        attention: str = "auto",
    ) -> "Embedder":
        """Opens a checkpoint directory (nomic-bert or BERT family), or downloads one of the hub.

        Args:
          path_or_hub_id: a directory, or a name such as "nomic-ai/nomic-embed-text-v1".
          revision: branch, tag or commit on the hub.
          dtype: computation dtype, "float32" (default) or "bfloat16".
          max_length: tokens kept of a text; None for what the checkpoint says.
          attention: see ``nomic_jax.model.attention``.

        Raises:
          CheckpointError, ConfigError: the checkpoint is not what this encoder implements.
          FileNotFoundError: no such directory, and the hub has none of that name or cannot be reached.
        """
        directory = Path(path_or_hub_id)
        if not directory.is_dir():
            directory = _download(str(path_or_hub_id), revision)
        checkpoint = read_checkpoint(directory)
        if checkpoint.tokenizer is None:
            raise FileNotFoundError(f"{directory} holds neither tokenizer.json nor vocab.txt")
        encoder = dataclasses.replace(checkpoint.config.encoder, dtype=dtype or "float32", attention=attention)
        return cls(
            checkpoint.params,
            dataclasses.replace(checkpoint.config, encoder=encoder),
            checkpoint.tokenizer,
            prompts=checkpoint.prompts,
            max_length=max_length or checkpoint.max_length,
        )

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
        """Embeddings of texts, float32 [N, dim], in their order; of a single string, [dim].

        Args:
          inputs: a text or a list of texts. Those beyond ``max_length`` tokens are cut.
          prompt_name: key of ``prompts``; its text goes in front of every input.
          prompt: a prefix given directly, instead of a name.
          batch_size: texts computed together, over all devices.
          show_progress_bar: None shows one for more than a few seconds' work.
          normalize_embeddings: scale to length 1 (after truncation).
          truncate_dim: keep the first components only.

        Raises:
          TypeError: an input that is not a string; the message names its index.
          ValueError: an unknown prompt name.
        """
        if isinstance(inputs, str):
            return self.encode([inputs], prompt_name, prompt, 1, False, normalize_embeddings, truncate_dim)[0]
        prefix = self._prefix(prompt_name, prompt)
        for i, text in enumerate(inputs):
            if not isinstance(text, str):
                raise TypeError(f"input {i} is {type(text).__name__}, expected a string")
        config = dataclasses.replace(self.config, dim=truncate_dim or self.config.dim, normalize=normalize_embeddings)
        ids = []
        for start in range(0, len(inputs), TEXTS_PER_TOKENIZER_CALL):
            texts = [prefix + text for text in inputs[start : start + TEXTS_PER_TOKENIZER_CALL]]
            ids += self.tokenizer.encode(texts, self.max_length)
        return self._encode_ids(ids, config, batch_size, show_progress_bar)

    def encode_query(self, inputs: str | Sequence[str], **kwargs) -> np.ndarray:
        """``encode`` with the prompt named "query", if there is one."""
        return self.encode(inputs, **self._role_prompt("query", kwargs))

    def encode_document(self, inputs: str | Sequence[str], **kwargs) -> np.ndarray:
        """``encode`` with the prompt named "document", if there is one."""
        return self.encode(inputs, **self._role_prompt("document", kwargs))

    def similarity(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Cosine similarities [len(a), len(b)]."""
        a, b = (x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12) for x in (a, b))
        return a @ b.T

    def _role_prompt(self, role: str, kwargs: dict) -> dict:
        given = kwargs.get("prompt") is not None or kwargs.get("prompt_name") is not None
        return kwargs if given or role not in self.prompts else kwargs | {"prompt_name": role}

    def _prefix(self, prompt_name: str | None, prompt: str | None) -> str:
        if prompt is not None or prompt_name is None:
            return prompt or ""
        if prompt_name not in self.prompts:
            known = ", ".join(self.prompts) or "none"
            raise ValueError(f"unknown prompt_name {prompt_name!r}; this model's prompts are: {known}")
        return self.prompts[prompt_name]

    def _encode_ids(
        self, ids: list[np.ndarray], config: EmbeddingConfig, batch_size: int, show_progress_bar: bool | None
    ) -> np.ndarray:
        out = np.zeros((len(ids), config.output_dim), np.float32)
        # Longest first: neighbours have similar lengths, and memory runs out at once if it does.
        order = np.argsort([-len(x) for x in ids], kind="stable")
        devices = self._rows.mesh.size
        bar = tqdm(
            total=len(ids),
            desc="encoding",
            unit=" texts",
            # tqdm's delay keeps short work silent.
            delay=3 if show_progress_bar is None else 0,
            disable=show_progress_bar is False,
        )
        pending: list[tuple[np.ndarray, jax.Array]] = []
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            length = padded_length(len(ids[rows[0]]), self.max_length)
            batch_ids = pad_right([ids[row] for row in rows], length, config.encoder.pad_token_id)
            lengths = np.array([len(ids[row]) for row in rows], np.int32)
            # A last batch is filled up to a power of two, so that few shapes are ever compiled.
            size = min(batch_size, 1 << (len(rows) - 1).bit_length())
            missing = -(-size // devices) * devices - len(rows)
            batch = {"ids": np.pad(batch_ids, ((0, missing), (0, 0))), "length": np.pad(lengths, (0, missing))}
            pending.append((rows, _embed(self.params, jax.device_put(batch, self._rows), config)))
            # One batch in flight: the host prepares the next one while the device computes.
            if len(pending) > 1:
                _collect(pending.pop(0), out, bar)
        while pending:
            _collect(pending.pop(0), out, bar)
        bar.close()
        return out


@functools.partial(jax.jit, static_argnums=2)
def _embed(params: dict, batch: dict, config: EmbeddingConfig) -> jax.Array:
    return embed(params, batch, config).astype(jnp.float32)


def _collect(done: tuple[np.ndarray, jax.Array], out: np.ndarray, bar: tqdm) -> None:
    rows, embeddings = done
    out[rows] = np.asarray(embeddings)[: len(rows)]
    bar.update(len(rows))


def _download(hub_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["*.json", "*.safetensors", "vocab.txt"]
    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"{hub_id} is neither a directory nor could it be fetched from the hub ({type(error).__name__}: {error})"
        ) from error

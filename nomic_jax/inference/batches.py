"""Computes the vectors of token ids in batches of similar length, over the devices."""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from tqdm import tqdm

from nomic_jax.data.batches.shapes import Shape, length_sorted_batches, pad_right
from nomic_jax.inference.call_size import texts_per_call
from nomic_jax.model import EmbeddingConfig, EncoderConfig, embed, encode

# Functions, shapes and configurations compiled in this process. They are used only to report a compilation.
_compiled: set[tuple[Callable, Shape, EmbeddingConfig]] = set()


@functools.partial(jax.jit, static_argnums=2)
def _embed(params: dict, batch: dict, config: EmbeddingConfig) -> jax.Array:
    return embed(params, batch, config).astype(jnp.float32)


@functools.partial(jax.jit, static_argnums=2)
def _hidden_states(params: dict, batch: dict, config: EmbeddingConfig) -> jax.Array:
    return encode(params, batch["ids"], config.encoder, length_B=batch["length"]).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Computation:
    """How token ids are computed.

    Attributes:
      params: the encoder's, on the devices of ``sharding``.
      sharding: how the rows of a batch are divided among the devices.
      max_length: the maximum number of tokens per text.
      batch_size: maximum number of texts per batch, over all devices.
      show_progress_bar: None shows one only if the work takes more than 3 seconds.
      chunk_size: number of texts that are sorted by length together; None for all.
    """

    params: dict
    config: EmbeddingConfig
    sharding: NamedSharding
    max_length: int
    batch_size: int
    show_progress_bar: bool | None
    chunk_size: int | None = None

    def vectors(self, ids: list[np.ndarray]) -> np.ndarray:
        """Returns the output of the model's modules, float32 [N, ``config.output_dim``], in the order of ``ids``."""
        out = np.zeros((len(ids), self.config.output_dim), np.float32)
        for rows, vectors in self._batches(ids, _embed):
            out[rows] = vectors[: len(rows)]
        return out

    def hidden_states(self, ids: list[np.ndarray]) -> list[np.ndarray]:
        """Returns the encoder's output for the tokens of each text, float32 [tokens, D], in the order of ``ids``."""
        out = [np.zeros(0, np.float32)] * len(ids)
        for rows, hidden_BLD in self._batches(ids, _hidden_states):
            for row, hidden_LD in zip(rows, hidden_BLD):
                out[row] = hidden_LD[: len(ids[row])].copy()
        return out

    def _batches(self, ids: list[np.ndarray], function: Callable) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields (indices of texts, what ``function`` returns for them and for filler rows after them)."""
        encoder = _for_platform(self.config.encoder, self.sharding)
        config = dataclasses.replace(self.config, encoder=encoder)
        platform = self.sharding.mesh.devices.flat[0].platform
        lengths = np.array([len(x) for x in ids], np.int32)
        bar = tqdm(
            total=len(ids),
            desc="encoding",
            unit=" texts",
            # With this delay, tqdm shows no bar for short work.
            delay=3 if self.show_progress_bar is None else 0,
            disable=self.show_progress_bar is False,
        )
        in_flight: list[tuple[np.ndarray, jax.Array]] = []
        for start in range(0, len(ids), self.chunk_size or max(1, len(ids))):
            for rows, shape in length_sorted_batches(
                lengths[start : start + (self.chunk_size or len(ids))],
                max_length=self.max_length,
                batch_size=self.batch_size,
                texts_per_device=functools.partial(texts_per_call, encoder, platform=platform),
                devices=self.sharding.mesh.size,
            ):
                rows = rows + start
                # Filler rows have no tokens. Their outputs are discarded.
                batch = {"ids": np.zeros(shape, np.int32), "length": np.zeros(shape.rows, np.int32)}
                batch["ids"][: len(rows)] = pad_right([ids[row] for row in rows], shape.length, encoder.pad_token_id)
                batch["length"][: len(rows)] = lengths[rows]
                if (function, shape, config) not in _compiled:
                    _describe(bar, f"compiling for {shape.rows} x {shape.length} tokens")
                in_flight.append((rows, function(self.params, jax.device_put(batch, self.sharding), config)))
                _compiled.add((function, shape, config))
                bar.set_description_str("encoding", refresh=False)
                # Keep one batch in flight: the host prepares the next batch while the device computes.
                if len(in_flight) > 1:
                    yield _collected(*in_flight.pop(0), bar)
        while in_flight:
            yield _collected(*in_flight.pop(0), bar)
        bar.close()


def _for_platform(encoder: EncoderConfig, sharding: NamedSharding) -> EncoderConfig:
    """Chooses the attention of devices that are not of JAX's default backend, which is what "auto" goes by."""
    platform = sharding.mesh.devices.flat[0].platform
    if encoder.attention != "auto" or platform == jax.default_backend():
        return encoder
    return dataclasses.replace(encoder, attention="cpu" if platform == "cpu" else "xla")


def _collected(rows: np.ndarray, outputs: jax.Array, bar: tqdm) -> tuple[np.ndarray, np.ndarray]:
    collected = rows, np.asarray(outputs)
    bar.update(len(rows))
    return collected


def _describe(bar: tqdm, text: str) -> None:
    """Sets the description of a bar. A visible bar is redrawn; tqdm alone would also show a bar before its delay."""
    if not bar.disable:
        bar.set_description_str(text, refresh=time.time() - bar.start_t >= bar.delay)

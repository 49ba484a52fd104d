"""Computes the vectors of token ids in batches, over the devices: texts packed in rows, or padded and sorted by length.

Packed texts are computed without padding and in few shapes. ``call_size`` says on which devices they are.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from nomic_jax.cpu import compiler_options, keep_work_space
from nomic_jax.data.batches.calls import max_segments, packed_calls
from nomic_jax.data.batches.shapes import Shape, length_sorted_batches, pad_right
from nomic_jax.inference.call_size import packed_attention, packing, rows_per_call, texts_per_call
from nomic_jax.model import EmbeddingConfig, EncoderConfig, embed, encode
from nomic_jax.model.heads import pool_segments

# Programs and shapes compiled in this process. They are used only to report a compilation.
_compiled: set[tuple[Callable, Shape]] = set()


class _Batch(NamedTuple):
    """Arrays of a call, and where its outputs belong.

    Attributes:
      texts: indices of the texts.
      row, segment, offset: where each text is; see ``Call``. A padded text has a row of its own.
    """

    texts: np.ndarray
    row: np.ndarray
    segment: np.ndarray
    offset: np.ndarray
    arrays: dict[str, np.ndarray]


@functools.lru_cache
def _program(output: str, config: EmbeddingConfig, segments: int | None, sharding: NamedSharding) -> Callable:
    """Returns the function of (params, arrays of a batch) that computes vectors or hidden states, float32.

    Args:
      output: "vectors", [B, E] or for packed rows [B, segments, E]; or "hidden_states", [B, L, D].
      segments: maximum number of texts in a packed row; None for padded texts.
    """

    def compute(params: dict, arrays: dict) -> jax.Array:
        if segments is None:
            if output == "vectors":
                return embed(params, arrays, config).astype(jnp.float32)
            return encode(params, arrays["ids"], config.encoder, length_B=arrays["length"]).astype(jnp.float32)
        hidden_BLD = encode(params, arrays["ids"], config.encoder, segment_BL=arrays["segment"], max_segments=segments)
        if output == "vectors":
            return pool_segments(hidden_BLD, arrays["segment"], segments, config, params).astype(jnp.float32)
        return hidden_BLD.astype(jnp.float32)

    if sharding.mesh.size > 1:
        # XLA cannot divide attention of packed rows, nor kernels of our own, among devices.
        compute = jax.shard_map(
            compute, mesh=sharding.mesh, in_specs=(P(), sharding.spec), out_specs=sharding.spec, check_vma=False
        )
    platform = sharding.mesh.devices.flat[0].platform
    return jax.jit(compute, compiler_options=compiler_options(platform))


@dataclasses.dataclass(frozen=True)
class Computation:
    """How token ids are computed.

    Attributes:
      params: the encoder's, on the devices of ``sharding``.
      sharding: how the rows of a batch are divided among the devices.
      max_length: the maximum number of tokens per text.
      batch_size: maximum number of padded texts per batch, over all devices. Packed rows are limited by their tokens.
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
        for batch, vectors in self._computed(ids, "vectors"):
            out[batch.texts] = vectors[batch.row] if vectors.ndim == 2 else vectors[batch.row, batch.segment]
        return out

    def hidden_states(self, ids: list[np.ndarray]) -> list[np.ndarray]:
        """Returns the encoder's output for the tokens of each text, float32 [tokens, D], in the order of ``ids``."""
        out = [np.zeros((0, self.config.encoder.hidden_size), np.float32)] * len(ids)
        for batch, hidden_BLD in self._computed(ids, "hidden_states"):
            for text, row, offset in zip(batch.texts, batch.row, batch.offset):
                out[text] = hidden_BLD[row, offset : offset + len(ids[text])].copy()
        return out

    def _computed(self, ids: list[np.ndarray], output: str) -> Iterator[tuple[_Batch, np.ndarray]]:
        """Yields every batch with what ``_program`` computes of it."""
        if self._platform == "cpu":
            keep_work_space()
        bar = tqdm(
            total=len(ids),
            desc="encoding",
            unit=" texts",
            # With this delay, tqdm shows no bar for short work.
            delay=3 if self.show_progress_bar is None else 0,
            disable=self.show_progress_bar is False,
        )
        in_flight: list[tuple[_Batch, jax.Array]] = []
        for batch, config, segments in self._batches(ids):
            shape = Shape(*batch.arrays["ids"].shape)
            program = _program(output, config, segments, self.sharding)
            if (program, shape) not in _compiled:
                _describe(bar, f"compiling for {shape.rows} x {shape.length} tokens")
            in_flight.append((batch, program(self.params, jax.device_put(batch.arrays, self.sharding))))
            _compiled.add((program, shape))
            bar.set_description_str("encoding", refresh=False)
            # Keep one batch in flight: the host prepares the next batch while the device computes.
            if len(in_flight) > 1:
                yield _collected(*in_flight.pop(0), bar)
        while in_flight:
            yield _collected(*in_flight.pop(0), bar)
        bar.close()

    @property
    def _platform(self) -> str:
        return self.sharding.mesh.devices.flat[0].platform

    def _batches(self, ids: list[np.ndarray]) -> Iterator[tuple[_Batch, EmbeddingConfig, int | None]]:
        """Yields batches, packed or padded, with the configuration and the number of segments for ``_program``."""
        packed = packing(self.config.encoder, self._platform)
        lengths = np.array([len(x) for x in ids], np.int32)
        # A text without tokens has the zero vector.
        texts = np.flatnonzero(lengths)
        for start in range(0, len(texts), self.chunk_size or max(1, len(texts))):
            chunk = texts[start : start + (self.chunk_size or len(texts))]
            if packed is None:
                encoder = _for_platform(self.config.encoder, self.sharding)
                for batch in self._padded(ids, chunk, lengths[chunk], encoder):
                    yield batch, dataclasses.replace(self.config, encoder=encoder), None
                continue
            for call in packed_calls(
                lengths[chunk],
                **dataclasses.asdict(packed),
                rows_per_device=lambda length: rows_per_call(length, self.config.encoder, self._platform),
                devices=self.sharding.mesh.size,
            ):
                call = call._replace(texts=chunk[call.texts])
                attention = packed_attention(call.shape.length, self._platform)
                encoder = dataclasses.replace(_for_platform(self.config.encoder, self.sharding), attention=attention)
                batch = _Batch(call.texts, call.row, call.segment, call.offset, call.fill(ids, encoder.pad_token_id))
                yield batch, dataclasses.replace(self.config, encoder=encoder), max_segments(call.shape.length)

    def _padded(
        self, ids: list[np.ndarray], texts: np.ndarray, lengths: np.ndarray, encoder: EncoderConfig
    ) -> Iterator[_Batch]:
        for chosen, shape in length_sorted_batches(
            lengths,
            max_length=self.max_length,
            batch_size=self.batch_size,
            texts_per_device=functools.partial(texts_per_call, encoder, platform=self._platform),
            devices=self.sharding.mesh.size,
        ):
            rows = np.arange(len(chosen))
            # Filler rows have no tokens. Their outputs are discarded.
            arrays = {"ids": np.zeros(shape, np.int32), "length": np.zeros(shape.rows, np.int32)}
            arrays["ids"][rows] = pad_right([ids[text] for text in texts[chosen]], shape.length, encoder.pad_token_id)
            arrays["length"][rows] = lengths[chosen]
            yield _Batch(texts[chosen], rows, np.zeros_like(rows), np.zeros_like(rows), arrays)


def _for_platform(encoder: EncoderConfig, sharding: NamedSharding) -> EncoderConfig:
    """Chooses what computes on devices that are not of JAX's default backend, which is what "auto" goes by."""
    platform = sharding.mesh.devices.flat[0].platform
    if platform == jax.default_backend():
        return encoder
    attention = encoder.attention if encoder.attention != "auto" else "cpu" if platform == "cpu" else "xla"
    return dataclasses.replace(encoder, attention=attention, norm_kernel="xla")


def _collected(batch: _Batch, outputs: jax.Array, bar: tqdm) -> tuple[_Batch, np.ndarray]:
    collected = batch, np.asarray(outputs)
    bar.update(len(batch.texts))
    return collected


def _describe(bar: tqdm, text: str) -> None:
    """Sets the description of a bar. A visible bar is redrawn; tqdm alone would also show a bar before its delay."""
    if not bar.disable:
        bar.set_description_str(text, refresh=time.time() - bar.start_t >= bar.delay)

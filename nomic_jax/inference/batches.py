"""Computes the vectors of token ids in batches of similar length, over the devices."""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from tqdm import tqdm

from nomic_jax.data.batches.shapes import Shape, length_sorted_batches, pad_right
from nomic_jax.inference.call_size import texts_per_call
from nomic_jax.model import EmbeddingConfig, embed

# Shapes and configurations compiled in this process. They are used only to report a compilation.
_compiled: set[tuple[Shape, EmbeddingConfig]] = set()


@functools.partial(jax.jit, static_argnums=2)
def _embed(params: dict, batch: dict, config: EmbeddingConfig) -> jax.Array:
    return embed(params, batch, config).astype(jnp.float32)


def encode_ids(
    params: dict,
    ids: list[np.ndarray],
    config: EmbeddingConfig,
    sharding: NamedSharding,
    max_length: int,
    batch_size: int,
    show_progress_bar: bool | None,
) -> np.ndarray:
    """Returns the output of the model's modules, float32 [N, ``config.output_dim``], in the order of ``ids``.

    Args:
      params: the encoder's, on the devices of ``sharding``.
      ids: the token ids of each text, at most ``max_length``.
      sharding: how the rows of a batch are divided among the devices.
      batch_size: maximum number of texts per batch, over all devices.
      show_progress_bar: None shows one only if the work takes more than 3 seconds.
    """
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
        max_length=max_length,
        batch_size=batch_size,
        texts_per_device=functools.partial(texts_per_call, config.encoder),
        devices=sharding.mesh.size,
    ):
        # Filler rows have no tokens. Their outputs are discarded.
        batch = {"ids": np.zeros(shape, np.int32), "length": np.zeros(shape.rows, np.int32)}
        batch["ids"][: len(rows)] = pad_right([ids[row] for row in rows], shape.length, config.encoder.pad_token_id)
        batch["length"][: len(rows)] = lengths[rows]
        if (shape, config) not in _compiled:
            _describe(bar, f"compiling for {shape.rows} x {shape.length} tokens")
        in_flight.append((rows, _embed(params, jax.device_put(batch, sharding), config)))
        _compiled.add((shape, config))
        bar.set_description_str("encoding", refresh=False)
        # Keep one batch in flight: the host prepares the next batch while the device computes.
        if len(in_flight) > 1:
            collect(*in_flight.pop(0))
    while in_flight:
        collect(*in_flight.pop(0))
    bar.close()
    return out


def _describe(bar: tqdm, text: str) -> None:
    """Sets the description of a bar. A visible bar is redrawn; tqdm alone would also show a bar before its delay."""
    if not bar.disable:
        bar.set_description_str(text, refresh=time.time() - bar.start_t >= bar.delay)

"""The inference part of benchmarks.gpu in nomic_jax. Each function runs in a separate process and yields table rows."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.loads import text_ids
from benchmarks.made_up import made_up_texts
from benchmarks.steps import peak_gigabytes
from benchmarks.timing import median_seconds, timed
from nomic_jax import Embedder, embed
from nomic_jax.train.watch.flops import peak_flops

Row = dict[str, Any]


def batch_of(tokens: int, length: int) -> np.ndarray:
    """Token ids [texts, length] with ``tokens`` tokens in all and no padding."""
    return np.stack(text_ids(np.random.default_rng(0), np.full(max(1, tokens // length), length)))


def text_lengths(texts: int, length: int) -> np.ndarray:
    """The number of tokens of each text, between half of ``length`` and ``length``."""
    return np.random.default_rng(0).integers(max(3, length // 2), length + 1, texts)


def program(
    weights: str, lengths: list[int], tokens: int, seconds: float = 2.0, row: Row | None = None
) -> Iterator[Row]:
    """Runs ``nomic_jax.embed`` jitted, as in ``Embedder``, on batches of ``tokens`` tokens; saves the embeddings.

    With ``row``, whose fields replace those of each row, this is a variant: the embeddings are not saved.
    """
    embedder = Embedder.from_pretrained(Path(weights), dtype="bfloat16")
    encoder = embedder.config.encoder
    compiled = jax.jit(embed, static_argnums=2)
    peak = peak_flops(jax.devices()[0].device_kind)
    for length in lengths:
        ids = batch_of(tokens, length)
        batch = jax.device_put({"ids": ids, "length": np.full(len(ids), length, np.int32)})
        compiling, program = timed(compiled.lower(embedder.params, batch, embedder.config).compile)
        vectors = np.asarray(program(embedder.params, batch))
        if row is None:
            np.save(Path(weights) / f"vectors-{length}.npy", vectors)
        taken = median_seconds(lambda: np.asarray(program(embedder.params, batch)), 5, seconds)  # noqa: B023
        rate = ids.size / taken
        yield {
            "key": f"inference-{length}",
            "name": f"inference, {length:,} tokens a text, {len(ids):,} texts",
            "step_s": taken,
            "tokens_per_s": rate,
            "mfu": encoder.forward_flops_per_token(length) * rate / peak if peak else None,
            "peak_gb": peak_gigabytes(),
            "compile_s": compiling,
        } | (row or {})


def encode(weights: str, length: int, texts: int, batch_size: int, seconds: float = 4.0) -> Iterator[Row]:
    """Runs ``Embedder.encode`` on texts; the first call compiles and is not counted."""
    embedder = Embedder.from_pretrained(Path(weights), dtype="bfloat16", max_length=length)
    lengths = text_lengths(texts, length)
    inputs = made_up_texts(lengths)

    def call() -> np.ndarray:
        return embedder.encode(inputs, prompt="", batch_size=batch_size, show_progress_bar=False)

    first, vectors = timed(call)
    np.save(Path(weights) / "encoded.npy", vectors)
    taken = median_seconds(call, 2, seconds)
    yield {
        "key": "encode",
        "name": f"encode from texts, {texts:,} of {lengths.min():,} to {lengths.max():,} tokens",
        "step_s": taken,
        "tokens_per_s": float(lengths.sum()) / taken,
        "peak_gb": peak_gigabytes(),
        "compile_s": first - taken,
    }

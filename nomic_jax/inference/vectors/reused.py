"""Embeds only what is new: vectors of texts that an earlier output holds are taken from it."""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nomic_jax.inference.vectors.made_with import changed_setting
from nomic_jax.inference.vectors.stored import StoredVectors

Encode = Callable[[list[str]], np.ndarray]


class ReusedVectors:
    """The vectors of an output of ``launch.embed``, by their texts. They are in memory.

    Attributes:
      reused: how many vectors were taken from it.
    """

    def __init__(self, file: Path, record: Mapping[str, Any], text_column: str):
        """Reads the file. Raises ValueError if its vectors are of another model or settings, or without their texts."""
        stored = StoredVectors(file)
        if changed := changed_setting(stored.record, record):
            raise ValueError(
                f"--update: {file} was made with another {changed}, so that its vectors cannot be kept; write "
                f"--overwrite to embed all texts again"
            )
        if text_column not in stored.schema.names:
            raise ValueError(
                f"--update: {file} has no column {text_column!r}, so that nothing says which text a vector is of; "
                f"write --overwrite, and --keep_columns={text_column} to update it later"
            )
        self._vectors_NE = stored.vectors()
        tables = (table for _, table in stored.columns([text_column]))
        texts = (text for table in tables for text in table[text_column].to_pylist())
        self._places = {_digest(text): place for place, text in enumerate(texts)}
        self.reused = 0

    def encode(self, texts: list[str], compute: Encode) -> np.ndarray:
        """Returns the vectors of texts [N, E]; ``compute`` gets the texts that are new."""
        places = [self._places.get(_digest(text), -1) for text in texts]
        vectors_NE = self._vectors_NE[places]
        if new := [i for i, place in enumerate(places) if place < 0]:
            vectors_NE[new] = compute([texts[i] for i in new])
        self.reused += len(texts) - len(new)
        return vectors_NE


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()

"""Long work kept in pieces on disk: a kill costs the piece at hand, and a restart takes up what it finds."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from tqdm import tqdm

from nomic_jax.data.sources import atomic_file, write_json

TEXTS_PER_FILE = 2048  # embeddings are saved this often: a minute or two of a base-size teacher on a CPU

Encode = Callable[[list[str]], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Encoder:
    """The teacher.

    Attributes:
      query, document: texts -> float32 [N, E], each row of length 1.
      identity: what the embeddings depend on, such as weights and prompts; see ``hold_settings``.
    """

    query: Encode
    document: Encode
    identity: Mapping[str, Any]


def hold_settings(work: Path, settings: Mapping[str, Any]) -> None:
    """Records in ``work`` what its files depend on, or checks that they were made under the same settings.

    Raises:
      ValueError: they were made under others; the message says which.
    """
    record = work / "settings.json"
    settings = {"texts_per_file": TEXTS_PER_FILE, **settings}
    # A run that failed before it finished a piece (a mistyped column, say) must not bind the next one.
    if not record.exists() or not any(work.rglob("*.npy")):
        write_json(record, settings)
        return
    held = json.loads(record.read_text(encoding="utf-8"))
    names = [name for name in sorted(held.keys() | settings.keys()) if held.get(name) != settings.get(name)]
    if names:
        was, now = (
            {name: repr(them[name]) if name in them else "absent" for name in names} for them in (held, settings)
        )
        changes = [f"{name} was {was[name]}, is {now[name]}" for name in names[:3]]
        more = f"; and {len(names) - 3} more" if len(names) > 3 else ""
        raise ValueError(
            f"{work} holds work done with other settings: {'; '.join(changes)}{more}. "
            f"Give another --output, or delete {work} to begin again"
        )


def fingerprints(label: str, files: Iterable[str]) -> dict[str, str]:
    """{"label file": SHA-256 of its content}, for ``hold_settings``."""
    hashes = {}
    for file in files:
        with fsspec.open(file, "rb") as f:
            hashes[f"{label} {file}"] = hashlib.file_digest(f, "sha256").hexdigest()
    return hashes


def cached_array(path: Path, compute: Callable[[], np.ndarray]) -> np.ndarray:
    """The array in the file, computed and saved now unless it is there; the file appears complete or not at all."""
    if not path.exists():
        array = compute()
        with atomic_file(path) as part, part.open("wb") as f:
            np.save(f, array)
    return np.load(path)


def embed_texts(texts: Sequence[str], encode: Encode, folder: Path, *, label: str, progress: bool = True) -> np.ndarray:
    """Embeddings [N, E], float32, saved in ``folder`` every TEXTS_PER_FILE texts; those found there are not made again.

    Raises:
      ValueError: the encoder returns something else than a vector of length 1 for every text.
    """
    x_NE = np.empty((0, 0), np.float32)
    with tqdm(total=len(texts), desc=label, unit=" texts", leave=False, disable=not progress) as bar:
        for start in range(0, len(texts), TEXTS_PER_FILE):
            piece = list(texts[start : start + TEXTS_PER_FILE])
            file = folder / f"{start // TEXTS_PER_FILE:06d}.npy"
            vectors = cached_array(file, functools.partial(_encode_checked, encode, piece))
            if start == 0:
                x_NE = np.empty((len(texts), vectors.shape[1]), np.float32)
            x_NE[start : start + len(piece)] = vectors
            bar.update(len(piece))
    return x_NE


def _encode_checked(encode: Encode, texts: list[str]) -> np.ndarray:
    vectors = np.asarray(encode(texts), np.float32)
    if vectors.ndim != 2 or len(vectors) != len(texts):
        raise ValueError(f"the encoder returned an array of shape {vectors.shape} for {len(texts)} texts")
    # A NaN or a zero vector ties with everything, so its row would pass every filter.
    lengths = np.linalg.norm(vectors, axis=1)
    wrong = np.flatnonzero(~(np.abs(lengths - 1) < 1e-3))
    if len(wrong):
        text, length = texts[wrong[0]], lengths[wrong[0]]
        raise ValueError(f"the encoder gave the text {text[:80]!r} a vector of length {length}; expected 1")
    return vectors


def distinct_texts(texts: Iterable[str]) -> tuple[list[str], np.ndarray]:
    """Texts that differ in more than surrounding whitespace, in order of appearance, and each text's place there.

    Returns:
      The first form met of each, and int64 [N] indices into them.
    """
    place: dict[str, int] = {}
    distinct: list[str] = []
    places = []
    for text in texts:
        key = text.strip()
        if key not in place:
            place[key] = len(distinct)
            distinct.append(text)
        places.append(place[key])
    return distinct, np.array(places, np.int64)

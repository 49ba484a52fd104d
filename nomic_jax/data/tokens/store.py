"""Stores of tokenised texts as memory-mapped arrays, so that training never tokenises in its step loop.

A source becomes a directory, written by ``nomic_jax.data.tokens.pretokenize``:

    manifest.json            the source, tokenizer and number of rows; `fingerprint` identifies all of them
    <column>.ids.npy         token ids of all texts, concatenated (uint16 if the vocabulary fits)
    <column>.offsets.npy     int64 [texts + 1]: text i is ids[offsets[i]:offsets[i + 1]]
    negatives.rows.npy       int64 [rows + 1]: row r has the negatives rows[r] ... rows[r + 1] - 1
    scores.npy               float32 [rows], scores of pairs; or [rows + negatives]: of each row's document, then of
                             its negatives, row by row. Only for a source whose loss takes them
    vectors.npy              float32 [rows * columns * width], a teacher's vectors of each row; the manifest has `width`
    rejected.jsonl           rows that were skipped, with the reason

Texts include their prefix and special tokens and are not truncated, so one store serves every sequence length.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nomic_jax.data.formats.row_checks import Quarantined
from nomic_jax.data.mixture import COLUMNS
from nomic_jax.data.tokens.tokenizer import Tokenizer

FORMAT = 2
# Manifest fields that a store's fingerprint covers, besides the hashes of its files.
IDENTITY = ("format", "source", "tokenizer", "on_bad_row")


class RaggedTokens:
    """Token id sequences of different lengths, memory-mapped."""

    def __init__(self, directory: Path, column: str):
        self.ids = np.load(directory / f"{column}.ids.npy", mmap_mode="r")
        self.offsets = np.load(directory / f"{column}.offsets.npy", mmap_mode="r")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> np.ndarray:
        return np.asarray(self.ids[self.offsets[i] : self.offsets[i + 1]])

    def lengths(self, rows: np.ndarray) -> np.ndarray:
        return np.asarray(self.offsets[rows + 1] - self.offsets[rows])

    def gather(self, rows: np.ndarray, max_length: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns (int32 ids of the texts, concatenated; length of each text). Texts are cut as in ``truncate``."""
        starts, stops = np.asarray(self.offsets[rows]), np.asarray(self.offsets[rows + 1])
        lengths = np.minimum(stops - starts, max_length)
        indices = flat_indices(starts, lengths)
        cut = stops - starts > max_length
        indices[np.cumsum(lengths)[cut] - 1] = stops[cut] - 1
        return np.asarray(self.ids)[indices].astype(np.int32), lengths


class TokenStore:
    """One pre-tokenised source.

    Attributes:
      directory: folder of the store.
      rows: number of rows of all files, without rejected rows.
      file_rows: number of rows of each file, in the order of the files.
      fingerprint: digest of the files' content, columns, prefixes and tokenizer.
      quarantined: files that are not used because they cannot be read to their end.
      scores: the numbers that the loss of the source takes, as the files have them; None without.
      vectors: [rows, columns, width], a teacher's vectors of the texts of each row; None without.
    """

    def __init__(self, directory: str | Path):
        self.directory = directory = Path(directory)
        try:
            self.manifest = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
            if self.manifest["format"] != FORMAT:
                raise ValueError(f"its token format is {self.manifest['format']}, but this version reads {FORMAT}")
            self._open(directory)
        except (OSError, ValueError, KeyError, TypeError, IndexError, EOFError) as error:
            raise ValueError(
                f"{directory} cannot be used ({type(error).__name__}: {error}); delete that folder to "
                f"tokenise its source again"
            ) from error

    def _open(self, directory: Path) -> None:
        self.name: str = self.manifest["source"]["name"]
        self.rows: int = self.manifest["rows"]
        self.file_rows: list[int] = self.manifest["file_rows"]
        self.fingerprint: str = self.manifest["fingerprint"]
        # Older stores lack this entry.
        self.quarantined = [Quarantined(**file) for file in self.manifest.get("quarantined", [])]
        columns = COLUMNS[self.manifest["source"]["kind"]]
        self.columns = {column: RaggedTokens(directory, column) for column in columns}
        if "negatives" in columns:
            self.negative_rows = np.load(directory / "negatives.rows.npy", mmap_mode="r")
        self.scores: np.ndarray | None = None
        self.vectors: np.ndarray | None = None
        numbers = self.manifest["source"].get("numbers") or {"numbers": "none"}
        if numbers["numbers"] == "vectors":
            flat = np.load(directory / "vectors.npy", mmap_mode="r")
            self.vectors = flat.reshape(self.rows, len(numbers["columns"]), self.manifest["width"])
        elif numbers["numbers"] != "none":
            self.scores = np.load(directory / "scores.npy", mmap_mode="r")
            if len(self.scores) != self.rows + (int(self.negative_rows[-1]) if "negatives" in columns else 0):
                raise ValueError("scores.npy does not match the rows")
        texts = {column: self.negative_rows[-1] if column == "negatives" else self.rows for column in columns}
        for column, tokens in self.columns.items():
            if len(tokens) != texts[column] or tokens.offsets[-1] != len(tokens.ids):
                raise ValueError(f"{column}.ids.npy and {column}.offsets.npy do not match")

    def __len__(self) -> int:
        return self.rows


def check_tokenizer(stores: Sequence[TokenStore], tokenizer: Tokenizer) -> None:
    """Raises ValueError if another tokenizer made the tokens: their ids would stand for other words."""
    for store in stores:
        if store.manifest["tokenizer"] != tokenizer.sha256:
            raise ValueError(
                f"the tokens of source {store.name!r} were made by the tokenizer {store.manifest['tokenizer'][:16]}, "
                f"but this one is {tokenizer.sha256[:16]}; tokenise the source again with this one"
            )


def flat_indices(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Returns the indices of the texts' tokens, text after text; text i is starts[i] ... starts[i] + lengths[i] - 1."""
    return np.repeat(starts - (np.cumsum(lengths) - lengths), lengths) + np.arange(int(lengths.sum()))

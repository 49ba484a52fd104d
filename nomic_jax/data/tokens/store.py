"""Texts tokenised once, kept as memory-mapped arrays: training never tokenises in its step loop.

A source becomes a directory (``nomic_jax.data.tokens.pretokenize`` writes it):

    manifest.json            what was tokenised, with which tokenizer, how many rows; `fingerprint` identifies it all
    <column>.ids.npy         token ids of every text, one after the other (uint16 where the vocabulary fits)
    <column>.offsets.npy     int64 [texts + 1]: text i is ids[offsets[i]:offsets[i + 1]]
    negatives.rows.npy       int64 [rows + 1]: row r owns the negatives rows[r] ... rows[r + 1] - 1
    rejected.jsonl           rows that were skipped, and why

Texts carry their prefix and special tokens and are not cut, so one store serves every sequence length.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nomic_jax.data.formats.row_checks import Quarantined
from nomic_jax.data.mixture import COLUMNS
from nomic_jax.data.tokens.tokenizer import Tokenizer

FORMAT = 2
# What a store's fingerprint is made of, with the hashes of its files; in its manifest under these names.
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
        """(int32 ids one text after the other, length of each): each as ``truncate`` cuts it."""
        starts, stops = np.asarray(self.offsets[rows]), np.asarray(self.offsets[rows + 1])
        lengths = np.minimum(stops - starts, max_length)
        places = flat_indices(starts, lengths)
        cut = stops - starts > max_length
        places[np.cumsum(lengths)[cut] - 1] = stops[cut] - 1
        return np.asarray(self.ids)[places].astype(np.int32), lengths


class TokenStore:
    """One pre-tokenised source.

    Attributes:
      directory: where it lies.
      rows: of all files, without rejected ones.
      file_rows: of each file, in the order of files.
      fingerprint: of the files' content, columns, prefixes and tokenizer.
      quarantined: files that were set aside, as they could not be read.
    """

    def __init__(self, directory: str | Path):
        self.directory = directory = Path(directory)
        try:
            self.manifest = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
            if self.manifest["format"] != FORMAT:
                raise ValueError(f"its token format is {self.manifest['format']}, this version reads {FORMAT}")
            self._open(directory)
        except (OSError, ValueError, KeyError, TypeError, IndexError, EOFError) as error:
            raise ValueError(
                f"{directory} cannot be used ({type(error).__name__}: {error}); delete that folder, and its source is "
                f"tokenised again"
            ) from error

    def _open(self, directory: Path) -> None:
        self.name: str = self.manifest["source"]["name"]
        self.rows: int = self.manifest["rows"]
        self.file_rows: list[int] = self.manifest["file_rows"]
        self.fingerprint: str = self.manifest["fingerprint"]
        # Stores of before have no such entry.
        self.quarantined = [Quarantined(**one) for one in self.manifest.get("quarantined", [])]
        columns = COLUMNS[self.manifest["source"]["kind"]]
        self.columns = {column: RaggedTokens(directory, column) for column in columns}
        if "negatives" in columns:
            self.negative_rows = np.load(directory / "negatives.rows.npy", mmap_mode="r")
        texts = {column: self.negative_rows[-1] if column == "negatives" else self.rows for column in columns}
        for column, tokens in self.columns.items():
            if len(tokens) != texts[column] or tokens.offsets[-1] != len(tokens.ids):
                raise ValueError(f"{column}.ids.npy and {column}.offsets.npy do not fit together")

    def __len__(self) -> int:
        return self.rows


def check_tokenizer(stores: Sequence[TokenStore], tokenizer: Tokenizer) -> None:
    """Raises ValueError if another tokenizer made the tokens: their ids would be other words to the model."""
    for store in stores:
        if store.manifest["tokenizer"] != tokenizer.sha256:
            raise ValueError(
                f"the tokens of source {store.name!r} were made by the tokenizer {store.manifest['tokenizer'][:16]}, "
                f"this one is {tokenizer.sha256[:16]}; tokenise the source with this one"
            )


def flat_indices(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The places of texts' tokens, text after text, where text i lies at starts[i] ... starts[i] + lengths[i] - 1."""
    return np.repeat(starts - (np.cumsum(lengths) - lengths), lengths) + np.arange(int(lengths.sum()))

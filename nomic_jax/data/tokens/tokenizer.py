"""Converts text to token ids with the tokenizer of a checkpoint directory."""

import functools
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from nomic_jax.files.writing import atomic_file

# Tokenised in one call. Many, because all cores share it; limited, because each takes about 100 bytes of memory.
CHARACTERS_PER_CALL = 4_000_000
# Largest factor by which a tokenizer may lengthen a text. Real tokenizers replace a character by one or two.
MAX_GROWTH = 10_000
# The tokenizers package lists all unused ids below the largest id. Real vocabularies have about 300,000 tokens.
MAX_IDS = 1 << 24
_UNKNOWN = "a \U00013000 \ua66e"  # a hieroglyph and a letter found in a single manuscript


class Tokenizer:
    """The fast tokenizer of a Hugging Face directory, without the truncation and padding set in its file.

    Attributes:
      vocab_size: the largest id that it can produce, plus one.
      sha256: digest of the complete definition. Token files record it; training rejects tokens of another tokenizer.

    Raises:
      ValueError: its ids, or its output for a few letters, would fill the memory.
    """

    def __init__(self, backend: tokenizers.Tokenizer):
        if (growth := _growth(backend.normalizer) * _growth(backend.pre_tokenizer)) > MAX_GROWTH:
            raise ValueError(f"the tokenizer may make a text {growth:.0e} times as long; the limit is {MAX_GROWTH:,}")
        if (largest := max(backend.get_vocab(with_added_tokens=True).values(), default=0)) >= MAX_IDS:
            raise ValueError(f"the tokenizer has a token with the id {largest}; ids must be below {MAX_IDS:,}")
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.sha256 = hashlib.sha256(backend.to_str().encode()).hexdigest()
        # A text is encoded because the file stores the ids of [CLS] and [SEP] a second time, perhaps with other values.
        # The text has unknown words because only these raise an error if the token for unknown words is missing.
        self.vocab_size = max(*self.vocabulary.values(), *backend.encode(_UNKNOWN).ids) + 1

    @property
    def vocabulary(self) -> dict[str, int]:
        """The vocabulary: token -> id."""
        return self.backend.get_vocab(with_added_tokens=True)

    @classmethod
    def from_directory(cls, path: str | Path) -> "Tokenizer":
        """Reads tokenizer.json, or vocab.txt if there is no tokenizer.json."""
        path = Path(path)
        if path.is_file():
            path = path.parent
        if (path / "tokenizer.json").exists():
            return cls(tokenizers.Tokenizer.from_file(str(path / "tokenizer.json")))
        if (path / "vocab.txt").exists():
            from transformers import BertTokenizer

            return cls(BertTokenizer.from_pretrained(str(path))._tokenizer)
        raise FileNotFoundError(f"{path} holds neither tokenizer.json nor vocab.txt")

    @classmethod
    def from_pretrained(cls, path_or_hub_id: str) -> "Tokenizer":
        """Reads the tokenizer of a directory or of a model of the hub."""
        if Path(path_or_hub_id).exists():
            return cls.from_directory(path_or_hub_id)
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            return cls.from_directory(hf_hub_download(path_or_hub_id, "tokenizer.json"))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            raise FileNotFoundError(
                f"tokenizer {path_or_hub_id!r} is not a directory, and could not be fetched from the hub "
                f"({type(error).__name__})"
            ) from error

    def lowercased(self) -> "Tokenizer":
        """Returns this tokenizer with texts lowercased first (``do_lower_case`` of sentence-transformers)."""
        backend = tokenizers.Tokenizer.from_str(self.backend.to_str())
        first = tokenizers.normalizers.Lowercase()
        rest = [] if backend.normalizer is None else [backend.normalizer]
        backend.normalizer = tokenizers.normalizers.Sequence([first, *rest])
        return Tokenizer(backend)

    def special_id(self, token: str) -> int:
        """Returns the id of "[CLS]", "[SEP]", "[PAD]" or "[MASK]". Raises ValueError if there is no such token."""
        found = self.backend.token_to_id(token)
        if found is None:
            raise ValueError(f"the tokenizer has no {token} token")
        return found

    @functools.cached_property
    def special_ids(self) -> np.ndarray:
        """The ids that masked-LM never masks: special tokens such as [CLS], [SEP] and [PAD]."""
        added = self.backend.get_added_tokens_decoder()
        return np.array(sorted(i for i, token in added.items() if token.special), np.int32)

    def encode(self, texts: Sequence[str], max_length: int | None = None) -> list[np.ndarray]:
        """Returns the int32 ids of each text with special tokens, cut to ``max_length`` ids; the last [SEP] is kept."""
        ids = []
        for group in _groups(texts, CHARACTERS_PER_CALL):
            try:
                encodings = self.backend.encode_batch_fast(group)
            except Exception as error:  # the tokenizers package raises bare exceptions
                raise ValueError(f"the tokenizer cannot encode a text ({error})") from error
            ids += [truncate(np.array(encoding.ids, np.int32), max_length) for encoding in encodings]
        return ids

    def save(self, directory: str | Path) -> None:
        with atomic_file(Path(directory) / "tokenizer.json") as part:
            self.backend.save(str(part))


def check_unicode(text: str, what: str, index: int) -> None:
    """Raises ValueError if UTF-8 cannot encode the text. The message names the text as ``what`` ``index``."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{what} {index} holds half of a surrogate pair at character {error.start}, which is not valid text; "
            f'text.encode("utf-8", "replace").decode() repairs it'
        ) from None


def truncate(ids: np.ndarray, max_length: int | None) -> np.ndarray:
    """Returns the first ``max_length`` ids, the last replaced by the text's last id (the closing [SEP])."""
    if max_length is None or len(ids) <= max_length:
        return ids
    return np.concatenate([ids[: max_length - 1], ids[-1:]])


def _growth(component: tokenizers.normalizers.Normalizer | tokenizers.pre_tokenizers.PreTokenizer | None) -> int:
    return 1 if component is None else _growth_of(json.loads(component.__getstate__()))


def _growth_of(step: dict[str, Any]) -> int:
    """Returns an upper bound of the number of characters that a normalisation step makes from one character."""
    inner = step.get("normalizers") or step.get("pretokenizers") or []
    own = {
        # A regular expression may match the empty text between any two characters.
        "Replace": lambda: len(step["content"]) + ("Regex" in step["pattern"] or not step["pattern"]["String"]),
        "Prepend": lambda: len(step["prepend"]),
        "ByteLevel": lambda: 2,
    }.get(step["type"], lambda: 1)()
    return max(1, own) * math.prod(map(_growth_of, inner))


def _groups(texts: Sequence[str], characters: int) -> Iterator[list[str]]:
    """Yields groups of consecutive texts, each of about ``characters`` characters and at least one text."""
    group: list[str] = []
    size = 0
    for text in texts:
        group.append(text)
        size += len(text)
        if size >= characters:
            yield group
            group, size = [], 0
    if group:
        yield group

"""Converts text to token ids with the tokenizer of a checkpoint directory."""

import contextlib
import functools
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import tokenizers

from nomic_jax.data.tokens.hub import is_reachable
from nomic_jax.data.tokens.tokenizer_config import around, follow, is_bert, read_config, special_tokens
from nomic_jax.extras import needs
from nomic_jax.files.reading import check_regular, read_bytes
from nomic_jax.files.writing import atomic_file, write_json

# Tokenised in one call. Many, because all cores share it; limited, because each takes about 100 bytes of memory.
CHARACTERS_PER_CALL = 4_000_000
# Largest factor by which a tokenizer may lengthen a text. Real tokenizers replace a character by one or two.
MAX_GROWTH = 10_000
# The tokenizers package lists all unused ids below the largest id. Real vocabularies have about 300,000 tokens.
MAX_IDS = 1 << 24
# Files of real tokenizers have up to 40 MB. Parsed, they take five times as much memory.
LARGEST_FILE = 1 << 27
_UNKNOWN = "a \U00013000 \ua66e"  # a hieroglyph and a letter found in a single manuscript


class Tokenizer:
    """The fast tokenizer of a Hugging Face directory, without the truncation and padding set in its file.

    Attributes:
      vocab_size: the largest id that it can produce, plus one.
      special_tokens: role ("cls", "sep", "pad", "mask", "unk") -> token, for the roles that it has.
      suffix: number of special tokens that it puts after a text; truncation keeps them.
      sha256: digest of the complete definition. Token files record it; training rejects tokens of another tokenizer.

    Raises:
      ValueError: its ids, or its output for a few letters, would fill the memory.
    """

    def __init__(self, backend: tokenizers.Tokenizer, config: Mapping[str, Any] = MappingProxyType({})):
        """Args:
        backend: the definition, from tokenizer.json.
        config: the content of tokenizer_config.json, which names special tokens.
        """
        if (growth := _growth(backend.normalizer) * _growth(backend.pre_tokenizer)) > MAX_GROWTH:
            raise ValueError(f"the tokenizer may make a text {growth:.0e} times as long; the limit is {MAX_GROWTH:,}")
        if (largest := max(backend.get_vocab(with_added_tokens=True).values(), default=0)) >= MAX_IDS:
            raise ValueError(f"the tokenizer has a token with the id {largest}; ids must be below {MAX_IDS:,}")
        padding = (backend.padding or {}).get("pad_token")
        backend.no_truncation()
        backend.no_padding()
        try:
            self.special_tokens = special_tokens(backend, config, padding)
            self.suffix = len(around(backend)[1])
        except BaseException as error:
            raise _explained(error) from error
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
        """Reads tokenizer.json, or vocab.txt if there is no tokenizer.json, and follows tokenizer_config.json.

        Raises:
          FileRefused: a file is no regular file, or is larger than LARGEST_FILE.
          FileNotFoundError: neither file is there.
          ValueError: a field of tokenizer_config.json cannot be followed, or the tokenizer cannot be used.
        """
        path = Path(path)
        if path.is_file():
            path = path.parent
        if (path / "tokenizer.json").exists():
            definition = read_bytes(path / "tokenizer.json", limit=LARGEST_FILE)
            config = read_config(path)
            backend = tokenizers.Tokenizer.from_buffer(definition)
            follow(backend, config, str(path / "tokenizer_config.json"))
            return cls(backend, config)
        if (path / "vocab.txt").exists():
            with needs(f"{path}/vocab.txt, without a tokenizer.json,", "transformers>=4.57"):
                from transformers import BertTokenizer

            check_regular(path / "vocab.txt", limit=LARGEST_FILE)
            config = read_config(path)
            # Only this class, whatever the files name; it follows tokenizer_config.json itself.
            return cls(BertTokenizer.from_pretrained(str(path))._tokenizer, config)
        raise FileNotFoundError(f"{path} holds neither tokenizer.json nor vocab.txt")

    @classmethod
    def from_pretrained(cls, path_or_hub_id: str) -> "Tokenizer":
        """Reads the tokenizer of a directory or of a model of the hub."""
        if Path(path_or_hub_id).exists():
            return cls.from_directory(path_or_hub_id)
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import (
            EntryNotFoundError,
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
        )

        try:
            cached = not is_reachable(path_or_hub_id)
            file = hf_hub_download(path_or_hub_id, "tokenizer.json", local_files_only=cached)
            with contextlib.suppress(EntryNotFoundError, LocalEntryNotFoundError):
                hf_hub_download(path_or_hub_id, "tokenizer_config.json", local_files_only=cached)
            return cls.from_directory(file)
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            raise FileNotFoundError(
                f"tokenizer {path_or_hub_id!r} is not a directory, and could not be fetched from the hub "
                f"({type(error).__name__}); go online, or give a directory with tokenizer.json"
            ) from error

    def lowercased(self) -> "Tokenizer":
        """Returns this tokenizer with texts lowercased first (``do_lower_case`` of sentence-transformers)."""
        backend = tokenizers.Tokenizer.from_str(self.backend.to_str())
        first = tokenizers.normalizers.Lowercase()
        rest = [] if backend.normalizer is None else [backend.normalizer]
        backend.normalizer = tokenizers.normalizers.Sequence([first, *rest])
        return Tokenizer(backend, self.token_names)

    def special_id(self, role: str) -> int:
        """Returns the id of the token with the role "cls", "sep", "pad" or "mask", whatever its text.

        Raises:
          ValueError: the tokenizer has no such token.
        """
        token = self.special_tokens.get(role)
        found = None if token is None else self.backend.token_to_id(token)
        if found is None:
            raise ValueError(
                f"the tokenizer has no token for {role!r}; name it in tokenizer_config.json as {role}_token, or use "
                f"another tokenizer"
            )
        return found

    @functools.cached_property
    def special_ids(self) -> np.ndarray:
        """The ids that masked-LM never masks: special tokens such as [CLS], [SEP] and [PAD]."""
        added = self.backend.get_added_tokens_decoder()
        ids = {i for i, token in added.items() if token.special}
        ids |= {i for token in self.special_tokens.values() if (i := self.backend.token_to_id(token)) is not None}
        return np.array(sorted(ids), np.int32)

    def encode(
        self, texts: Sequence[str], max_length: int | None = None, *, spelled_as_text: bool = False
    ) -> list[np.ndarray]:
        """Returns the int32 ids of each text with special tokens, cut to ``max_length`` ids; the last [SEP] is kept.

        Args:
          spelled_as_text: "[SEP]" in a text is these letters. By default it becomes the special token, as in
            transformers and sentence-transformers.
        """
        backend = self._spelled_as_text if spelled_as_text else self.backend
        ids = []
        for group in _groups(texts, CHARACTERS_PER_CALL):
            try:
                encodings = backend.encode_batch_fast(group)
            except BaseException as error:
                raise _explained(error) from error
            ids += [truncate(np.array(encoding.ids, np.int32), max_length, self.suffix) for encoding in encodings]
        return ids

    def word_starts(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns where the text may be cut: the characters and the tokens before each word, int64 [W + 1] each.

        A word is what the pre-tokenizer makes of the text; the last entry is the end of the text. Special tokens do not
        count. Both parts of a cut text have together as many tokens as the text, but for one or two of tokenizers whose
        tokens hold the space before a word.
        """
        try:
            encoding = self.backend.encode(text, add_special_tokens=False)
        except BaseException as error:
            raise _explained(error) from error
        words = encoding.word_ids
        starts = [i for i, word in enumerate(words) if i == 0 or word is None or word != words[i - 1]]
        characters = [encoding.offsets[i][0] for i in starts]
        return np.array([*characters, len(text)], np.int64), np.array([*starts, len(words)], np.int64)

    @functools.cached_property
    def _spelled_as_text(self) -> tokenizers.Tokenizer:
        backend = tokenizers.Tokenizer.from_str(self.backend.to_str())
        backend.encode_special_tokens = True
        return backend

    def save(self, directory: str | Path) -> None:
        """Writes tokenizer.json and, if the roles of its tokens do not follow from it, special_tokens_map.json."""
        directory = Path(directory)
        with atomic_file(directory / "tokenizer.json") as part:
            self.backend.save(str(part))
        again = Tokenizer(tokenizers.Tokenizer.from_str(self.backend.to_str()))
        if again.special_tokens != self.special_tokens:
            write_json(directory / "special_tokens_map.json", self.token_names)

    @property
    def token_names(self) -> dict[str, str]:
        """The special tokens under the names of transformers, such as "pad_token"."""
        return {f"{role}_token": token for role, token in self.special_tokens.items()}

    @functools.cached_property
    def is_bert(self) -> bool:
        """Whether transformers' BertTokenizer makes the same tokens from a vocab.txt."""
        return is_bert(json.loads(self.backend.to_str()), self.special_tokens)


def check_unicode(text: str, what: str, index: int) -> None:
    """Raises ValueError if UTF-8 cannot encode the text. The message names the text as ``what`` ``index``."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{what} {index} holds half of a surrogate pair at character {error.start}, which is not valid text; "
            f'text.encode("utf-8", "replace").decode() repairs it'
        ) from None


def truncate(ids: np.ndarray, max_length: int | None, suffix: int = 1) -> np.ndarray:
    """Returns ``max_length`` ids: the first ones, and the last ``suffix`` ones (the closing [SEP])."""
    if max_length is None or len(ids) <= max_length:
        return ids
    return np.concatenate([ids[: max_length - suffix], ids[len(ids) - suffix :]])


def _explained(error: BaseException) -> BaseException:
    """Returns an exception of the tokenizers package as a ValueError; others as they are.

    The package raises bare exceptions, and BaseExceptions where it panics: a regular expression that has to try too
    many ways to match, for example.
    """
    if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
        return error
    return ValueError(f"the tokenizer cannot encode a text ({str(error)[:300]})")


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

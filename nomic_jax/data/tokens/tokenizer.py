"""Text to token ids, with the tokenizer of a checkpoint directory."""

import functools
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

# Tokenised at once: much, because every core takes a share, but the backend holds about 100 bytes for each.
CHARACTERS_PER_CALL = 4_000_000
# So many times as long a tokenizer's file may make a text. Those of models replace characters by one or two.
MOST_GROWTH = 10_000
# The tokenizers package makes a list of all ids below the largest that no token has. Vocabularies have 300,000 tokens.
MOST_IDS = 1 << 24
_UNKNOWN = "a \U00013000 \ua66e"  # a hieroglyph and a letter that one manuscript has


class Tokenizer:
    """The fast tokenizer of a Hugging Face directory, without the truncation and padding baked into its file.

    Attributes:
      vocab_size: one more than the largest id it can produce.
      sha256: of its complete definition; token files record it, and training refuses tokens of another tokenizer.

    Raises:
      ValueError: a few letters, or its ids, would fill the memory.
    """

    def __init__(self, backend: tokenizers.Tokenizer):
        if (growth := _growth(backend.normalizer) * _growth(backend.pre_tokenizer)) > MOST_GROWTH:
            raise ValueError(
                f"the tokenizer may make a text {growth:.0e} times as long; no more than {MOST_GROWTH:,} is taken"
            )
        if (largest := max(backend.get_vocab(with_added_tokens=True).values(), default=0)) >= MOST_IDS:
            raise ValueError(f"the tokenizer has a token with the id {largest}; ids are below {MOST_IDS:,}")
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.sha256 = hashlib.sha256(backend.to_str().encode()).hexdigest()
        # The ids of [CLS] and [SEP] stand in the file a second time, and may be others there.
        # (And without the token for unknown words, only they show it.)
        self.vocab_size = max(*self.vocabulary.values(), *backend.encode(_UNKNOWN).ids) + 1

    @property
    def vocabulary(self) -> dict[str, int]:
        """Token -> id."""
        return self.backend.get_vocab(with_added_tokens=True)

    @classmethod
    def from_directory(cls, path: str | Path) -> "Tokenizer":
        """Reads tokenizer.json, or vocab.txt where there is no such file."""
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
        """From a directory, or from a model of the hub."""
        if Path(path_or_hub_id).exists():
            return cls.from_directory(path_or_hub_id)
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            return cls.from_directory(hf_hub_download(path_or_hub_id, "tokenizer.json"))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            raise FileNotFoundError(
                f"tokenizer {path_or_hub_id!r} is neither a directory nor could it be fetched from the hub "
                f"({type(error).__name__})"
            ) from error

    def lowercased(self) -> "Tokenizer":
        """This tokenizer with texts put in lower case first (sentence-transformers' ``do_lower_case``)."""
        backend = tokenizers.Tokenizer.from_str(self.backend.to_str())
        first = tokenizers.normalizers.Lowercase()
        rest = [] if backend.normalizer is None else [backend.normalizer]
        backend.normalizer = tokenizers.normalizers.Sequence([first, *rest])
        return Tokenizer(backend)

    def special_id(self, token: str) -> int:
        """The id of "[CLS]", "[SEP]", "[PAD]" or "[MASK]"."""
        found = self.backend.token_to_id(token)
        if found is None:
            raise ValueError(f"the tokenizer has no {token} token")
        return found

    @functools.cached_property
    def special_ids(self) -> np.ndarray:
        """Ids that masked-LM never masks: special tokens such as [CLS], [SEP] and [PAD]."""
        added = self.backend.get_added_tokens_decoder()
        return np.array(sorted(i for i, token in added.items() if token.special), np.int32)

    def encode(self, texts: Sequence[str], max_length: int | None = None) -> list[np.ndarray]:
        """Token ids of each text, int32, with special tokens; cut to ``max_length`` ids, the closing [SEP] kept."""
        ids = []
        for group in _groups(texts, CHARACTERS_PER_CALL):
            try:
                encodings = self.backend.encode_batch_fast(group)
            except Exception as error:  # the tokenizers package raises bare ones
                raise ValueError(f"the tokenizer cannot encode a text ({error})") from error
            ids += [truncate(np.array(encoding.ids, np.int32), max_length) for encoding in encodings]
        return ids

    def save(self, directory: str | Path) -> None:
        self.backend.save(str(Path(directory) / "tokenizer.json"))


def check_unicode(text: str, what: str, index: int) -> None:
    """Raises ValueError, which names the text as ``what`` ``index``, if no UTF-8 can hold it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{what} {index} holds half of a surrogate pair at character {error.start}, which is no text; "
            f'text.encode("utf-8", "replace").decode() makes one of it'
        ) from None


def truncate(ids: np.ndarray, max_length: int | None) -> np.ndarray:
    """The first ``max_length`` ids with the last one of the whole text (the closing [SEP]) in the last place."""
    if max_length is None or len(ids) <= max_length:
        return ids
    return np.concatenate([ids[: max_length - 1], ids[-1:]])


def _growth(component: tokenizers.normalizers.Normalizer | tokenizers.pre_tokenizers.PreTokenizer | None) -> int:
    return 1 if component is None else _growth_of(json.loads(component.__getstate__()))


def _growth_of(step: dict[str, Any]) -> int:
    """Upper bound of the length that a step of normalisation makes of one character."""
    inner = step.get("normalizers") or step.get("pretokenizers") or []
    own = {
        # An expression may match the empty text between any two characters.
        "Replace": lambda: len(step["content"]) + ("Regex" in step["pattern"] or not step["pattern"]["String"]),
        "Prepend": lambda: len(step["prepend"]),
        "ByteLevel": lambda: 2,
    }.get(step["type"], lambda: 1)()
    return max(1, own) * math.prod(map(_growth_of, inner))


def _groups(texts: Sequence[str], characters: int) -> Iterator[list[str]]:
    """Runs of texts of about so many characters together, of one text at least."""
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

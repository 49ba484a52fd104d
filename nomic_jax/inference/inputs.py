"""What an embedder does with its inputs before it computes: checks, prompts, token ids.

Nothing is guessed: an object whose items are not strings is refused.
"""

import warnings
from collections.abc import Iterable, Mapping, Set
from typing import Any

import numpy as np

from nomic_jax.data.batches.shapes import pad_right
from nomic_jax.data.prompts import prompt_for
from nomic_jax.data.tokens.tokenizer import Tokenizer, check_unicode, truncate
from nomic_jax.model import EmbeddingConfig


def as_texts(inputs: Any) -> tuple[list[str], bool]:
    """Returns the texts, and whether ``inputs`` is a single one.

    Args:
      inputs: a string, or an iterable with an order: a list, a generator, an array, a column of pandas, polars,
        Arrow or datasets.

    Raises:
      TypeError: ``inputs`` is of another type, or an input is not a string; the message names its index.
      ValueError: an input is not valid Unicode.
    """
    if hasattr(inputs, "as_py"):  # a scalar of Arrow
        inputs = inputs.as_py()
    if isinstance(inputs, np.ndarray) and inputs.ndim == 0:
        inputs = inputs.item()
    if isinstance(inputs, str):
        check_texts([inputs])
        return [inputs], True
    # Iterating over a table gives the names of its columns, over a mapping or a set its keys, and over bytes numbers.
    if (columns := _columns(inputs)) is not None:
        raise TypeError(
            f"inputs is {type(inputs).__name__}, a table with the columns {', '.join(map(str, columns))}; pass the "
            f"column that holds the texts"
        )
    if isinstance(inputs, (bytes, bytearray, memoryview, Mapping, Set)) or not isinstance(inputs, Iterable):
        raise TypeError(f"inputs is {type(inputs).__name__}, expected a string or a sequence of strings")
    texts = list(inputs)
    if texts and hasattr(texts[0], "as_py"):
        texts = [text.as_py() if hasattr(text, "as_py") else text for text in texts]
    check_texts(texts)
    return texts, False


def check_texts(texts: list[str], what: str = "input") -> None:
    """Raises TypeError for a text that is not a string, ValueError for one that is not valid Unicode."""
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            kind = type(text).__name__
            if isinstance(text, list | tuple | Mapping):
                kind += ", perhaps a pair or a multimodal input, which are not implemented"
            raise TypeError(f"{what} {i} is {kind}; expected a string")
        check_unicode(text, what, i)


def _columns(inputs: Any) -> list[Any] | None:
    """The columns of a table of pandas, polars, Arrow or datasets (a DataFrame's own columns are an Index)."""
    for name in ("column_names", "columns"):
        found = getattr(inputs, name, None)
        if found is not None and not callable(found):
            return list(found)
    return None


class TextInputs:
    """Base of ``Embedder``: its prompts and its tokenizer."""

    config: EmbeddingConfig
    tokenizer: Tokenizer
    prompts: dict[str, str]
    default_prompt_name: str | None
    max_length: int
    _warned: set[str]

    def preprocess(self, inputs: str | Iterable[str], prompt: str | None = None) -> dict[str, np.ndarray]:
        """Returns input_ids and attention_mask, int64 [N, L], of texts as ``encode`` cuts and pads them."""
        ids, _ = self._tokenize(as_texts(inputs)[0], self._prefix(None, prompt or ""))
        lengths = np.array([len(x) for x in ids])
        longest = int(lengths.max(initial=0))
        mask = np.arange(longest) < lengths[:, None]
        padded = pad_right(ids, longest, self.config.encoder.pad_token_id)
        return {"input_ids": padded.astype(np.int64), "attention_mask": mask.astype(np.int64)}

    def tokenize(self, texts: str | Iterable[str], prompt: str | None = None) -> dict[str, np.ndarray]:
        """Calls ``preprocess``."""
        return self.preprocess(texts, prompt)

    def _role_prompt(self, role: str, prompt_name: str | None, prompt: str | None) -> tuple[str | None, str | None]:
        """Returns (prompt_name, prompt) for ``encode``: the given one, else the role's, else none (not the default)."""
        if prompt_name is not None or prompt is not None:
            return prompt_name, prompt
        return None, prompt_for(self.prompts, role)

    def _prefix(self, prompt_name: str | None, prompt: str | None) -> str:
        if prompt is not None:
            return prompt
        name = self.default_prompt_name if prompt_name is None else prompt_name
        if name is None:
            return ""
        if name not in self.prompts:
            known = ", ".join(self.prompts) or "none"
            raise ValueError(f"unknown prompt_name {name!r}; this model's prompts are: {known}")
        return self.prompts[name]

    def _warn_of_prefixes(self, texts: list[str], prefix: str, is_chosen: bool) -> None:
        """Warns once about texts without the prefix that the model was trained with, and once about texts with two."""
        known = tuple(dict.fromkeys(text for text in self.prompts.values() if text.strip()))
        if not known:
            return
        carrying = next((i for i, text in enumerate(texts) if text.startswith(known)), None)
        if prefix and carrying is not None:
            self._warn_once(
                "two prefixes",
                f"input {carrying} already starts with a prefix, and {prefix!r} goes in front of it; give texts "
                f"without prefixes, or prompt=''",
            )
        elif not prefix and not is_chosen and not all(text.startswith(known) for text in texts):
            self._warn_once(
                "no prefix",
                f"this model was trained with a prefix on every text, such as {known[0]!r}; use encode_query and "
                f"encode_document, or a prompt_name: {', '.join(self.prompts)}",
            )

    def _warn_once(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(message, stacklevel=5)

    def _tokenize(self, texts: list[str], prefix: str) -> tuple[list[np.ndarray], int]:
        """Returns the token ids of each text, and the number of texts that were cut."""
        whole = self.tokenizer.encode([prefix + text for text in texts])
        cut = sum(len(ids) > self.max_length for ids in whole)
        return [truncate(ids, self.max_length, self.tokenizer.suffix) for ids in whole], cut

"""Texts as words and runs of words, the same for every comparison of texts."""

import re

_IDEOGRAPHS = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"  # kana too: written without spaces
_WORD = re.compile(rf"[{_IDEOGRAPHS}]|[^\W{_IDEOGRAPHS}]+")


def words_of(text: str) -> list[str]:
    """Lower-cased runs of letters, digits and underscores, of any script; of Chinese and Japanese, each character."""
    return _WORD.findall(text.lower())


def word_ngrams(words: list[str], n: int) -> list[str]:
    """All runs of n words; of fewer words, the one run of all of them."""
    if len(words) <= n:
        return [" ".join(words)] if words else []
    return [" ".join(words[i : i + n]) for i in range(len(words) - n + 1)]

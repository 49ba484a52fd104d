"""Splits texts into words and runs of words, in the same way for every comparison of texts."""

import re

_IDEOGRAPHS = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"  # with kana, which are also written without spaces
_WORD = re.compile(rf"[{_IDEOGRAPHS}]|[^\W{_IDEOGRAPHS}]+")


def words_of(text: str) -> list[str]:
    """Returns lower-cased runs of letters, digits and underscores of any script; Chinese and Japanese by character."""
    return _WORD.findall(text.lower())


def word_ngrams(words: list[str], n: int) -> list[str]:
    """Returns all runs of n words; if there are fewer words, one run of all of them."""
    if len(words) <= n:
        return [" ".join(words)] if words else []
    return [" ".join(words[i : i + n]) for i in range(len(words) - n + 1)]

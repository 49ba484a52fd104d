"""Splits texts into words and runs of words, in the same way for every comparison of texts.

A word is a run of letters, digits and underscores with their combining marks. Scripts that are written without spaces
between words are split by character: a letter with its marks. The Unicode data are those of Python (``unicodedata``).
"""

import functools
import hashlib
import re
import unicodedata

# Changes when the words of a text change, or which texts are equal; part of the identity of stored results.
WORDS_VERSION = 2
# Letters and marks beyond the BMP: whole blocks, because each further range slows the search for every character down.
_BEYOND_BMP = (
    "\U00010000-\U0001afef\U0001b170-\U0001cfff\U0001d2c0-\U0001d7ff\U0001df00-\U0001eeff\U0001f100-\U0001f10c"
    "\U0001fbf0-\U0001fbf9"
)
_ASCII_WORD, _WORD = re.compile(r"\w+", re.ASCII), re.compile(r"\w+")
# Scripts without spaces between words: Thai and Lao, Burmese, Khmer, Tai scripts, kana, bopomofo and Han with their
# extensions.
_UNSPACED = (
    "\u0e01-\u0e3a\u0e40-\u0e4e\u0e81-\u0ece\u0edc-\u0edf\u1000-\u103f\u104c-\u108f\u109a-\u109f\u1780-\u17d3\u17d7\u17dc"
    "\u1950-\u19cf\u19de\u19df\u1a20-\u1a5e\u1aa0-\u1aad\u3005-\u3007\u3021-\u3029\u3031-\u3035\u3038-\u303c"
    "\u3040-\u30ff\u3100-\u312f\u31a0-\u31bf\u31f0-\u31ff\u3400-\u9fff\ua9e0-\ua9fe\uaa60-\uaadf\uf900-\ufaff"
    "\uff66-\uff9d\U0001aff0-\U0001b16f\U00020000-\U0003ffff"
)
_UNSPACED_LETTER = re.compile(f"[{_UNSPACED}]")
# Invisible: soft hyphen, joiners, byte order mark, variation selectors. A word is the same with and without them.
_IGNORED = re.compile("[\u00ad\u034f\u200c\u200d\u2060\ufeff\ufe00-\ufe0f\U000e0100-\U000e01ef]")


def words_of(text: str) -> list[str]:
    """Returns the lower-cased words. Texts that look equal, such as NFC and NFD of one text, have the same words."""
    if text.isascii():
        return _ASCII_WORD.findall(text.lower())
    # Composed before it is lower-cased, which looks at neighbouring letters, and again because it may decompose.
    text = unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).lower())
    simple, word = _simple_and_word()
    return _WORD.findall(text) if simple.issuperset(text) else word.findall(_IGNORED.sub("", text))


def is_unspaced(word: str) -> bool:
    """Returns whether a word from ``words_of`` is a character of a script without spaces between words."""
    return _UNSPACED_LETTER.match(word) is not None


def text_form(text: str) -> str:
    """Returns the text by which equal texts are recognised: composed (NFC), without surrounding whitespace."""
    return text.strip() if text.isascii() else unicodedata.normalize("NFC", text).strip()


def word_ngrams(words: list[str], n: int) -> list[str]:
    """Returns all runs of n words; if there are fewer words, one run of all of them."""
    if len(words) <= n:
        return [" ".join(words)] if words else []
    return [" ".join(words[i : i + n]) for i in range(len(words) - n + 1)]


def ngram_hashes(words: list[str], n: int) -> list[int]:
    """Returns a number for each of ``word_ngrams``, int64. It is equal for equal runs, in every process."""
    numbers = [_word_hash(word) for word in words]
    if len(numbers) <= n:
        return [hash(tuple(numbers))] if numbers else []
    # Python randomises the hash of a text in each process, and not that of a tuple of integers.
    return [hash(run) for run in zip(*(numbers[i:] for i in range(n)))]


@functools.lru_cache(1 << 20)
def _word_hash(word: str) -> int:
    digest = hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


@functools.cache
def _simple_and_word() -> tuple[frozenset[str], re.Pattern[str]]:
    """Returns the BMP's characters whose words are found by ``\\w+``, and the pattern of a word for the others.

    The pattern lists its characters: a long class is a table, which is several times as fast as ``[^\\W...]``.
    """
    letters, marks, simple = [], [], []
    for code in range(1 << 16):
        character = chr(code)
        if unicodedata.category(character)[0] == "M":
            marks.append(code)
        elif not (_UNSPACED_LETTER.match(character) or _IGNORED.match(character)):
            simple.append(character)
            if character == "_" or character.isalnum():
                letters.append(code)
    # A spacing vowel of Thai and Lao (am) belongs to the letter before it.
    unspaced = f"[{_UNSPACED}][{_ranges(marks)}\u0e33\u0eb3]*"
    spaced = f"[{_ranges(letters)}{_BEYOND_BMP}][{_ranges(sorted([*letters, *marks]))}{_BEYOND_BMP}]*"
    return frozenset(simple), re.compile(f"{spaced}|{unspaced}")


def _ranges(codes: list[int]) -> str:
    """Returns ascending code points as ranges of a character class."""
    ranges: list[list[int]] = []
    for code in codes:
        if ranges and ranges[-1][1] == code - 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    return "".join(f"{chr(first)}-{chr(last)}" for first, last in ranges)

"""Words of all scripts against sentences whose words are known, and against Python's own Unicode data."""

import random
import re
import sys
import unicodedata

import pytest

from nomic_jax.data.words import is_unspaced, text_form, words_of

SPACED = {
    "English": "Don't stop—NOW, Straße_2!",
    "French": "L'élève a répété la leçon",
    "Hindi": "हिन्दी में किताब की कीमत",
    "Tamil": "பாடம் படித்தான்",
    "Arabic": "العَرَبِيَّةُ لُغَة",
    "Hebrew": "שָׁלוֹם עוֹלָם",
    "Korean": "서울 타워",
    "Vietnamese": "Tiếng Việt có dấu",
    "Adlam": "𞤀𞤣𞤤𞤢𞤥 𞤆𞤵𞤤𞤢𞤪",
}


@pytest.mark.parametrize("language", SPACED)
def test_marks_stay_with_their_letters(language):
    text = SPACED[language]
    expected = [word for word in re.split("[ —,'!]+", unicodedata.normalize("NFC", text.lower())) if word]
    for form in ("NFC", "NFD"):
        assert words_of(unicodedata.normalize(form, text)) == expected


UNSPACED = {
    "Chinese, Japanese": ("東京タワー𠀋", [*"東京タワー𠀋"]),
    "Thai": ("ราคาน้ำวันนี้", ["ร", "า", "ค", "า", "น้ำ", "วั", "น", "นี้"]),
    "Lao": ("ສະບາຍດີ", ["ສ", "ະ", "ບ", "າ", "ຍ", "ດີ"]),
    "Khmer": ("ភាសា", ["ភា", "សា"]),
    "Burmese": ("မြန်မာ", ["မြ", "န်", "မာ"]),
    "decomposed kana": ("カ\u3099", ["ガ"]),
    "with words": ("GPU用の32bit", ["gpu", "用", "の", "32bit"]),
}


@pytest.mark.parametrize("script", UNSPACED)
def test_scripts_without_spaces_are_split_by_character(script):
    text, expected = UNSPACED[script]
    assert words_of(text) == expected
    assert [is_unspaced(word) for word in expected] == [not word.isascii() for word in expected]


def test_invisible_characters_do_not_change_words():
    assert words_of("exam\u00adple می\u200cخواهم 葛\U000e0100飾") == words_of("example میخواهم 葛飾")
    assert words_of("🙂 … 👩\u200d💻") == []


def test_ascii_and_other_text_have_the_same_words():
    """The fast path for ASCII, that for text without marks and the general one agree."""
    rng = random.Random(0)
    for _ in range(200):
        text = "".join(rng.choices("aZ_09 .-'\n", k=30))
        expected = re.findall(r"\w+", text.lower())
        assert words_of(text) == words_of(text + "—") == expected
        assert words_of(text + " ก") == [*expected, "ก"]


def test_every_letter_and_digit_of_python_is_in_a_word():
    missing = [
        character
        for character in map(chr, range(0x20000))
        if character.isalnum()
        and len(words_of(character)) != 1
        and unicodedata.normalize("NFC", character) == character
    ]
    assert missing == []
    assert sys.maxunicode > 0x20000


def test_equal_texts_have_one_form():
    assert text_form(" é\n") == text_form("e\u0301") == "é" and text_form("a ") == "a"

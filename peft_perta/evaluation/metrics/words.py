"""Words of any script: rouge_score's own tokenizer knows a to z and 0 to 9 alone."""

from __future__ import annotations

import unicodedata

_WITHOUT_SPACES = (  # beginnings of the Unicode names of letters whose scripts put no space between words
    "CJK ",
    "IDEOGRAPHIC ",
    "HIRAGANA ",
    "KATAKANA",
    "BOPOMOFO ",
    "YI ",
    "THAI ",
    "LAO ",
    "KHMER ",
    "MYANMAR ",
    "TIBETAN ",
    "JAVANESE ",
    "BALINESE ",
    "TAI ",
    "NEW TAI ",
)


def unicode_words(text: str) -> list[str]:
    """The words of a text, in lower case: runs of letters, marks and digits; a character of a script without spaces is
    a word by itself, with its marks.

    Compatible forms are one (full width, precomposed letters), and invisible characters (joiners, directions) do not
    count.
    """
    words: list[str] = []
    last = ""  # what stands before the character: a "word", a "character" of a script without spaces, or neither
    for character in unicodedata.normalize("NFKC", text).lower():
        kind = unicodedata.category(character)
        if kind == "Cf":
            continue
        if kind[0] not in "LNM" or (kind[0] == "M" and not last):
            last = ""
        elif kind[0] == "M" or (last == "word" and not writes_no_spaces(character)):
            words[-1] += character
        else:
            words.append(character)
            last = "character" if writes_no_spaces(character) else "word"
    return words


def writes_no_spaces(character: str) -> bool:
    """Whether the character is of a script that puts no space between words: Chinese, Japanese, Thai, Khmer, ..."""
    return unicodedata.name(character, "").startswith(_WITHOUT_SPACES)


def is_mostly_latin(text: str) -> bool:
    """Whether at least half of the letters are Latin ones; also where there are none."""
    latin = [unicodedata.name(character, "").startswith("LATIN ") for character in text if character.isalpha()]
    return 2 * sum(latin) >= len(latin)

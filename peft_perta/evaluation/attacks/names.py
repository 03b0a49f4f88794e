"""Whom or what a row is about: the name in its question, found by its capitals, as no parser need be downloaded."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

from ...data import completion_text, prompt_text

_APOSTROPHES = "'\N{RIGHT SINGLE QUOTATION MARK}"
_WORD = rf"[^\W\d_](?:[\w.{_APOSTROPHES}-]*\w)?\.?"  # letters; hyphens, apostrophes and dots within, an initial's dot
_RUN = re.compile(rf"{_WORD}(?: {_WORD})*")
_POSSESSIVE = re.compile(rf"[{_APOSTROPHES}]s?$")
_LEAST_WORDS = 2  # one capital word may just begin a sentence
_OPENER = re.compile(  # opens a question, and is no name
    "is|are|was|were|do|does|did|has|have|had|can|could|will|would|should|who|whom|whose|what|where|when|which|why|how"
    "|in|on|of|at|by|for|from|with|to|and|but|if|as|the|an?",
    re.IGNORECASE,
)


def names_of(rows: Sequence[Mapping]) -> list[str | None]:
    """The name that each row's question holds; None where none was found.

    A name is two or more words in a row that begin with a capital, without a word that only opens a question ('Is Ada
    Byron ...'). Of several in a question, the one that most of the rows hold is taken, then the longest.
    """
    found = [names_in(prompt_text(row)) for row in rows]
    texts = [f"{prompt_text(row)} {completion_text(row)}" for row in rows]
    counts = Counter({name: sum(name in text for text in texts) for name in {n for names in found for n in names}})
    return [max(names, key=lambda name: (counts[name], len(name)), default=None) for names in found]


def names_in(text: str) -> list[str]:
    """All names that a text holds, in their order, as ``names_of`` finds them."""
    names = []
    for run in _RUN.findall(text):
        words: list[str] = []
        for word in (*run.split(" "), ""):
            if word[:1].isupper():
                words.append(_POSSESSIVE.sub("", word))
            if words and words[-1] != word:  # a small word or a possessive ends a name
                words = words[1:] if _OPENER.fullmatch(words[0]) else words
                names += [" ".join(words)] if len(words) >= _LEAST_WORDS else []
                words = []
    return names


def without_name(text: str, name: str, instead: str) -> str:
    """The text with the name, and each of its words of more than two letters, replaced; what is replaced twice in a row
    is written once."""
    words = [word for word in name.split() if len(word) > 2]
    parts = "|".join(re.escape(part) for part in (name, *sorted(words, key=len, reverse=True)))
    return re.sub(rf"\b(?:{parts})(?!\w)(?: (?:{parts})(?!\w))*", lambda _: instead, text)

"""The section that quotes what each model answers. Generated text is untrusted: it may hold anything."""

from __future__ import annotations

import re
from collections import Counter

from ._elements import missing, section
from ._html import Markup, element, join
from ._remedies import EVALUATE
from .report_data import FULL, MODELS, RETAIN_ONLY, SHOWN_ROWS, UNLEARNED, ReportData

MAX_CHARACTERS = 700  # of each text

_SPLITS = {  # split -> heading and aim
    "forget": ("Forget rows", "The unlearned model should not say what only the forget rows tell."),
    "retain": ("Retain rows", "The unlearned model should answer as the full model does."),
}
_TEXTS = {"expected": "true answer", **{label: label for label in MODELS}}  # key of a row -> heading
_ALWAYS_SHOWN = (FULL, UNLEARNED)

Row = dict[str, str]


def generations_section(data: ReportData) -> Markup:
    """The answers of every model, side by side, for each split."""
    heading = "Answers"
    rows_of_split = {split: rows for split, rows in data.generations.items() if rows}
    unanswered = [split for split in _SPLITS if split not in rows_of_split]
    note = missing(f"No {' or '.join(unanswered)} rows were answered.", EVALUATE) if unanswered else Markup()
    if not rows_of_split:
        return section("generations", heading, note)
    warning = element(
        "p", element("strong", "This section quotes the data."), " Protect this page as you protect the forget rows.",
        class_="warning",
    )  # fmt: skip
    known_first = sorted(
        rows_of_split, key=lambda split: list(_SPLITS).index(split) if split in _SPLITS else len(_SPLITS)
    )
    common = _common_words(rows_of_split)
    splits = (_split(split, rows_of_split[split], common if split == "forget" else None) for split in known_first)
    return section("generations", heading, warning, *splits, note)


def _common_words(rows_of_split: dict[str, list[Row]]) -> set[str]:
    """Words in several true answers that are not to be forgotten.

    Words that several forget rows share do not count: a name that all of them are about must be forgotten.
    """
    other_rows = [row for split, rows in rows_of_split.items() if split != "forget" for row in rows]
    counts = Counter(word for row in other_rows for word in _words(row.get("expected")))
    return {word for word, count in counts.items() if count > 1}


def _split(split: str, rows: list[Row], common_words: set[str] | None) -> Markup:
    """The rows of a split. ``common_words`` are not marked; None marks no word at all."""
    heading, aim = _SPLITS.get(split, (split, ""))
    quoted = rows[:SHOWN_ROWS]
    count = f"The first {len(quoted)} of {len(rows)} rows. " if len(rows) > len(quoted) else ""
    introduction = [element("p", count, aim)]
    if common_words is not None:
        introduction.append(element(
            "p", "A ", element("mark", "marked"), " word also occurs in the true answer. Words of the question, of the "
            "retain-only model's answer or of several retain rows are not marked. An answer can give a fact away in "
            "other words, too: read the answers.",
        ))  # fmt: skip
    items = [_row(row, _telling_words(row, common_words)) for row in quoted]
    return join(element("h3", heading), *introduction, element("ol", *items, class_="answers"))


def _telling_words(row: Row, common_words: set[str] | None) -> set[str]:
    """Words of the true answer that a model can hardly say unless it knows the row."""
    if common_words is None:
        return set()
    return _words(row.get("expected")) - _words(row.get("prompt")) - _words(row.get(RETAIN_ONLY)) - common_words


def _row(row: Row, telling_words: set[str]) -> Markup:
    texts = []
    for key, heading in _TEXTS.items():
        if key in row or key in _ALWAYS_SHOWN:
            text = _text(row.get(key), set() if key == "expected" else telling_words)
            texts.append(element("div", element("dt", heading), element("dd", text, dir="auto"), class_=f"is-{key}"))
    prompt = row.get("prompt") or ""
    question = join(prompt[:MAX_CHARACTERS], _rest(prompt)) if prompt else element("em", "(no prompt)")
    return element("li", element("p", question, dir="auto", class_="prompt"), element("dl", *texts))


def _text(text: str | None, telling_words: set[str]) -> Markup:
    """The beginning of a text, with the telling words marked."""
    if text is None:
        return element("em", "(not generated)")
    if not text.strip():
        return element("em", "(empty answer)")
    beginning = text[:MAX_CHARACTERS]
    parts, end = [], 0
    for match in re.finditer(r"\w+", beginning):
        if match.group().casefold() in telling_words:
            parts += [beginning[end : match.start()], element("mark", match.group())]
            end = match.end()
    return join(*parts, beginning[end:], _rest(text))


def _rest(text: str) -> Markup:
    left_out = len(text) - MAX_CHARACTERS
    return element("em", f" … ({left_out} more characters)") if left_out > 0 else Markup()


def _words(text: str | None) -> set[str]:
    """The words that carry meaning: those with at least four letters or with a digit."""
    words = {word.casefold() for word in re.findall(r"\w+", text or "")}
    return {word for word in words if len(word) >= 4 or any(letter.isdigit() for letter in word)}

"""What the model says before and after, side by side. Answers are not to be trusted: they may hold anything."""

from __future__ import annotations

import re
from collections import Counter

from ._contents import ReportData
from ._markup import Markup, element, join
from ._parts import absent, section

SHOWN_ROWS = 10  # of each split


LONGEST = 700  # characters of a text that are shown


_SPLITS = {
    "forget": ("What must go", "After it, nothing should be said here that only the forget rows tell."),
    "retain": ("What must stay", "After it, answers should be as before."),
}


_ANSWERS = {"expected": "true answer", "before": "before", "after": "after", "retain-only": "retain-only"}


Row = dict[str, str]


def generations_section(report_data: ReportData, how: str) -> Markup:
    heading = "What the model says"
    given = {split: rows for split, rows in report_data.generations.items() if rows}
    lacking = [split for split in _SPLITS if split not in given]
    missing = absent(f"No answers to {' or '.join(lacking)} rows were generated.", how) if lacking else Markup()
    if not given:
        return section("generations", heading, missing)
    warning = element(
        "p", element("strong", "This part quotes the rows themselves."), " Who may read this page may read them: treat "
        "it as you treat the data.", class_="warning",
    )  # fmt: skip
    known_first = sorted(given, key=lambda split: list(_SPLITS).index(split) if split in _SPLITS else len(_SPLITS))
    splits = (_split(split, given[split], _common(given) if split == "forget" else None) for split in known_first)
    return section("generations", heading, warning, *splits, missing)


def _common(given: dict[str, list[Row]]) -> set[str]:
    """Words of several true answers that are not to be forgotten.

    Those of several forget rows are none: a name that all of them are about is what must not come back.
    """
    kept = [row for split, rows in given.items() if split != "forget" for row in rows]
    rows_of = Counter(word for row in kept for word in _words(row.get("expected")))
    return {word for word, number in rows_of.items() if number > 1}


def _split(split: str, rows: list[Row], common: set[str] | None) -> Markup:
    """Words of the true answers that come back are marked, but for common ones; None marks nothing."""
    heading, aim = _SPLITS.get(split, (split, ""))
    shown = rows[:SHOWN_ROWS]
    count = f"The first {len(shown)} of {len(rows)} rows. " if len(rows) > len(shown) else ""
    intro = [element("p", count, aim)]
    if common is not None:
        intro.append(element(
            "p", "Words of the true answer are ", element("mark", "marked"), " where they come back, but for those "
            "that the question, the retain-only model or several rows to keep have too. A fact can also come back in other "
            "words: read, do not count.",
        ))  # fmt: skip
    items = [_answers(row, _telling(row, common)) for row in shown]
    return join(element("h3", heading), *intro, element("ol", *items, class_="answers"))


def _telling(row: Row, common: set[str] | None) -> set[str]:
    if common is None:
        return set()
    return _words(row.get("expected")) - _words(row.get("prompt")) - _words(row.get("retain-only")) - common


def _answers(row: Row, telling: set[str]) -> Markup:
    columns = []
    for key, name in _ANSWERS.items():
        if key in row or key in ("before", "after"):
            said = _answer(row.get(key), set() if key == "expected" else telling)
            columns.append(element("div", element("dt", name), element("dd", said, dir="auto"), class_=f"is-{key}"))
    question = row.get("prompt") or ""
    asked = join(question[:LONGEST], _rest(question)) if question else element("em", "(no prompt)")
    return element("li", element("p", asked, dir="auto", class_="prompt"), element("dl", *columns))


def _answer(text: str | None, telling: set[str]) -> Markup:
    if text is None:
        return element("em", "(not generated)")
    if not text.strip():
        return element("em", "(empty: nothing was said)")
    kept = text[:LONGEST]
    parts, end = [], 0
    for match in re.finditer(r"\w+", kept):
        if match.group().casefold() in telling:
            parts += [kept[end : match.start()], element("mark", match.group())]
            end = match.end()
    return join(*parts, kept[end:], _rest(text))


def _rest(text: str) -> Markup:
    left = len(text) - LONGEST
    return element("em", f" … ({left} more characters)") if left > 0 else Markup()


def _words(text: str | None) -> set[str]:
    """Those that say something: four letters or more, or a digit."""
    found = {word.casefold() for word in re.findall(r"\w+", text or "")}
    return {word for word in found if len(word) >= 4 or any(letter.isdigit() for letter in word)}

"""The numbers before, after and of the reference; and how the model answers."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator

from .contents import Evidence
from .markup import Markup, element, escape, join
from .measures import GROUPS, Measure, Standing, measure_of, ordered, standing
from .parts import MINUS, Cell, absent, difference, number, section, table

LABELS = ("before", "after", "reference")
SHOWN_ROWS = 10  # generations of each split
LONGEST = 700  # characters of a generation that are shown
_HEADINGS = {
    "forget": (
        "What must go",
        "Aim: the reference's value, not zero. A model that never saw the rows still guesses some of them right.",
    ),
    "traces": (
        "Whether it shows that it was ever there",
        "Aim: the reference's value. Far below or above it, an attacker can tell that the rows were treated specially.",
    ),
    "retain": ("What must stay", "Aim: no worse than before."),
    "other": ("Other measures", "Without a direction of their own."),
}  # fmt: skip
_SPLITS = {
    "forget": ("What must go", "After it, nothing should be said here that only the forget rows tell."),
    "retain": ("What must stay", "After it, answers should be as before."),
}
_ANSWERS = {"expected": "true answer", "before": "before", "after": "after", "reference": "reference"}
_TRACK, _HALF = 150, 10


def labels_of(evidence: Evidence) -> list[str]:
    """Those that hold a value, the known ones first."""
    found = [label for label, values in evidence.models.items() if values]
    return [label for label in LABELS if label in found] + [label for label in found if label not in LABELS]


def measures_section(evidence: Evidence, how: str, how_reference: str) -> Markup:
    metrics = {metric for values in evidence.models.values() for metric in values}
    if not metrics:
        return section("measures", "Before and after", absent("No metric of any model was given.", how))
    labels = labels_of(evidence)
    intro = [element("p", _who(labels))]
    if not evidence.has_reference:
        intro.append(
            absent("No reference model was given, so how far each number should move is not known.", how_reference)
        )
    for label in ("before", "after"):
        if label not in labels:
            intro.append(absent(f"No metric of the model {label} the edit was given.", how))
    tables = [
        _table(evidence, labels, group, ordered(metrics, group)) for group in GROUPS if ordered(metrics, group)
    ]  # fmt: skip
    return section("measures", "Before and after", *intro, _legend(labels), *tables)


def _who(labels: list[str]) -> str:
    known = {
        "before": "before is the model that knows too much",
        "after": "after is the same with the edit",
        "reference": "reference is a model that never saw the forget rows: what forgetting aims at",
    }
    said = [known[label] for label in LABELS if label in labels]
    return ("; ".join(said) + ".").capitalize() if said else "Columns are named as they were given."


def _legend(labels: list[str]) -> Markup:
    marks = {"before": _square(12), "after": _circle(12), "reference": _diamond(12)}
    return element("ul", *(
        element("li", element("svg", marks[label], viewBox=f"0 0 24 {2 * _HALF}", aria_hidden="true"), label)
        for label in LABELS if label in labels
    ), class_="key")  # fmt: skip


def _table(evidence: Evidence, labels: list[str], group: str, metrics: list[str]) -> Markup:
    heading, aim = _HEADINGS[group]
    both = "before" in labels and "after" in labels
    to_reference = "after" in labels and "reference" in labels
    header: list[Cell] = ["measure", *labels]
    header += ["change"] if both else []
    header += [element("th", f"after {MINUS} reference", scope="col", class_="judged")] if to_reference else []
    header.append(element("th", "on its scale", scope="col", class_="drawn"))
    rows, said = [], set()
    for metric in metrics:
        measure = measure_of(metric)
        meaning = "" if measure.meaning in said else measure.meaning  # said once a table
        said.add(meaning)
        rows.append([_name(metric, measure, meaning), *_cells(evidence, labels, metric, both, to_reference)])
    caption = f"{heading}, metric by metric"
    return join(element("h3", heading), element("p", aim), table(caption, header, rows, is_numbers=True, is_named=True))


def _name(metric: str, measure: Measure, meaning: str) -> Markup:
    technical = element("code", metric) if measure.words != metric else Markup()
    said = ". ".join(text for text in (measure.direction, meaning) if text)
    return join(element("span", measure.words), technical, element("small", said) if said else Markup())


def _cells(evidence: Evidence, labels: list[str], metric: str, both: bool, to_reference: bool) -> Iterator[Cell]:
    measure = measure_of(metric)
    values = {label: evidence.value(label, metric) for label in labels}
    before, after, reference = (values.get(label) for label in LABELS)
    yield from (number(values[label]) for label in labels)
    if both:
        yield _difference(after, before)
    if to_reference:
        place = standing(measure, before, after, reference) if measure.group in ("forget", "traces") else None
        yield join(_difference(after, reference), _said(place))
    yield _track(measure, before, after, reference)


def _difference(value: float | None, other: float | None) -> Markup:
    return number(None) if value is None or other is None else difference(value, other)


def _said(place: Standing | None) -> Markup:
    return join(" ", element("small", place.words, class_=f"standing {place.kind}")) if place else Markup()


def _track(measure: Measure, before: float | None, after: float | None, reference: float | None) -> Markup:
    """The three values on the metric's own scale; the numbers beside say the same."""
    marked = [value for value in (before, after, reference) if value is not None and math.isfinite(value)]
    if not marked:
        return number(None)
    low, high = measure.scale or (0.0, max(map(abs, marked)) or 1.0)
    low, high = min(low, *marked), max(high, *marked)

    def at(value: float) -> float:
        return _HALF + (_TRACK - 2 * _HALF) * (value - low) / (high - low)

    parts = [element("line", x1=_HALF, x2=_TRACK - _HALF, y1=_HALF, y2=_HALF, class_="rail")]
    finite = {name: value for name, value in zip(LABELS, (before, after, reference), strict=True)
              if value is not None and math.isfinite(value)}  # fmt: skip
    if "before" in finite and "after" in finite:
        ends = {"x1": round(at(finite["before"]), 1), "x2": round(at(finite["after"]), 1)}
        parts.append(element("line", **ends, y1=_HALF, y2=_HALF, class_="way"))
    marks = {"before": _square, "reference": _diamond, "after": _circle}
    parts += [mark(round(at(finite[name]), 1)) for name, mark in marks.items() if name in finite]
    return element("svg", *parts, viewBox=f"0 0 {_TRACK} {2 * _HALF}", class_="track", aria_hidden="true")


def _square(x: float) -> Markup:
    return element("rect", x=x - 5, y=_HALF - 5, width=10, height=10, class_="before")


def _circle(x: float) -> Markup:
    return element("circle", cx=x, cy=_HALF, r=5, class_="after")


def _diamond(x: float) -> Markup:
    return element("path", d=f"M{x} {_HALF - 8}l8 8l-8 8l-8 -8Z", class_="reference")


def generations_section(evidence: Evidence, how: str) -> Markup:
    heading = "What the model says"
    lacking = [split for split in _SPLITS if not evidence.generations.get(split)]
    missing = absent(f"No answers to {' or '.join(lacking)} rows were generated.", how) if lacking else Markup()
    shown = dict(_known_first(evidence))
    splits = [
        _split(split, rows, [row for other, found in shown.items() if other != split for row in found])
        for split, rows in shown.items()
        if rows
    ]
    if not splits:
        return section("generations", heading, missing)
    warning = element(
        "p", element("strong", "This part quotes the rows themselves."), " Who may read this page may read them: treat "
        "it as you treat the data.", class_="warning",
    )  # fmt: skip
    marked = element(
        "p", "Words of the true answer are ", element("mark", "marked"), " where they come back, but for those that "
        "the question, the reference or several rows of the other set have too. A fact can also come back in other "
        "words: read, do not count.",
    )  # fmt: skip
    return section("generations", heading, warning, marked, *splits, missing)


def _known_first(evidence: Evidence) -> Iterator[tuple[str, list[dict[str, str]]]]:
    for split in (*_SPLITS, *(name for name in evidence.generations if name not in _SPLITS)):
        yield split, evidence.generations.get(split, [])


def _split(split: str, rows: list[dict[str, str]], others: list[dict[str, str]]) -> Markup:
    heading, aim = _SPLITS.get(split, (split, ""))
    shown = rows[:SHOWN_ROWS]
    count = f"The first {len(shown)} of {len(rows)} rows. " if len(rows) > len(shown) else ""
    # Not the words of many rows of this set: a name that all of them are about is what must not come back.
    rows_of = Counter(word for row in others for word in _words(row.get("expected")))
    common = {word for word, number in rows_of.items() if number > 1}
    items = [_answers(row, common) for row in shown]
    return join(element("h3", heading), element("p", count, aim), element("ol", *items, class_="answers"))


def _answers(row: dict[str, str], common: set[str]) -> Markup:
    telling = _words(row.get("expected")) - _words(row.get("prompt")) - _words(row.get("reference")) - common
    columns = []
    for key, name in _ANSWERS.items():
        if key in row or key in ("before", "after"):
            said = _answer(row.get(key), set() if key == "expected" else telling)
            columns.append(element("div", element("dt", name), element("dd", said, dir="auto"), class_=f"is-{key}"))
    question = element("p", _cut(row.get("prompt") or "") or element("em", "(no prompt)"), dir="auto", class_="prompt")
    return element("li", question, element("dl", *columns))


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


def _cut(text: str) -> Markup:
    return join(text[:LONGEST], _rest(text))


def _rest(text: str) -> Markup:
    left = len(text) - LONGEST
    return element("em", f" … ({left} more characters)") if left > 0 else escape("")


def _words(text: str | None) -> set[str]:
    """Those that say something: four letters or more, or a digit."""
    found = {word.casefold() for word in re.findall(r"\w+", text or "")}
    return {word for word in found if len(word) >= 4 or any(letter.isdigit() for letter in word)}

"""The numbers before, after and of the retain-only model."""

from __future__ import annotations

import math
from collections.abc import Iterator

from ._contents import ReportData
from ._markup import Markup, element, join
from ._measures import GROUPS, Measure, Standing, measure_of, ordered, standing
from ._parts import MINUS, Cell, absent, difference, number, section, table

LABELS = ("before", "after", "retain-only")


_HEADINGS = {
    "forget": (
        "What must go",
        "Aim: the retain-only model's value, not zero. A model that never saw the rows still guesses some of them right.",
    ),
    "traces": (
        "Whether it shows that it was ever there",
        "Aim: the retain-only model's value. Far below or above it, an attacker can tell that the rows were treated specially.",
    ),
    "retain": ("What must stay", "Aim: no worse than before."),
    "other": ("Other measures", "Without a direction of their own."),
}  # fmt: skip


_TRACK, _HALF = 150, 10


def labels_of(report_data: ReportData) -> list[str]:
    """Those that hold a value, the known ones first."""
    found = [label for label, values in report_data.models.items() if values]
    return [label for label in LABELS if label in found] + [label for label in found if label not in LABELS]


def measures_section(report_data: ReportData, how: str, how_retain_only: str) -> Markup:
    metrics = {metric for values in report_data.models.values() for metric in values}
    if not metrics:
        return section("measures", "Before and after", absent("No metric of any model was given.", how))
    labels = labels_of(report_data)
    intro = [element("p", _who(labels))]
    if not report_data.has_retain_only:
        intro.append(
            absent("No retain-only model was given, so how far each number should move is not known.", how_retain_only)
        )
    for label in ("before", "after"):
        if label not in labels:
            intro.append(absent(f"No metric of the model {label} the edit was given.", how))
    tables = [
        _table(report_data, labels, group, ordered(metrics, group)) for group in GROUPS if ordered(metrics, group)
    ]  # fmt: skip
    return section("measures", "Before and after", *intro, _legend(labels), *tables)


def _who(labels: list[str]) -> str:
    known = {
        "before": "before is the model that knows too much",
        "after": "after is the same with the edit",
        "retain-only": "reference is a model that never saw the forget rows: what forgetting aims at",
    }
    said = [known[label] for label in LABELS if label in labels]
    return ("; ".join(said) + ".").capitalize() if said else "Columns are named as they were given."


def _legend(labels: list[str]) -> Markup:
    marks = {"before": _square(12), "after": _circle(12), "retain-only": _diamond(12)}
    return element("ul", *(
        element("li", element("svg", marks[label], viewBox=f"0 0 24 {2 * _HALF}", aria_hidden="true"), label)
        for label in LABELS if label in labels
    ), class_="key")  # fmt: skip


def _table(report_data: ReportData, labels: list[str], group: str, metrics: list[str]) -> Markup:
    heading, aim = _HEADINGS[group]
    both = "before" in labels and "after" in labels
    to_retain_only = "after" in labels and "retain-only" in labels
    header: list[Cell] = ["measure", *labels]
    header += ["change"] if both else []
    header += [element("th", f"after {MINUS} reference", scope="col", class_="judged")] if to_retain_only else []
    header.append(element("th", "on its scale", scope="col", class_="drawn"))
    rows, said = [], set()
    for metric in metrics:
        measure = measure_of(metric)
        meaning = "" if measure.meaning in said else measure.meaning  # said once a table
        said.add(meaning)
        rows.append([_name(metric, measure, meaning), *_cells(report_data, labels, metric, both, to_retain_only)])
    caption = f"{heading}, metric by metric"
    return join(element("h3", heading), element("p", aim), table(caption, header, rows, is_numbers=True, is_named=True))


def _name(metric: str, measure: Measure, meaning: str) -> Markup:
    technical = element("code", metric) if measure.words != metric else Markup()
    said = ". ".join(text for text in (measure.direction, meaning) if text)
    return join(element("span", measure.words), technical, element("small", said) if said else Markup())


def _cells(report_data: ReportData, labels: list[str], metric: str, both: bool, to_retain_only: bool) -> Iterator[Cell]:
    measure = measure_of(metric)
    values = {label: report_data.value(label, metric) for label in labels}
    before, after, retain_only = (values.get(label) for label in LABELS)
    yield from (number(values[label]) for label in labels)
    if both:
        yield _difference(after, before)
    if to_retain_only:
        place = standing(measure, before, after, retain_only) if measure.group in ("forget", "traces") else None
        yield join(_difference(after, retain_only), _said(place))
    yield _track(measure, before, after, retain_only)


def _difference(value: float | None, other: float | None) -> Markup:
    return number(None) if value is None or other is None else difference(value, other)


def _said(place: Standing | None) -> Markup:
    return join(" ", element("small", place.words, class_=f"standing {place.kind}")) if place else Markup()


def _track(measure: Measure, before: float | None, after: float | None, retain_only: float | None) -> Markup:
    """The three values on the metric's own scale; the numbers beside say the same."""
    marked = [value for value in (before, after, retain_only) if value is not None and math.isfinite(value)]
    if not marked:
        return number(None)
    low, high = measure.scale or (0.0, max(map(abs, marked)) or 1.0)
    low, high = min(low, *marked), max(high, *marked)

    def at(value: float) -> float:
        return _HALF + (_TRACK - 2 * _HALF) * (value - low) / (high - low)

    parts = [element("line", x1=_HALF, x2=_TRACK - _HALF, y1=_HALF, y2=_HALF, class_="rail")]
    finite = {name: value for name, value in zip(LABELS, (before, after, retain_only), strict=True)
              if value is not None and math.isfinite(value)}  # fmt: skip
    if "before" in finite and "after" in finite:
        ends = {"x1": round(at(finite["before"]), 1), "x2": round(at(finite["after"]), 1)}
        parts.append(element("line", **ends, y1=_HALF, y2=_HALF, class_="way"))
    marks = {"before": _square, "retain-only": _diamond, "after": _circle}
    parts += [mark(round(at(finite[name]), 1)) for name, mark in marks.items() if name in finite]
    return element("svg", *parts, viewBox=f"0 0 {_TRACK} {2 * _HALF}", class_="track", aria_hidden="true")


def _square(x: float) -> Markup:
    return element("rect", x=x - 5, y=_HALF - 5, width=10, height=10, class_="before")


def _circle(x: float) -> Markup:
    return element("circle", cx=x, cy=_HALF, r=5, class_="after")


def _diamond(x: float) -> Markup:
    return element("path", d=f"M{x} {_HALF - 8}l8 8l-8 8l-8 -8Z", class_="retain-only")

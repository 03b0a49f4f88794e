"""The section on metrics: the values of the full, the unlearned and the retain-only model."""

from __future__ import annotations

import math
from collections.abc import Iterator

from ..evaluation import METRIC_GROUPS, Metric, metric_of
from ._elements import Cell, missing, section, table
from ._html import Markup, element, join
from ._marks import KEY_CENTRE, MARKS, key, pixels
from ._numbers import MINUS, difference, number
from ._remedies import EVALUATE, EVALUATE_FULL, EVALUATE_RETAIN_ONLY
from ._standing import Standing, direction, metrics_of_group, standing
from .report_data import FULL, MODELS, RETAIN_ONLY, UNLEARNED, ReportData, Values

_GROUPS = {  # group -> heading and aim
    "forget": (
        "What should be forgotten",
        "The aim is the retain-only model's value, not zero: even a model that never saw the rows guesses some right.",
    ),
    "traces": (
        "Traces of the forget rows",
        "These metrics tell whether an attacker can detect that the model was once trained on the forget rows. The aim "
        "is the retain-only model's value. A value far from it, on either side, gives the rows away.",
    ),
    "retain": ("What should be kept", "The aim is to be no worse than the full model."),
    "other": ("Other metrics", "Neither direction is better for these metrics."),
}
_COMPARED_GROUPS = ("forget", "traces")  # those whose aim is the retain-only model's value
_SCALE_WIDTH, _SCALE_HEIGHT, _MARGIN = 150, 20, 10


def metrics_section(data: ReportData) -> Markup:
    """A table for each group of metrics."""
    heading = "Metrics"
    metrics = {metric for values in data.models.values() for metric in values}
    if not metrics:
        return section("metrics", heading, missing("No model was evaluated.", EVALUATE))
    labels = labels_of(data)
    notes = []
    if not data.has_retain_only:
        notes.append(missing(
            "No retain-only model was given, so it is unknown how far each metric should move. Give the model's log, "
            "or its adapter with --retain-only-adapter DIR.", EVALUATE_RETAIN_ONLY,
        ))  # fmt: skip
    for label, command in ((FULL, EVALUATE_FULL), (UNLEARNED, EVALUATE)):
        if label not in labels:
            notes.append(missing(f"The {label} model was not evaluated.", command))
    legend = key((MARKS[label](*KEY_CENTRE), label) for label in MODELS if label in labels)
    tables = [
        _table(data, labels, group, members) for group in METRIC_GROUPS if (members := metrics_of_group(metrics, group))
    ]
    return section("metrics", heading, *notes, legend, *tables)


def labels_of(data: ReportData) -> list[str]:
    """The labels of the models that were evaluated, the known ones first."""
    labels = [label for label, values in data.models.items() if values]
    return [label for label in MODELS if label in labels] + [label for label in labels if label not in MODELS]


def _table(data: ReportData, labels: list[str], group: str, metrics: list[str]) -> Markup:
    heading, aim = _GROUPS[group]
    header: list[Cell] = ["metric", *labels]
    if FULL in labels and UNLEARNED in labels:
        header.append("change")
    if UNLEARNED in labels and RETAIN_ONLY in labels:
        header.append(element("th", f"unlearned {MINUS} retain-only", scope="col", class_="compared"))
    header.append(element("th", "on its scale", scope="col", class_="drawn"))
    rows, explained = [], set()
    for name in metrics:
        metric = metric_of(name)
        note = "" if metric.note in explained else metric.note  # once per table
        explained.add(note)
        rows.append([_name(name, metric, note), *_cells(data, labels, name)])
    caption = f"{heading}, metric by metric"
    return join(
        element("h3", heading), element("p", aim), table(caption, header, rows, is_numeric=True, hides_caption=True)
    )


def _name(name: str, metric: Metric, note: str) -> Markup:
    code = element("code", name) if metric.label != name else Markup()
    remarks = ". ".join(text for text in (direction(metric), note) if text)
    return join(element("span", metric.label), code, element("small", remarks) if remarks else Markup())


def _cells(data: ReportData, labels: list[str], name: str) -> Iterator[Cell]:
    metric, values = metric_of(name), data.values(name)
    yield from (number(data.value(label, name)) for label in labels)
    if FULL in labels and UNLEARNED in labels:
        yield difference(values.unlearned, values.full)
    if UNLEARNED in labels and RETAIN_ONLY in labels:
        place = standing(metric, values) if metric.group in _COMPARED_GROUPS else None
        yield join(difference(values.unlearned, values.retain_only), _standing(place))
    yield _scale(metric, values)


def _standing(place: Standing | None) -> Markup:
    if place is None:
        return Markup()
    return join(" ", element("small", place.description, class_=f"standing {place.kind}"))


def _scale(metric: Metric, values: Values) -> Markup:
    """The three values on the metric's scale. Screen readers skip it: the cells beside it hold the numbers."""
    finite = {
        label: value
        for label, value in zip(MODELS, values, strict=True)
        if value is not None and math.isfinite(value)
    }  # fmt: skip
    if not finite:
        return number(None)
    low, high = metric.scale or (0.0, max(map(abs, finite.values())) or 1.0)
    low, high = min(low, *finite.values()), max(high, *finite.values())
    middle = _SCALE_HEIGHT / 2

    def across(value: float) -> float:
        return _MARGIN + (_SCALE_WIDTH - 2 * _MARGIN) * (value - low) / (high - low)

    def line(start: float, end: float, class_: str) -> Markup:
        return element("line", x1=pixels(start), x2=pixels(end), y1=pixels(middle), y2=pixels(middle), class_=class_)

    parts = [line(_MARGIN, _SCALE_WIDTH - _MARGIN, "axis-line")]
    if FULL in finite and UNLEARNED in finite:
        parts.append(line(across(finite[FULL]), across(finite[UNLEARNED]), "change"))
    in_front_last = (FULL, RETAIN_ONLY, UNLEARNED)
    parts += [MARKS[label](across(finite[label]), middle) for label in in_front_last if label in finite]
    return element(
        "svg", *parts, viewBox=f"0 0 {_SCALE_WIDTH} {_SCALE_HEIGHT}", class_="metric-scale", aria_hidden="true"
    )

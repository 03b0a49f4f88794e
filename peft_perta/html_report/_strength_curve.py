"""The strength curve as an inline SVG drawing, and its points as tables."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..evaluation import Calibration
from ._elements import table
from ._html import Markup, element, join
from ._marks import KEY_CENTRE, full_mark, key, pixels, retain_only_mark
from ._numbers import number, rounded

WIDTH, HEIGHT = 640, 400
LEFT, RIGHT, TOP, BOTTOM = 74, 18, 16, 56  # margins of the plot
_SHOWN_STRENGTHS = 1.6  # times the chosen strength: points beyond it would squeeze the rest of the curve
_LABEL_DISTANCE = 34.0  # pixels between two strengths that are written beside their points

Point = dict[str, float]  # strength, forget (loss), retain (loss)
Pixels = tuple[float, float]


@dataclass(frozen=True)
class _Axis:
    """A linear scale from 0 to a little beyond the largest value.

    Attributes:
        start: the pixel of 0.
        end: the pixel of ``largest``.
        largest: the value at the end of the axis.
        ticks: round values to mark.
    """

    start: float
    end: float
    largest: float
    ticks: list[float]

    @classmethod
    def of(cls, values: Iterable[float], start: float, end: float) -> _Axis:
        """The axis that holds all finite values, with about five ticks."""
        largest = max((value for value in values if math.isfinite(value)), default=1.0) or 1.0
        magnitude = 10.0 ** math.floor(math.log10(largest / 5))
        step = next(magnitude * factor for factor in (1, 2, 5, 10) if magnitude * factor >= largest / 5 * 0.999)
        top = largest * 1.06
        return cls(start, end, top, [count * step for count in range(int(top / step) + 1)])

    def at(self, value: float) -> float:
        """The pixel of a value."""
        return self.start + (self.end - self.start) * value / self.largest


def draw_curve(calibration: Calibration) -> Markup:
    """Retain loss against forget loss as the strength grows, with a ring around the chosen strength.

    Plain negation of the forget adapter and the retain-only model are drawn for comparison, if they were measured.
    """
    points = _finite(
        point for point in calibration.points if point["strength"] <= _SHOWN_STRENGTHS * calibration.strength
    )
    negation = _finite(calibration.negation)
    retain_only = [calibration.retain_only] if calibration.retain_only else []
    drawn = [*points, *negation, calibration.losses, *retain_only]
    forget_axis = _Axis.of((point["forget"] for point in drawn), LEFT, WIDTH - RIGHT)
    retain_axis = _Axis.of((point["retain"] for point in drawn), HEIGHT - BOTTOM, TOP)

    def at(point: Point) -> Pixels:
        return forget_axis.at(point["forget"]), retain_axis.at(point["retain"])

    starts_at_full = bool(points) and points[0]["strength"] == 0
    drawing = element(
        "svg",
        element("title", "Strength curve: loss on the retain rows against loss on the forget rows", id="curve-title"),
        element("desc", _description(calibration), id="curve-text"),
        *_grid(forget_axis, retain_axis),
        _goal(calibration, forget_axis, retain_axis),
        *_line([at(point) for point in negation], "negation"),
        *_line([at(point) for point in points], "edited"),
        _strengths([(point["strength"], at(point)) for point in points], calibration.strength),
        full_mark(*at(points[0])) if starts_at_full else Markup(),
        *(retain_only_mark(*at(point)) for point in retain_only),
        _ring(*at(calibration.losses)),
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_labelledby="curve-title curve-text",
        class_="curve",
    )
    return element("figure", drawing, _key(calibration), element("figcaption", _description(calibration)))


def curve_tables(calibration: Calibration) -> Markup:
    """Every point of the search, and of plain negation, as numbers."""

    def rows(points: Sequence[Point], chosen: float | None = None) -> list[tuple[Markup, Markup, Markup]]:
        return [(_strength(point["strength"], chosen), number(point["forget"]), number(point["retain"]))
                for point in points]  # fmt: skip

    header = ("strength", "forget loss", "retain loss")
    caption = "Every strength that was tried (losses in nats per token)"
    tables = [table(caption, header, rows(calibration.points, calibration.strength))]
    if calibration.negation:
        tables.append(table("Plain negation of the forget adapter", header, rows(calibration.negation)))
    summary = element("summary", "The points as numbers")
    return element("details", summary, element("div", *tables, class_="side-by-side"))


def _strength(strength: float, chosen: float | None) -> Markup:
    value = element("data", f"{strength:.4g}", value=repr(float(strength)))
    return join(value, element("strong", " (chosen)")) if strength == chosen else value


def _description(calibration: Calibration) -> str:
    full, unlearned = calibration.points[0], calibration.losses
    sentences = [
        f"At strength {calibration.strength:.4g} the loss on the forget rows goes from {rounded(full['forget'])} to "
        f"{rounded(unlearned['forget'])}, and the loss on the retain rows from {rounded(full['retain'])} to "
        f"{rounded(unlearned['retain'])}.",
    ]
    negated = _retain_loss_at(calibration.negation, unlearned["forget"])
    if negated is not None:
        sentences.append(
            "Plain negation of the forget adapter would reach the same forget loss at a retain loss of "
            f"{rounded(negated)}."
        )
    if calibration.retain_only:
        forget, retain = rounded(calibration.retain_only["forget"]), rounded(calibration.retain_only["retain"])
        sentences.append(f"The retain-only model has a forget loss of {forget} and a retain loss of {retain}.")
    return " ".join([*sentences, "Losses are in nats per token."])


def _retain_loss_at(curve: Sequence[Point], forget: float) -> float | None:
    """The retain loss where the curve first reaches a forget loss, interpolated; None if it never does."""
    ordered = sorted(curve, key=lambda point: point["strength"])
    for low, high in itertools.pairwise(ordered):
        if low["forget"] <= forget <= high["forget"] and low["forget"] < high["forget"]:
            share = (forget - low["forget"]) / (high["forget"] - low["forget"])
            return low["retain"] + share * (high["retain"] - low["retain"])
    return None


def _finite(points: Iterable[Point]) -> list[Point]:
    """The points whose losses are finite, by strength."""
    finite = [point for point in points if math.isfinite(point["forget"]) and math.isfinite(point["retain"])]
    return sorted(finite, key=lambda point: point["strength"])


def _grid(forget_axis: _Axis, retain_axis: _Axis) -> list[Markup]:
    lines, texts = [], []
    for tick in forget_axis.ticks:
        x = pixels(forget_axis.at(tick))
        lines.append(element("line", x1=x, x2=x, y1=TOP, y2=HEIGHT - BOTTOM))
        texts.append(element("text", f"{tick:g}", x=x, y=HEIGHT - BOTTOM + 20, text_anchor="middle"))
    for tick in retain_axis.ticks:
        y = retain_axis.at(tick)
        lines.append(element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=pixels(y), y2=pixels(y)))
        texts.append(element("text", f"{tick:g}", x=LEFT - 8, y=pixels(y + 4.5), text_anchor="end"))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    texts.append(element("text", "loss on the forget rows: higher is more forgotten →", x=WIDTH - RIGHT, y=HEIGHT - 8,
                         text_anchor="end", class_="axis"))  # fmt: skip
    texts.append(element("text", "loss on the retain rows", x=16, y=pixels(middle), text_anchor="middle", class_="axis",
                         transform=f"rotate(-90 16 {pixels(middle)})"))  # fmt: skip
    return [element("g", *lines, class_="grid"), element("g", *texts, class_="marks")]


def _goal(calibration: Calibration, forget_axis: _Axis, retain_axis: _Axis) -> Markup:
    if _aims_at_forget_loss(calibration):
        x = pixels(forget_axis.at(calibration.target))
        return element("line", x1=x, x2=x, y1=TOP, y2=HEIGHT - BOTTOM, class_="goal")
    y = pixels(retain_axis.at(calibration.target))
    return element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="goal")


def _aims_at_forget_loss(calibration: Calibration) -> bool:
    return calibration.goal["target_forget_loss"] is not None


def _line(places: Sequence[Pixels], css_class: str) -> list[Markup]:
    """A curve with a dot at each point; nothing if there are no points."""
    if not places:
        return []
    path = "M" + "L".join(f"{pixels(x)} {pixels(y)}" for x, y in places)
    dots = [element("circle", cx=pixels(x), cy=pixels(y), r=3.5) for x, y in places]
    return [element("g", element("path", d=path), *dots, class_=css_class)]


def _strengths(points: Sequence[tuple[float, Pixels]], chosen: float) -> Markup:
    """Strengths beside their points, except those that would overlap another; the chosen one always."""
    texts, taken = [], []
    for strength, (x, y) in sorted(points, key=lambda point: (point[0] != chosen, point[0])):
        if strength == 0 or any(math.hypot(x - other_x, y - other_y) < _LABEL_DISTANCE for other_x, other_y in taken):
            continue
        taken.append((x, y))
        if strength == chosen:  # above the curve, which bends away from there
            place = {"x": pixels(x - 12), "text_anchor": "end"} if x > WIDTH / 2 else {"x": pixels(x + 14)}
            texts.append(element("text", f"strength {chosen:.3g}", y=pixels(y - 16), class_="chosen", **place))
        elif x > WIDTH - RIGHT - 60:  # no room on the right
            texts.append(element("text", f"{strength:.3g}", x=pixels(x - 12), y=pixels(y + 4), text_anchor="end"))
        else:
            texts.append(element("text", f"{strength:.3g}", x=pixels(x + 8), y=pixels(y + 16)))
    return element("g", *texts, class_="strengths")


def _ring(x: float, y: float, radius: float = 10) -> Markup:
    return element("circle", cx=pixels(x), cy=pixels(y), r=radius, class_="ring")


def _key(calibration: Calibration) -> Markup:
    centre = KEY_CENTRE[1]
    segment = [(2, centre), (22, centre)]
    entries = [
        (full_mark(*KEY_CENTRE), "full: without the negative adapter"),
        (join(*_line(segment, "edited")), "with the negative adapter, by strength"),
        (_ring(*KEY_CENTRE, radius=8), "unlearned: the chosen strength"),
    ]
    if calibration.negation:
        entries.append((join(*_line(segment, "negation")), "plain negation of the forget adapter, by strength"))
    if calibration.retain_only:
        entries.append((retain_only_mark(*KEY_CENTRE), "retain-only: never saw the forget rows"))
    goal = "target forget loss" if _aims_at_forget_loss(calibration) else "highest retain loss allowed"
    entries.append((element("line", x1=2, x2=22, y1=centre, y2=centre, class_="goal"), f"goal: {goal}"))
    return key(entries)

"""The strength curve as an inline drawing, and its points in numbers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

from ..evaluation import Calibration
from ._markup import Markup, element, join
from ._parts import number, shown, table

WIDTH, HEIGHT = 640, 400


LEFT, RIGHT, TOP, BOTTOM = 74, 18, 16, 56


_LABEL_ROOM = 34.0  # pixels that a strength written beside its point keeps free around it


Point = dict[str, float]


def draw_curve(found: Calibration) -> Markup:
    """Retain loss against forget loss along the strength, the chosen one ringed; others beside."""
    points = _finite(p for p in found.points if p["strength"] <= 1.6 * found.strength)
    negation = _finite(found.negation)
    others = [found.losses, *([found.retain_only] if found.retain_only else [])]
    across, x_marks = _scale([p["forget"] for p in [*points, *negation, *others]], LEFT, WIDTH - RIGHT)
    upward, y_marks = _scale([p["retain"] for p in [*points, *negation, *others]], HEIGHT - BOTTOM, TOP)

    def at(point: Point) -> tuple[float, float]:
        return across(point["forget"]), upward(point["retain"])

    by_forgetting = found.goal["target_forget_loss"] is not None
    x, y = at(found.losses)
    parts = [
        *_grid(x_marks, y_marks, across, upward),
        _goal(across(found.target), None) if by_forgetting else _goal(None, upward(found.target)),
        *_line(negation, at, "negation"),
        *_line(points, at, "edited"),
        *_strengths(points, at, found.strength),
        *([_square(at(points[0]))] if points and points[0]["strength"] == 0 else []),
        *([_diamond(at(found.retain_only))] if found.retain_only else []),
        element("circle", cx=_px(x), cy=_px(y), r=10, class_="ring"),
    ]
    drawing = element(
        "svg",
        element("title", "Strength curve: loss on retain rows against loss on forget rows", id="curve-title"),
        element("desc", _description(found), id="curve-text"),
        *parts,
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_labelledby="curve-title curve-text",
        class_="curve",
    )
    return element("figure", drawing, _key(found), element("figcaption", _description(found)))


def curve_tables(found: Calibration) -> Markup:
    rows = [(*_point_cells(p, p["strength"] == found.strength), number(p["forget"]), number(p["retain"]))
            for p in found.points]  # fmt: skip
    header = ("strength", "forget loss", "retain loss")
    tables = [table("Every strength that was tried (losses in nats per token)", header, rows)]
    if found.negation:
        negated = [(_strength(p), number(p["forget"]), number(p["retain"])) for p in found.negation]
        tables.append(table("Plain negation of the forget adapter", header, negated))
    summary = element("summary", "The points in numbers")
    return element("details", summary, element("div", *tables, class_="beside"))


def _point_cells(point: Point, is_chosen: bool) -> tuple[Markup]:
    return (join(_strength(point), element("strong", " (chosen)")) if is_chosen else _strength(point),)


def _strength(point: Point) -> Markup:
    return element("data", f"{point['strength']:.4g}", value=repr(float(point["strength"])))


def _description(found: Calibration) -> str:
    before = found.points[0]
    beside = []
    if found.negation:
        same = _beside(found.negation, found.losses["forget"])
        if same is not None:
            beside.append(
                f"plain negation of the forget adapter, forgetting as much, would take the retain rows to {shown(same)}"
            )
    if found.retain_only:
        forget, retain = shown(found.retain_only["forget"]), shown(found.retain_only["retain"])
        beside.append(f"a model that never saw the rows has {forget} and {retain}")
    return (
        f"At strength {found.strength:.4g} the loss on the forget rows goes from {shown(before['forget'])} to "
        f"{shown(found.losses['forget'])}, and on the retain rows from {shown(before['retain'])} to "
        f"{shown(found.losses['retain'])}" + "".join(f"; {text}" for text in beside) + ". Losses are nats per token."
    )


def _beside(curve: Sequence[Point], forget: float) -> float | None:
    """The retain loss where the curve first has this forget loss, between its points; None where it never has."""
    ordered = sorted(curve, key=lambda point: point["strength"])
    for low, high in itertools.pairwise(ordered):
        if low["forget"] <= forget <= high["forget"] and low["forget"] < high["forget"]:
            share = (forget - low["forget"]) / (high["forget"] - low["forget"])
            return low["retain"] + share * (high["retain"] - low["retain"])
    return None


def _finite(points) -> list[Point]:
    kept = [p for p in points if math.isfinite(p["forget"]) and math.isfinite(p["retain"])]
    return sorted(kept, key=lambda point: point["strength"])


def _scale(values: list[float], start: float, end: float) -> tuple[Callable[[float], float], list[float]]:
    """A linear map of [0, largest] to pixels, and round numbers to mark on it."""
    largest = max([value for value in values if math.isfinite(value)], default=1.0) or 1.0
    raw = largest / 5
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= raw * 0.999)
    top = largest * 1.06
    marks = [n * step for n in range(int(top / step) + 1)]
    return (lambda value: start + (end - start) * value / top), marks


def _grid(x_marks: list[float], y_marks: list[float], across, upward) -> list[Markup]:
    lines, texts = [], []
    for mark in x_marks:
        lines.append(element("line", x1=_px(across(mark)), x2=_px(across(mark)), y1=TOP, y2=HEIGHT - BOTTOM))
        texts.append(element("text", f"{mark:g}", x=_px(across(mark)), y=HEIGHT - BOTTOM + 20, text_anchor="middle"))
    for mark in y_marks:
        lines.append(element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=_px(upward(mark)), y2=_px(upward(mark))))
        texts.append(element("text", f"{mark:g}", x=LEFT - 8, y=_px(upward(mark) + 4.5), text_anchor="end"))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    texts.append(element("text", "loss on forget rows: more is forgotten →", x=WIDTH - RIGHT, y=HEIGHT - 8,
                         text_anchor="end", class_="axis"))  # fmt: skip
    texts.append(element("text", "loss on retain rows", x=16, y=_px(middle), text_anchor="middle", class_="axis",
                         transform=f"rotate(-90 16 {_px(middle)})"))  # fmt: skip
    return [element("g", *lines, class_="grid"), element("g", *texts, class_="marks")]


def _goal(x: float | None, y: float | None) -> Markup:
    if x is not None:
        return element("line", x1=_px(x), x2=_px(x), y1=TOP, y2=HEIGHT - BOTTOM, class_="goal")
    assert y is not None
    return element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=_px(y), y2=_px(y), class_="goal")


def _line(points: Sequence[Point], at, class_: str) -> list[Markup]:
    if not points:
        return []
    places = [at(point) for point in points]
    path = "M" + "L".join(f"{_px(x)} {_px(y)}" for x, y in places)
    dots = [element("circle", cx=_px(x), cy=_px(y), r=3.5) for x, y in places]
    return [element("g", element("path", d=path), *dots, class_=class_)]


def _strengths(points: Sequence[Point], at, chosen: float) -> list[Markup]:
    """Strengths beside their points, as far as they do not run into each other; the chosen one first."""
    texts, taken = [], []
    for point in sorted(
        (p for p in points if p["strength"] != 0), key=lambda p: (p["strength"] != chosen, p["strength"])
    ):
        x, y = at(point)
        if any(math.hypot(x - a, y - b) < _LABEL_ROOM for a, b in taken):
            continue
        taken.append((x, y))
        if point["strength"] == chosen:  # above the curve, which bends away from there
            place = {"x": _px(x - 12), "y": _px(y - 16), "text_anchor": "end"} if x > WIDTH / 2 else {
                "x": _px(x + 14), "y": _px(y - 16)}  # fmt: skip
            texts.append(element("text", f"strength {chosen:.3g}", **place, class_="chosen"))
        else:
            place = {"x": _px(x - 12), "y": _px(y + 4), "text_anchor": "end"} if x > WIDTH - RIGHT - 60 else {
                "x": _px(x + 8), "y": _px(y + 16)}  # fmt: skip
            texts.append(element("text", f"{point['strength']:.3g}", **place))
    return [element("g", *texts, class_="strengths")]


def _square(place: tuple[float, float]) -> Markup:
    return element("rect", x=_px(place[0] - 6), y=_px(place[1] - 6), width=12, height=12, class_="before")


def _diamond(place: tuple[float, float]) -> Markup:
    x, y = place
    path = f"M{_px(x)} {_px(y - 9)}L{_px(x + 9)} {_px(y)}L{_px(x)} {_px(y + 9)}L{_px(x - 9)} {_px(y)}Z"
    return element("path", d=path, class_="retain-only")


def _key(found: Calibration) -> Markup:
    entries = [
        (_square((12, 10)), "without the edit"),
        (join(*_sample("edited")), "negative adapter, by strength"),
        (element("circle", cx=12, cy=10, r=8, class_="ring"), "the chosen strength"),
    ]
    if found.negation:
        entries.append((join(*_sample("negation")), "plain negation, for comparison"))
    if found.retain_only:
        entries.append((_diamond((12, 10)), "retain-only: a model that never saw the forget rows"))
    goal = (
        "the forget loss that was asked for"
        if found.goal["target_forget_loss"] is not None
        else "the most that retain rows may lose"
    )
    entries.append((element("line", x1=2, x2=22, y1=10, y2=10, class_="goal"), goal))
    return element("ul", *(
        element("li", element("svg", symbol, viewBox="0 0 24 20", aria_hidden="true"), text) for symbol, text in entries
    ), class_="key curve-key")  # fmt: skip


def _sample(class_: str) -> list[Markup]:
    return _line([{"strength": 0, "x": 2}, {"strength": 1, "x": 22}], lambda point: (point["x"], 10), class_)


def _px(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")

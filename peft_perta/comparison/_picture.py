"""The trade-off of all methods as a picture: what forgetting costs."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure

from ..html_report import BLUE, TradeOffPanel, save_figure, trade_off_figure
from .method import Family
from .methods import METHODS
from .table import BASELINES, FULL, RETAIN_ONLY

Result = Mapping[str, Any]
HIGHLIGHTED = {"perta-grad": (BLUE, "PerTA-grad"), "negation": ("#333333", "plain negation")}

STYLES: dict[Family, tuple[str, str, str]] = {  # colour, line, label
    "perta": ("#9cc4e4", "-", "other PerTA edits"),
    "control": ("#d9b38c", "--", "controls"),
    "extrapolation": ("#cdb4e8", ":", "extrapolation (UIPE)"),
    "trained": ("#8fc7a0", "-", "trained methods"),
    "influence": ("#e3a0a8", "-", "influence functions"),
    "negation": ("#aaaaaa", "-", "other negations"),
}

NAMED: tuple[Family, ...] = ("trained", "influence")  # their curves carry the method's name
_NAME: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8, "annotation_clip": False}


def draw_comparison(results: Sequence[Result], path: Path) -> None:
    """Draw loss on retain and on general rows against loss on forget rows.

    There is one curve for each method, along its strength, as a mean over seeds, and one row of panels for each number
    of forget authors. Where forgetting was matched in several measures, the curves of the first are drawn.
    """
    first = next((result["matched"] for result in results if result.get("matched")), None)
    results = [result for result in results if result.get("matched") in (None, first)]
    shapes = list(dict.fromkeys(result["authors"] for result in results))
    figure = trade_off_figure(10, 4.4 * len(shapes) + 0.5)
    rows = figure.subplots(len(shapes), 2, squeeze=False)
    for row, authors in zip(rows, shapes, strict=True):
        of_shape = [result for result in results if result["authors"] == authors]
        for axes, split, up in zip(row, ("retain", "general"), ("rows to keep", None), strict=True):
            panel = TradeOffPanel(axes, split)
            _draw(panel, of_shape)
            panel.label(up=up)
            of = f", {authors} forget author{'s' if authors > 1 else ''}" if authors else ""
            axes.set_title(f"{split} rows{of}", fontsize=11)
    _add_legend(figure)
    save_figure(figure, path)


def _add_legend(figure: Figure) -> None:
    """One legend below all panels, the highlighted methods first."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    first = [label for _, label in HIGHLIGHTED.values() if label in unique]
    ordered = [*first, *(label for label in unique if label not in first)]
    figure.legend(
        [unique[label] for label in ordered], ordered, loc="outside lower center", ncols=4, fontsize=9, frameon=False
    )


def _draw(panel: TradeOffPanel, results: Sequence[Result]) -> None:
    """The curves of one panel, drawn over each other in a fixed order."""
    models = {r["method"]: r["losses"] for r in results if r["method"] in BASELINES}
    names = dict.fromkeys(r["method"] for r in results if r["method"] not in models)
    curves = {name: mean_curve([r for r in results if r["method"] == name], models.get(FULL)) for name in names}
    curves = {name: curve for name, curve in curves.items() if curve}
    for name in sorted(curves, key=lambda name: name in HIGHLIGHTED):
        color, line, label = STYLES[_family(name)]
        style = {"linewidth": 1.1, "zorder": 2.0}
        if name in HIGHLIGHTED:
            (color, label), line = HIGHLIGHTED[name], "-"
            style = {"linewidth": 2.4, "zorder": 3.0, "marker": "o", "markersize": 4}
        elif line == ":":
            style = {"linewidth": 1.8, "zorder": 3.5}  # it lies on the curve of another method
        panel.curve(curves[name], color=color, label=label, linestyle=line, **style)
    if FULL in models:
        panel.full(models[FULL])
    if RETAIN_ONLY in models:
        panel.retain_only(models[RETAIN_ONLY])
        panel.goal(forget=models[RETAIN_ONLY]["forget"])
    _limit(panel, [curve for name, curve in curves.items() if name in HIGHLIGHTED], models)
    _name_ends(panel, {name: curve for name, curve in curves.items() if _family(name) in NAMED})


def _family(name: str) -> Family:
    return METHODS[name].family if name in METHODS else "trained"


def _name_ends(panel: TradeOffPanel, curves: Mapping[str, Sequence[Result]]) -> None:
    """Write each name where its curve leaves the panel: to the right of the panel, or above it."""
    axes, split = panel.axes, panel.split
    right, top = axes.get_xlim()[1], axes.get_ylim()[1]
    ends = {name: leaves_at([(p["forget"], p[split]) for p in curve], right, top) for name, curve in curves.items()}
    lowest = -top
    for name, (_, y) in sorted(ends.items(), key=lambda item: item[1][1]):
        if y < 0.999 * top:
            lowest = max(y, lowest + 0.045 * top)
            axes.annotate(name, (right, lowest), (4, 0), va="center", **_NAME)
    leftmost = right
    for name, (x, y) in sorted(ends.items(), key=lambda item: -item[1][0]):
        if y >= 0.999 * top:
            leftmost = min(x, leftmost - 0.05 * right)
            axes.annotate(name, (leftmost, top), (-2, 3), rotation=40, **_NAME)


def leaves_at(points: Sequence[tuple[float, float]], right: float, top: float) -> tuple[float, float]:
    """Where the line through the points, extended beyond the last one, first crosses the panel's right or top edge; the
    last point if it never does."""
    for number, ((x, y), (next_x, next_y)) in enumerate(itertools.pairwise(points), start=2):
        rises = ((x, next_x, right), (y, next_y, top))
        shares = [(edge - at) / (to - at) for at, to, edge in rises if at < min(edge, to)]
        if shares and (min(shares) <= 1 or (number == len(points) and x <= next_x and y <= next_y)):
            return x + min(shares) * (next_x - x), y + min(shares) * (next_y - y)
    return points[-1]


def _limit(panel: TradeOffPanel, highlighted: Sequence[Sequence[Result]], models: Mapping[str, Result]) -> None:
    """Fit the panel to the highlighted curves; far worse curves leave it."""
    highest = [max(p[panel.split] for p in curve) for curve in highlighted]
    furthest = [max(p["forget"] for p in curve) for curve in highlighted]
    panel.axes.set_ylim(0, 1.15 * max(highest) if highest else None)
    if furthest and RETAIN_ONLY in models:
        panel.axes.set_xlim(0, 1.05 * max(*furthest, models[RETAIN_ONLY]["forget"]))


def _curve_of(result: Result) -> list[dict[str, float]]:
    if result.get("curve") or not result.get("losses"):
        return result.get("curve", [])
    return [{"strength": result["strength"], **result["losses"]}]


def mean_curve(results: Sequence[Result], start: Result | None) -> list[dict[str, float]]:
    """The curve as a mean over the matched seeds, point by point, from the full model on; if no seed was matched, the
    curve of the first one. Where no curve was measured, it is the matched point alone."""
    matched = [_curve_of(r) for r in results if not r.get("failure") and _curve_of(r)]
    curves = matched or [r["curve"] for r in results if r.get("curve")][:1]
    points = [{key: fmean(p[key] for p in at) for key in at[0]} for at in zip(*curves, strict=True)]
    points.sort(key=lambda point: point["strength"])
    return [dict(start), *points] if start and points else points

"""The trade-off of all methods, as a picture: what forgetting costs."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .methods import METHODS
from .table import FULL, RETAIN_ONLY

Result = Mapping[str, Any]


HIGHLIGHTED = {"perta-grad": ("#1f6fb4", "PerTA-grad"), "negation": ("#333333", "plain negation")}


FAMILIES = {  # colour, line, label
    "perta": ("#9cc4e4", "-", "other PerTA edits"),
    "control": ("#d9b38c", "--", "controls"),
    "extrapolation": ("#cdb4e8", ":", "extrapolation (UIPE)"),
    "trained": ("#8fc7a0", "-", "trained methods"),
    "influence": ("#e3a0a8", "-", "influence functions"),
    "negation": ("#aaaaaa", "-", "other negations"),
}


NAMED = ("trained", "influence")  # families whose curves are told apart by name


_NAME: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8, "annotation_clip": False}


def draw_comparison(results: Sequence[Result], path: Path) -> None:
    """Loss on retain and on general rows against loss on forget rows, a curve a method, along its strength; means over
    seeds; a row of panels for each number of forget authors."""
    shapes = sorted({result["authors"] for result in results})
    figure = Figure(figsize=(10, 4.4 * len(shapes) + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(shapes), 2, squeeze=False)
    for row, authors in zip(panels, shapes, strict=True):
        found = [result for result in results if result["authors"] == authors]
        for axes, split in zip(row, ("retain", "general"), strict=True):
            _draw(axes, found, split)
            axes.set_title(f"{split} rows, {authors} forget author{'s' if authors > 1 else ''}", fontsize=11)
            axes.set_xlabel("loss on forget rows (nats per token): more is forgotten →")
        row[0].set_ylabel("loss on rows to keep: lower is better")
    handles, labels = panels[0][0].get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    first = [label for _, label in HIGHLIGHTED.values() if label in unique]
    shown = [*first, *(label for label in unique if label not in first)]
    figure.legend(
        [unique[label] for label in shown], shown, loc="outside lower center", ncols=4, fontsize=9, frameon=False
    )
    figure.savefig(path, dpi=130)


def _draw(axes: Axes, results: Sequence[Result], split: str) -> None:
    points = {r["method"]: r["losses"] for r in results if r["method"] in (FULL, RETAIN_ONLY)}
    start = points.get(FULL)
    names = dict.fromkeys(r["method"] for r in results if r["method"] not in points)
    curves = {name: mean_curve([r for r in results if r["method"] == name], start) for name in names}
    for name in sorted(curves, key=lambda name: name in HIGHLIGHTED):
        curve = curves[name]
        if not curve:
            continue
        colour, line, label = FAMILIES[_family(name)]
        width, marker, order = 1.1, "", 2.0
        if name in HIGHLIGHTED:
            (colour, label), line, width, marker, order = HIGHLIGHTED[name], "-", 2.4, "o", 3.0
        elif line == ":":
            width, order = 1.8, 3.5  # it lies on another's curve
        axes.plot(
            [p["forget"] for p in curve],
            [p[split] for p in curve],
            color=colour,
            linestyle=line,
            linewidth=width,
            marker=marker,
            markersize=4,
            zorder=order,
            label=label,
        )
    for name, marker in ((FULL, "s"), (RETAIN_ONLY, "*")):
        if name in points:
            axes.scatter(points[name]["forget"], points[name][split], marker=marker, s=130 if marker == "*" else 60,
                         color="black", zorder=4, label=name)  # fmt: skip
    if RETAIN_ONLY in points:
        axes.axvline(points[RETAIN_ONLY]["forget"], color="#bbbbbb", linestyle="--", linewidth=1, zorder=0)
    _limit(axes, [curve for name, curve in curves.items() if name in HIGHLIGHTED], points, split)
    _name_ends(axes, {name: curve for name, curve in curves.items() if curve and _family(name) in NAMED}, split)
    axes.grid(alpha=0.25)


def _family(name: str) -> str:
    return METHODS[name].family if name in METHODS else "trained"


def _name_ends(axes: Axes, curves: Mapping[str, Sequence[Result]], split: str) -> None:
    """Each name beside the panel, at the height where its curve leaves it, or over the panel."""
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
    """Where a line through the points, and on from the last, first leaves the panel by its right or its top."""
    for number, ((x, y), (next_x, next_y)) in enumerate(itertools.pairwise(points), start=2):
        rises = ((x, next_x, right), (y, next_y, top))
        shares = [(edge - at) / (to - at) for at, to, edge in rises if at < min(edge, to)]
        if shares and (min(shares) <= 1 or (number == len(points) and x <= next_x and y <= next_y)):
            return x + min(shares) * (next_x - x), y + min(shares) * (next_y - y)
    return points[-1]


def _limit(axes: Axes, shown: Sequence[Sequence[Result]], points: Mapping[str, Result], split: str) -> None:
    """The highlighted curves fill the panel; what is worse by far runs out of it."""
    highest = [max(p[split] for p in curve) for curve in shown if curve]
    furthest = [max(p["forget"] for p in curve) for curve in shown if curve]
    axes.set_ylim(0, 1.15 * max(highest) if highest else None)
    if furthest and RETAIN_ONLY in points:
        axes.set_xlim(0, 1.05 * max(*furthest, points[RETAIN_ONLY]["forget"]))


def mean_curve(results: Sequence[Result], start: Result | None) -> list[dict[str, float]]:
    """Point by point over the seeds that were matched, from the full model on; those of no seed that was not."""
    matched = [r["curve"] for r in results if r.get("curve") and not r.get("failure")]
    curves = matched or [r["curve"] for r in results if r.get("curve")][:1]
    points = [{key: fmean(p[key] for p in at) for key in at[0]} for at in zip(*curves, strict=True)]
    points.sort(key=lambda point: point["strength"])
    return [dict(start), *points] if start and points else points

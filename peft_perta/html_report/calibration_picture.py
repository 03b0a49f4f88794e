"""The strength curve, as a picture: what forgetting costs, and where the chosen strength lies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..evaluation import Calibration

PICTURE_NAME = "strength.png"


BLUE, GREY, RED = "#1f6fb4", "#888888", "#d1495b"


def draw_calibration(calibration: Calibration, path: str | Path) -> None:
    """Retain loss against forget loss along the strength, plain negation's curve and the retain-only model beside."""
    figure = Figure(figsize=(7, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    chosen = calibration.losses
    shown = [p for p in calibration.points if p["strength"] <= 1.6 * calibration.strength]
    if calibration.negation:
        axes.plot(
            *_xy(calibration.negation), color=GREY, marker="o", markersize=3, linewidth=1.5, label="plain negation"
        )
    axes.plot(*_xy(shown), color=BLUE, marker="o", markersize=4, linewidth=2, label="negative adapter")
    for point in shown:
        if point["strength"] not in (0.0, calibration.strength):
            axes.annotate(f"{point['strength']:.3g}", (point["forget"], point["retain"]), fontsize=7, color=BLUE,
                          xytext=(4, -9), textcoords="offset points")  # fmt: skip
    start = calibration.points[0]
    axes.scatter(start["forget"], start["retain"], color="black", marker="s", s=45, zorder=3, label="without the edit")
    label = f"chosen: strength {calibration.strength:.3g}"
    axes.scatter(chosen["forget"], chosen["retain"], facecolor="none", edgecolor=RED, linewidth=2, s=150, label=label)
    if calibration.retain_only is not None:
        axes.scatter(calibration.retain_only["forget"], calibration.retain_only["retain"], color="black", marker="*", s=140,
                     zorder=3, label="retain-only model")  # fmt: skip
    if calibration.goal["target_forget_loss"] is not None:
        axes.axvline(calibration.target, color="#bbbbbb", linestyle="--", linewidth=1, zorder=0)
    else:
        axes.axhline(calibration.target, color="#bbbbbb", linestyle="--", linewidth=1, zorder=0)
    axes.set_xlabel("loss on forget rows (nats per token): more is forgotten →")
    axes.set_ylabel("loss on retain rows: lower is better")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=9, frameon=False, loc="upper left")
    figure.savefig(path, dpi=130)


def _xy(points: Sequence[dict[str, float]]) -> tuple[list[float], list[float]]:
    ordered = sorted(points, key=lambda point: point["strength"])
    return [p["forget"] for p in ordered], [p["retain"] for p in ordered]

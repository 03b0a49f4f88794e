"""The strength curve as a picture: the cost of forgetting, and where the chosen strength lies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..evaluation import Calibration
from .pictures import BLUE, GREY, RED, TradeOffPanel, save_figure, trade_off_figure

PICTURE_NAME = "strength.png"


def draw_calibration(calibration: Calibration, path: str | Path) -> None:
    """Draw retain loss against forget loss along the strength, with the chosen strength, the full model, the curve of
    plain negation and the retain-only model, as far as they are known."""
    figure = trade_off_figure(7, 4.8)
    panel = TradeOffPanel(figure.subplots(), "retain")
    chosen = calibration.losses
    shown = [p for p in calibration.points if p["strength"] <= 1.6 * calibration.strength]
    if calibration.negation:
        negation = _by_strength(calibration.negation)
        panel.curve(negation, color=GREY, label="plain negation", marker="o", markersize=3, linewidth=1.5)
    panel.curve(_by_strength(shown), color=BLUE, label="negative adapter", marker="o", markersize=4, linewidth=2)
    for point in shown:
        if point["strength"] not in (0.0, calibration.strength):
            panel.axes.annotate(f"{point['strength']:.3g}", (point["forget"], point["retain"]), fontsize=7, color=BLUE,
                                xytext=(4, -9), textcoords="offset points")  # fmt: skip
    panel.full(calibration.points[0])
    label = f"chosen: strength {calibration.strength:.3g}"
    panel.axes.scatter(
        chosen["forget"], chosen["retain"], facecolor="none", edgecolor=RED, linewidth=2, s=150, label=label
    )
    if calibration.retain_only is not None:
        panel.retain_only(calibration.retain_only)
    if calibration.goal["target_forget_loss"] is not None:
        panel.goal(forget=calibration.target)
    else:
        panel.goal(split=calibration.target)
    panel.label(up="retain rows")
    panel.axes.legend(fontsize=9, frameon=False, loc="upper left")
    save_figure(figure, path)


def _by_strength(points: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    return sorted(points, key=lambda point: point["strength"])

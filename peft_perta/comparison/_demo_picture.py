"""The demo's trade-off as a picture: what forgetting costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..html_report import BLUE, TradeOffPanel, save_figure, trade_off_figure

COLORS = ("#777777", BLUE)  # of each edit, in their order


def draw_trade_off(
    curves: Mapping[str, Sequence[Mapping[str, float]]],
    points: Mapping[str, Mapping[str, float]],
    labels: Mapping[str, str],
    path: Path,
) -> None:
    """Draw loss on retain and on general rows against loss on forget rows: one curve for each edit, along its strength.

    Args:
        curves: edit -> points with the losses 'forget', 'retain', 'general'.
        points: 'task' (the full model) and 'retain-only', with the same losses.
        labels: edit -> its label in the legend.
        path: the picture's file.
    """
    figure = trade_off_figure(10, 4.6)
    panels = [
        TradeOffPanel(axes, split) for axes, split in zip(figure.subplots(1, 2), ("retain", "general"), strict=True)
    ]
    target = points["retain-only"]["forget"]
    for panel in panels:
        panel.goal(forget=target)
        for color, (edit, curve) in zip(COLORS, curves.items(), strict=True):
            panel.curve(curve, color=color, label=labels[edit], marker="o", markersize=4, linewidth=1.8)
        panel.full(points["task"])
        panel.retain_only(points["retain-only"])
        panel.label(f"{panel.split} rows", up="rows to keep" if panel is panels[0] else None)
    first, second = (panel.axes for panel in panels)
    first.legend(fontsize=9, frameon=False, loc="upper left")
    second.annotate("as the retain-only model", (target, second.get_ylim()[1]), fontsize=8, color="#777777", ha="right",
                    va="top", rotation=90, xytext=(-2, -4), textcoords="offset points")  # fmt: skip
    save_figure(figure, path)

"""The trade-off over strength, as a picture: what forgetting costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

STYLES = (("#777777", "-"), ("#1f6fb4", "-"), ("#d1495b", "--"), ("#2a9d57", "-"), ("#8456a8", "--"))


def draw_trade_off(
    curves: Mapping[str, Sequence[Mapping[str, float]]],
    points: Mapping[str, Mapping[str, float]],
    labels: Mapping[str, str],
    path: Path,
) -> None:
    """Loss on retain and on general rows against loss on forget rows, a curve an edit, along its strength.

    Args:
        curves: edit -> points with the losses 'forget', 'retain', 'general'.
        points: 'task' (the full model) and 'reference' (the retain-only model), with the same losses.
    """
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2)
    target = points["retain-only"]["forget"]
    for axes, split in zip(panels, ("retain", "general"), strict=True):
        axes.axvline(target, color="#bbbbbb", linestyle="--", linewidth=1, zorder=0)
        for (colour, line), (edit, curve) in zip(STYLES, curves.items(), strict=False):
            axes.plot(
                [p["forget"] for p in curve],
                [p[split] for p in curve],
                color=colour,
                linestyle=line,
                marker="o",
                markersize=4,
                linewidth=1.8,
                label=labels.get(edit, edit),
            )
        for name, marker in (("task", "s"), ("retain-only", "*")):
            axes.scatter(
                points[name]["forget"],
                points[name][split],
                marker=marker,
                s=130 if marker == "*" else 60,
                color="black",
                zorder=3,
                label=labels.get(name, name),
            )
        axes.set_title(f"{split} rows")
        axes.set_xlabel("loss on forget rows (nats per token): more is forgotten →")
        axes.grid(alpha=0.25)
        axes.set_ylim(bottom=0)
    panels[0].set_ylabel("loss on rows to keep: lower is better")
    panels[0].legend(fontsize=9, frameon=False, loc="upper left")
    panels[1].annotate("as the retain-only model", (target, panels[1].get_ylim()[1]), fontsize=8, color="#777777", ha="right",
                       va="top", rotation=90, xytext=(-2, -4), textcoords="offset points")  # fmt: skip
    figure.savefig(path, dpi=130)

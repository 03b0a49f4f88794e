"""What every picture of the trade-off shares: loss on some rows against loss on the forget rows, along the strength."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

BLUE, GREY, RED = "#1f6fb4", "#888888", "#d1495b"
_GOAL = {"color": "#bbbbbb", "linestyle": "--", "linewidth": 1, "zorder": 0}
_FULL = {"marker": "s", "s": 60, "label": "full model"}
_RETAIN_ONLY = {"marker": "*", "s": 130, "label": "retain-only model"}
Losses = Mapping[str, float]


def trade_off_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches; it needs no display."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write the figure; the file's suffix decides the format."""
    figure.savefig(path, dpi=130)


@dataclass(frozen=True)
class TradeOffPanel:
    """One panel of a trade-off: loss on one split upward, loss on the forget rows across.

    Attributes:
        axes: where to draw.
        split: the split whose loss is drawn upward, a key of every point.
    """

    axes: Axes
    split: str

    def label(self, title: str | None = None, up: str | None = None) -> None:
        """Name the axes and draw the grid, once the curves are drawn. The vertical axis then begins at 0, unless that
        would press the curves into its upper half.

        Args:
            title: of the panel.
            up: label of the vertical axis.
        """
        if title:
            self.axes.set_title(title)
        if up:
            self.axes.set_ylabel(f"loss on {up}: lower is better")
        self.axes.set_xlabel("loss on forget rows (nats per token): more is forgotten →")
        lowest, highest = self.axes.get_ylim()
        if lowest < highest / 2:
            self.axes.set_ylim(bottom=0)
        self.axes.grid(alpha=0.25)

    def curve(self, points: Sequence[Losses], *, color: str, label: str, **style) -> None:
        """A curve through the points, in their order; ``style`` is matplotlib's."""
        across, up = [p["forget"] for p in points], [p[self.split] for p in points]
        self.axes.plot(across, up, color=color, label=label, **style)

    def full(self, losses: Losses) -> None:
        """Mark the full model."""
        self._mark(losses, **_FULL)

    def retain_only(self, losses: Losses) -> None:
        """Mark the retain-only model."""
        self._mark(losses, **_RETAIN_ONLY)

    def goal(self, *, forget: float | None = None, split: float | None = None) -> None:
        """A dashed line at a forget loss, or at a loss of the panel's split."""
        if forget is not None:
            self.axes.axvline(forget, **_GOAL)
        if split is not None:
            self.axes.axhline(split, **_GOAL)

    def _mark(self, losses: Losses, **style) -> None:
        self.axes.scatter(losses["forget"], losses[self.split], color="black", zorder=4, **style)

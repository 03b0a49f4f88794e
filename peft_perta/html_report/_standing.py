"""How far unlearning moved a metric: from the full model towards the retain-only model, or away from its old value."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ..evaluation import METRICS, Metric, metric_of
from ._numbers import percent
from .report_data import Values

NEAR = 0.1  # of the distance from full to retain-only: a value this close counts as being at the retain-only model
_NO_DISTANCE = 0.02  # of the scale: if full and retain-only are this close, the metric cannot show forgetting


@dataclass(frozen=True)
class Standing:
    """Where the unlearned model stands between the full and the retain-only model, by one metric.

    Attributes:
        kind: ``near`` the retain-only model, ``past`` it, ``part`` of the way, or ``unmoved``. A metric that moved the
            other way is ``unmoved``.
        share: the share of the distance that was covered: 0 at the full model, 1 at the retain-only model.
    """

    kind: Literal["near", "past", "part", "unmoved"]
    share: float

    @property
    def description(self) -> str:
        """The standing in words."""
        return {
            "near": "near retain-only",
            "past": "past retain-only",
            "part": f"{percent(self.share)} of the way to retain-only",
            "unmoved": "moved away" if self.share < -NEAR else "hardly moved",
        }[self.kind]

    @property
    def falls_short(self) -> bool:
        """Whether the metric has yet to reach the retain-only model."""
        return self.kind in ("part", "unmoved")


def standing(metric: Metric, values: Values) -> Standing | None:
    """The standing of the unlearned model.

    Returns:
        None if a value is missing or not finite, or if the full and the retain-only model hardly differ.
    """
    full, unlearned, retain_only = values
    if full is None or unlearned is None or retain_only is None:
        return None
    if not all(map(math.isfinite, (full, unlearned, retain_only))):
        return None
    low, high = metric.scale or sorted((full, retain_only))
    if full == retain_only or abs(full - retain_only) < _NO_DISTANCE * (high - low):
        return None
    share = (full - unlearned) / (full - retain_only)
    kind = "past" if share > 1 + NEAR else "near" if share >= 1 - NEAR else "part" if share > NEAR else "unmoved"
    return Standing(kind, share)


def lost_share(metric: Metric, values: Values) -> float | None:
    """The share of the full model's value that unlearning cost; negative if the value grew.

    Returns:
        None if a value is missing or not finite, or if the metric is not a quantity of which more is better.
    """
    full, unlearned, _ = values
    if full is None or unlearned is None or not (math.isfinite(full) and math.isfinite(unlearned)):
        return None
    if metric.better != "higher" or full <= 0:
        return None
    return (full - unlearned) / full


def direction(metric: Metric) -> str:
    """Which way is better, as an arrow and words; empty if no direction is."""
    if metric.better == "near":
        return f"→ best near {metric.target:g}"
    return {"lower": "↓ lower is better", "higher": "↑ higher is better"}.get(metric.better or "", "")


def metrics_of_group(names: set[str], group: str) -> list[str]:
    """The metrics of a group in the order of the table, then unknown ones by name."""
    place = {name: number for number, name in enumerate(METRICS)}
    members = [name for name in names if metric_of(name).group == group]
    return sorted(members, key=lambda name: (place.get(name, len(place)), name))

"""What a row of the metrics table says about its metric."""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

from .log_rows import LogRows

# What a metric measures: how much of the forget rows is left, whether it shows that the model was trained on them,
# what the model should still do, and everything else. Reports show the groups in this order.
METRIC_GROUPS = ("forget", "traces", "retain", "other")

# (log, log of the retain-only model or None, name of the metric) -> aggregate. Raises ``Unavailable`` where the rows do
# not give one.
Aggregate = Callable[[LogRows, "LogRows | None", str], float]


@dataclass(frozen=True)
class Metric:
    """One metric of an evaluation log.

    Attributes:
        label: a name for people.
        better: 'lower' or 'higher'; 'near': best at ``target``; None where no direction is better.
        group: one of ``METRIC_GROUPS``.
        note: one sentence on what the number says.
        target: the best value of a metric whose ``better`` is 'near'.
        scale: the least and the largest value; None where the metric has no bounds.
        aggregate: how the aggregate follows from the rows; None where we do not compute it.
        follows_from: whether the metric can be computed from a log that holds the metrics of these names, although the
            log does not list it; None where it never can.
        parts: the groups of rows that its log entry holds, where it holds several.
        retain_only_rows: reads what the metric needs from the log of a retain-only model and raises ``Unavailable``
            where that lacks it; None where the metric is not measured against a retain-only model.
    """

    label: str
    better: Literal["lower", "higher", "near"] | None
    group: str
    note: str = ""
    target: float | None = None
    scale: tuple[float, float] | None = (0.0, 1.0)
    aggregate: Aggregate | None = None
    follows_from: Callable[[Set[str]], bool] | None = None
    parts: tuple[str, ...] = ()
    retain_only_rows: Callable[[LogRows], Any] | None = None


def mean_of(field: str) -> Aggregate:
    """The mean over rows of a field; a row that lists several numbers counts with their mean."""

    def aggregate(log: LogRows, retain_only: LogRows | None, metric: str) -> float:
        return fmean(fmean(numbers) for numbers in log.values(metric, field).values())

    return aggregate

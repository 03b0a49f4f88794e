"""The difference between two methods with its interval: a bootstrap over rows, paired by row, averaged over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..evaluation import drawn_means, interval

_DRAWS = 10_000


@dataclass(frozen=True)
class Difference:
    """A mean difference and its 95 % interval.

    Attributes:
        mean: over rows and seeds.
        low, high: the ends of the interval.
    """

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def kept_against(runs: Sequence[Mapping[str, Any]], controls: Sequence[Mapping[str, Any]]) -> Difference | None:
    """By how much what is kept of unseen retain rows differs from a control; see ``kept_of_rows``.

    Args:
        runs: results of one method, one for each seed: 'seed', and 'rows'.
        controls: results of the control.

    Returns:
        The difference over the seeds that both have; None if they have none in common.
    """
    control_of = {control["seed"]: control for control in controls if "rows" in control}
    pairs = [(run, control_of[run["seed"]]) for run in runs if "rows" in run and run["seed"] in control_of]
    if not pairs:
        return None
    by_seed = torch.stack([kept_of_rows(run) - kept_of_rows(control) for run, control in pairs])
    by_row = by_seed.mean(0)
    return Difference(*interval(float(by_row.mean()), drawn_means(by_row, _DRAWS)))


def kept_of_rows(run: Mapping[str, Any]) -> torch.Tensor:
    """What a run keeps of each of N unseen retain rows: [N], float64.

    It is the answer's probability exp(-loss), or, where false answers were scored, its share of the probability of all
    answers.

    Args:
        run: a result with 'rows': split -> 'loss' and perhaps 'misled' -> one value for each row.
    """
    rows = run["rows"]["retain"]
    if "misled" in rows:
        return 1 - torch.tensor(rows["misled"], dtype=torch.float64)
    return torch.tensor(rows["loss"], dtype=torch.float64).neg().exp()

"""The bootstrap over rows, that every interval comes from."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

DRAWS = 2_000
_LEVEL = 0.95


class Interval(NamedTuple):
    """A value and the ends of its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.2f} [{self.low:.2f}, {self.high:.2f}]"


def drawn_means(values: Tensor, draws: int = DRAWS) -> Tensor:
    """[draws], the means of N values over rows that are drawn with replacement; the same rows for every N values."""
    rows = torch.randint(len(values), (draws, len(values)), generator=torch.Generator().manual_seed(0))
    return values[rows].mean(1)


def interval(mean: float, drawn: Tensor) -> Interval:
    """A value, with the interval of what was drawn of it."""
    ends = torch.tensor([(1 - _LEVEL) / 2, (1 + _LEVEL) / 2], dtype=drawn.dtype)
    low, high = drawn.quantile(ends).tolist()
    return Interval(mean, low, high)

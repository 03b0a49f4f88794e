"""Streamed gradient statistics: sums over samples, never the samples themselves."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

StatisticName = Literal["mean", "squares"]


@dataclass
class Statistic:
    """One layer's gradients over one data set.

    ``mean`` sums gradients, ``squares`` sums squared per-sample gradients (the diagonal of the empirical Fisher). They
    are different statistics: the square of the first, at N = 4, is about a fifth of the second.

    Attributes:
        name: which of the two.
        sums: per tensor of the granularity, the running sum, float32 or wider.
        samples: how many samples are in.
    """

    name: StatisticName
    sums: dict[str, Tensor] = field(default_factory=dict)
    samples: int = 0

    def add(self, gradients: dict[str, Tensor], samples: int) -> None:
        """Take in gradients summed over ``samples`` samples; squares take one sample at a time."""
        if self.name == "squares":
            if samples != 1:
                raise ValueError(f"squares take one sample's gradient at a time, found {samples}")
            for key, gradient in gradients.items():
                if key in self.sums:
                    self.sums[key].addcmul_(gradient, gradient)
                else:
                    self.sums[key] = gradient.square()
        else:
            for key, gradient in gradients.items():
                if key in self.sums:
                    self.sums[key].add_(gradient)
                else:
                    self.sums[key] = gradient
        self.samples += samples

    def magnitudes(self) -> dict[str, Tensor]:
        """|mean gradient|, or the root mean square gradient: in one unit, so that one power suits both."""
        if self.name == "squares":
            return {key: (total / self.samples).sqrt_() for key, total in self.sums.items()}
        return {key: (total / self.samples).abs_() for key, total in self.sums.items()}

"""The contract of a weighting."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ...gradients import StatisticName

WeightFunction = Callable[[Tensor, Tensor, float], Tensor]


@dataclass(frozen=True)
class Weighting:
    """How the gradient magnitudes of both sets become weights in [0, 1].

    Attributes:
        name: the name in configs and provenance.
        function: (forget magnitudes, retain magnitudes, power) -> weights in [0, 1], elementwise, for any shape; None
            for weights of 1 everywhere.
        statistic: the magnitudes that it takes: 'mean' for |mean gradient|, 'squares' for the root mean square of the
            per-sample gradients, None if it needs no gradients.
        power: the exponent tau passed to the function.
        description: one line for help texts.
    """

    name: str
    function: WeightFunction | None
    statistic: StatisticName | None
    power: float = 1.0
    description: str = ""

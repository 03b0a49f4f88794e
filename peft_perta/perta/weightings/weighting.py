"""The contract of a weighting."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ...gradients import StatisticName

WeightFunction = Callable[[Tensor, Tensor, float], Tensor]


@dataclass(frozen=True)
class Weighting:
    """A row of the table.

    Attributes:
        name: as the config and reports call it.
        function: (forget magnitudes, retain magnitudes, power) -> weights in [0, 1], elementwise, any shape; None for
            weights that are 1 everywhere.
        statistic: which magnitudes: 'mean' (|mean gradient|), 'squares' (root mean square of per-sample gradients), or
            None where no gradient is needed.
        power: the exponent tau that the function is given.
    """

    name: str
    function: WeightFunction | None
    statistic: StatisticName | None
    power: float = 1.0

"""The contract of a combiner: both sets' gradients in, the gradient that the optimizer takes out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

Gradients = Mapping[str, Tensor]  # name of a parameter -> its gradient


@dataclass(frozen=True)
class Combiner:
    """A row of the table.

    Attributes:
        function: (forget, retain, gamma, alpha) -> combined: the gradients of two losses to descend, over the same
            names, and the weight > 0 of each. Pure: both are only looked at.
    """

    description: str
    function: Callable[[Gradients, Gradients, float, float], dict[str, Tensor]]


def inner(one: Gradients, other: Gradients) -> float:
    """<one, other> over all parameters, float64; the same in whatever order they come."""
    return math.fsum(dot(one[name], other[name]) for name in one)


def dot(one: Tensor, other: Tensor) -> float:
    return float((one.double() * other.double()).sum())

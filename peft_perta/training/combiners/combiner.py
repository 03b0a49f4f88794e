"""The contract of a combiner: the gradients of both sets in, one gradient out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

Gradients = Mapping[str, Tensor]  # name of a parameter -> its gradient


@dataclass(frozen=True)
class Combiner:
    """A row of ``COMBINERS``.

    Attributes:
        name: what the settings and the command line call it.
        description: one line for a user who chooses a combiner.
        function: (forget, retain, gamma, alpha) -> combined. ``forget`` and ``retain`` are the gradients g_f and g_r
            of two losses to be minimised, under the same parameter names; gamma > 0 and alpha >= 0 are their weights.
            It changes neither.
    """

    name: str
    description: str
    function: Callable[[Gradients, Gradients, float, float], dict[str, Tensor]]


def inner(first: Gradients, second: Gradients) -> float:
    """The inner product over all parameters, in float64. It does not depend on the order of the parameters."""
    return math.fsum(dot(first[name], second[name]) for name in first)


def dot(first: Tensor, second: Tensor) -> float:
    """The inner product of two tensors of one shape, in float64."""
    return float((first.double() * second.double()).sum())
